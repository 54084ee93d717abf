"""The procedural clips, their captions, and the detector that judges videos by pixels."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from laboratory.quality.detector import Verdict, compare, judge, look
from laboratory.training.shapes import FREE_RUN, draw_clip, extents, paths_of, render
from lightforcing.lightforcing_core.demo.captions import (
    COLOURS,
    DIRECTIONS,
    PADDING,
    SHAPES,
    SLOTS,
    VOCABULARY,
    Scene,
    Thing,
    caption_of,
    parse,
    word_ids,
)
from lightforcing.lightforcing_core.demo.model import FPS

HEIGHT, WIDTH, FRAMES = 64, 96, 15
CLIPS = 120


def spoiled(video, generator):
    """As an autoencoder might return it: blurred, and noisy."""
    planes = video.permute(0, 3, 1, 2)
    for _ in range(2):
        planes = F.avg_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = torch.randn(video.shape, generator=generator)
    return (planes.permute(0, 2, 3, 1) + 0.08 * noise).clamp(0, 1)


@pytest.fixture(scope="module")
def judged():
    """Clips, and what is seen in their videos, every second one spoiled."""
    generator = torch.Generator().manual_seed(0)
    clips, seen = [], []
    for index in range(CLIPS):
        clip = draw_clip(11, index)
        video = render([clip], FRAMES, HEIGHT, WIDTH)[0]
        if index % 2:
            video = spoiled(video, generator)
        clips.append(clip)
        seen.append(look(video))
    return clips, seen


def other(scene, **changes):
    return replace(scene, things=(replace(scene.things[0], **changes), *scene.things[1:]))


def test_captions_are_read_back_as_they_were_written():
    for index in range(300):
        scene = draw_clip(1, index).scene
        caption = caption_of(scene)
        assert parse(caption) == scene
        ids = word_ids(caption)
        words = [VOCABULARY[i] for i in ids]
        assert len(ids) == SLOTS
        assert words[-1] == PADDING
        assert " ".join(word for word in words if word != PADDING) == caption


def test_clips_depend_on_seed_and_index_alone():
    first, again, other_index, other_seed = (draw_clip(*key) for key in ((4, 9), (4, 9), (4, 10), (5, 9)))
    video = render([first], 3, 32, 48)
    assert torch.equal(video, render([draw_clip(4, 10), again], 3, 32, 48)[1:])
    for changed in (other_index, other_seed):
        assert not torch.equal(video, render([changed], 3, 32, 48))
    assert torch.equal(render([first], 6, 32, 48)[:, 2:5], render([first], 3, 32, 48, start=2))


def test_things_stay_in_the_picture_and_run_freely_at_first():
    reached = Counter()
    for index in range(200):
        clip = draw_clip(2, index)
        for thing, radius, path, velocity in zip(
            clip.scene.things, clip.radii, paths_of(clip, 81), clip.velocities, strict=True
        ):
            left, right, up, down = extents(thing.shape, radius)
            low, high = np.array([left, up]), np.array([1.5 - right, 1 - down])
            assert (path >= low - 1e-9).all()
            assert (path <= high + 1e-9).all()
            free = path[: round(FREE_RUN * FPS)]
            np.testing.assert_allclose(
                np.diff(free, axis=0) * FPS, np.broadcast_to(velocity, free[1:].shape), atol=1e-9
            )
            steps = np.diff(path, axis=0) * FPS
            reached["bounced"] += bool((np.sign(steps[-1]) != np.sign(steps[0])).any())
        if len(clip.scene.things) == 2:
            first, second = paths_of(clip, 81)
            reached["crossed"] += bool((np.linalg.norm(first - second, axis=1) < 0.5 * clip.radii.sum()).any())
            reached["apart"] += bool((np.linalg.norm(first - second, axis=1) > clip.radii.sum()).all())
    assert reached["bounced"] > 50
    assert reached["crossed"] > 15
    assert reached["apart"] > 15


def test_a_thing_passes_behind_the_pillar_and_is_whole_again_in_the_last_quarter():
    hidden = 0
    for index in range(24):
        clip = draw_clip(7, index, level="pillar")
        video = render([clip], 81, HEIGHT, WIDTH)[0]
        (seen,) = look(video)
        assert seen.whole[: round(0.6 * FPS)].all()  # long enough to see where it goes
        (thing,) = judge(video, clip.scene).things
        assert (thing.present, thing.shape_right, thing.direction_right, thing.identity) == (True,) * 4
        hidden += not seen.visible.all()
        # It shows on neither side of the pillar's middle column, where nothing but the pillar is.
        middle = video[:, :, WIDTH // 2]
        assert (middle.amax(-1) - middle.amin(-1)).max() < 0.1
    assert hidden > 6


def test_shapes_cover_the_area_of_their_outlines_smoothly():
    """Anti-aliased coverage sums to the exact area: πr², a square's, a triangle's."""
    radius, size = 0.3, 96
    for shape, area in (("circle", np.pi * radius**2), ("square", 4 * (0.886 * radius) ** 2), ("triangle", None)):
        corner = 1.4 * radius
        exact = area if area is not None else 3 * np.sqrt(3) / 4 * corner**2
        scene = Scene("plain", (Thing("red", shape, "right", "slowly"),))
        clip = replace(
            draw_clip(0, 0, level="simple"),
            scene=scene,
            radii=np.array([radius]),
            starts=np.array([[0.5, 0.5]]),
            velocities=np.zeros((1, 2)),
            ground=np.full(3, 0.5),
        )
        video = render([replace(clip, aspect=1.0)], 1, size, size)[0, 0]
        covered = (video[..., 0] - 0.5) / (0.86 - 0.5)
        assert covered.sum().item() / size**2 == pytest.approx(exact, rel=0.01)
        assert ((covered > 0.1) & (covered < 0.9)).sum() > size / 2  # a soft rim


def test_detector_confirms_what_clips_show(judged):
    verdicts = [compare(seen, clip.scene, aspect=1.5) for clip, seen in zip(*judged, strict=True)]
    assert sum(verdict.right for verdict in verdicts) >= 0.98 * CLIPS
    things = [thing for verdict in verdicts for thing in verdict.things]
    assert sum(thing.speed_right for thing in things) >= 0.98 * len(things)
    assert sum(thing.identity for thing in things) >= 0.97 * len(things)
    assert np.mean([thing.position_error for thing in things if thing.present]) < 0.02
    assert np.mean([thing.velocity_error for thing in things if thing.present]) < 0.02
    assert sum(thing.copies or 0 for thing in things) == 0


@pytest.mark.parametrize("kind", ["colour", "shape", "direction"])
def test_detector_rejects_captions_with_one_wrong_word(judged, kind):
    """Every other word of that kind, for every clip: at most one caption in two hundred passes."""
    words = {"colour": COLOURS, "shape": SHAPES, "direction": tuple(DIRECTIONS)}[kind]
    passed = asked = 0
    for clip, seen in zip(*judged, strict=True):
        taken = {thing.colour for thing in clip.scene.things} | {getattr(clip.scene.things[0], kind)}
        for word in set(words) - taken:
            passed += compare(seen, other(clip.scene, **{kind: word}), aspect=1.5).right
            asked += 1
    assert asked >= 2 * CLIPS
    assert passed <= asked / 200


def test_detector_sees_missing_and_additional_things(judged):
    clip, seen = next((clip, seen) for clip, seen in zip(*judged, strict=True) if len(clip.scene.things) == 2)
    single = replace(clip.scene, things=clip.scene.things[:1])
    verdict = compare(seen, single, aspect=1.5)
    assert verdict.strangers == (clip.scene.things[1].colour,)
    assert not verdict.right
    empty = torch.full((FRAMES, HEIGHT, WIDTH, 3), 0.4)
    assert look(empty) == []
    nothing = judge(empty, single)
    assert not nothing.things[0].present
    assert not nothing.right


def test_detector_follows_a_thing_through_occlusion():
    """Two that cross: both are the same ones afterwards. One that never comes back has lost its identity."""
    clip = next(
        clip
        for clip in (draw_clip(3, i) for i in range(500))
        if len(clip.scene.things) == 2
        and 25 < (np.linalg.norm(np.subtract(*paths_of(clip, 81)), axis=1) / clip.radii.sum()).argmin() < 50
        and (np.linalg.norm(np.subtract(*paths_of(clip, 81)), axis=1) / clip.radii.sum()).min() < 0.2
        and (np.linalg.norm(np.subtract(*paths_of(clip, 81)), axis=1) / clip.radii.sum())[-8:].min() > 1.2
    )
    video = render([clip], 81, HEIGHT, WIDTH)[0]
    verdict = judge(video, clip.scene)
    assert all(thing.identity for thing in verdict.things)
    assert max(thing.position_error for thing in verdict.things) < 0.05
    behind = look(video)
    covered = next(seen for seen in behind if seen.colour == clip.scene.things[0].colour)
    assert not covered.whole.all()  # it was covered indeed

    gone = video.clone()
    lonely = replace(
        clip,
        scene=replace(clip.scene, things=clip.scene.things[1:]),
        radii=clip.radii[1:],
        starts=clip.starts[1:],
        velocities=clip.velocities[1:],
    )
    gone[50:] = render([lonely], 81, HEIGHT, WIDTH)[0, 50:]
    lost: Verdict = judge(gone, clip.scene)
    assert [thing.identity for thing in lost.things] == [False, True]


def test_position_error_grows_for_a_thing_that_leaves_its_path():
    clip = draw_clip(6, 2, level="simple")
    honest = render([clip], 49, HEIGHT, WIDTH)[0]
    drifting = honest.clone()
    drifting[24:] = honest[24:25]  # it stops
    errors = [judge(video, clip.scene).things[0] for video in (honest, drifting)]
    assert errors[0].position_error < 0.02
    assert errors[1].position_error > 3 * errors[0].position_error + 0.02
    assert errors[1].position_errors[:20].nanmean() < 0.02

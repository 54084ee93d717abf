"""The procedural clips, their captions, and the detector that judges videos by pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from laboratory.quality.detector import compare, judge, look
from laboratory.training.shapes import draw_clip, paths_of, render
from lightforcing.lightforcing_core.demo import captions
from lightforcing.lightforcing_core.demo.model import FPS

HEIGHT, WIDTH, FRAMES = 64, 96, 15
CLIPS = 120


def spoiled(video, generator):
    """Blurred and noisy, as an autoencoder might return it."""
    planes = video.permute(0, 3, 1, 2)
    for _ in range(2):
        planes = F.avg_pool2d(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = torch.randn(video.shape, generator=generator)
    return (planes.permute(0, 2, 3, 1) + 0.08 * noise).clamp(0, 1)


@pytest.fixture(scope="module")
def judged():
    """Scenes, and the things found in their videos, every second one spoiled."""
    generator = torch.Generator().manual_seed(0)
    scenes, seen = [], []
    for index in range(CLIPS):
        clip = draw_clip(11, index)
        video = render([clip], FRAMES, HEIGHT, WIDTH)[0]
        scenes.append(clip.scene)
        seen.append(look(spoiled(video, generator) if index % 2 else video))
    return scenes, seen


def test_captions_are_read_back_as_they_were_written():
    for index in range(300):
        scene = draw_clip(1, index).scene
        caption = captions.caption_of(scene)
        words = [captions.VOCABULARY[i] for i in captions.word_ids(caption)]
        assert captions.parse(caption) == scene
        assert (len(words), words[-1]) == (captions.SLOTS, captions.PADDING)
        assert " ".join(word for word in words if word != captions.PADDING) == caption


def test_a_thing_passes_behind_the_pillar_and_is_whole_again_in_the_last_quarter():
    hidden = 0
    for index in range(12):
        clip = draw_clip(7, index, level="pillar")
        video = render([clip], 81, HEIGHT, WIDTH)[0]
        (seen,), (thing,) = look(video), judge(video, clip.scene).things
        assert seen.whole[: round(0.6 * FPS)].all()  # long enough to see where it goes
        assert (thing.present, thing.shape_right, thing.direction_right, thing.identity) == (True,) * 4
        hidden += not seen.visible.all()
        middle = video[:, :, WIDTH // 2]  # shows nothing but the pillar
        assert (middle.amax(-1) - middle.amin(-1)).max() < 0.1
    assert hidden > 3


def test_detector_confirms_the_captions_of_clips(judged):
    verdicts = [compare(seen, scene, aspect=1.5) for scene, seen in zip(*judged, strict=True)]
    things = [thing for verdict in verdicts for thing in verdict.things]
    assert sum(verdict.right for verdict in verdicts) >= 0.98 * CLIPS
    assert sum(thing.speed_right for thing in things) >= 0.98 * len(things)
    assert sum(thing.identity for thing in things) >= 0.97 * len(things)
    assert np.mean([thing.position_error for thing in things if thing.present]) < 0.02
    assert np.mean([thing.velocity_error for thing in things if thing.present]) < 0.02
    assert sum(thing.copies or 0 for thing in things) == 0


@pytest.mark.parametrize("kind", ["colour", "shape", "direction"])
def test_detector_rejects_captions_with_one_wrong_word(judged, kind):
    """Every other word of that kind, for every clip: at most one caption in two hundred passes."""
    words = {"colour": captions.COLOURS, "shape": captions.SHAPES, "direction": tuple(captions.DIRECTIONS)}[kind]
    verdicts = []
    for scene, seen in zip(*judged, strict=True):
        first, *others = scene.things
        for word in set(words) - {thing.colour for thing in scene.things} - {getattr(first, kind)}:
            wrong = replace(scene, things=(replace(first, **{kind: word}), *others))
            verdicts.append(compare(seen, wrong, aspect=1.5).right)
    assert len(verdicts) >= 2 * CLIPS
    assert sum(verdicts) <= len(verdicts) / 200


def crosses(clip):
    """Whether the two things cover each other half-way through and are apart at the end."""
    if len(clip.scene.things) < 2:
        return False
    apart = np.linalg.norm(np.subtract(*paths_of(clip, 81)), axis=1) / clip.radii.sum()
    return 25 < apart.argmin() < 50 and apart.min() < 0.2 and apart[-8:].min() > 1.2


def test_detector_follows_a_thing_through_occlusion():
    """Two that cross: both are the same ones afterwards. One that never comes back has lost its identity."""
    clip = next(clip for clip in (draw_clip(3, i) for i in range(500)) if crosses(clip))
    video = render([clip], 81, HEIGHT, WIDTH)[0]
    things = judge(video, clip.scene).things
    assert all(thing.identity and thing.position_error < 0.05 for thing in things)
    covered = next(seen for seen in look(video) if seen.colour == clip.scene.things[0].colour)
    assert not covered.whole.all()  # it was covered indeed
    alone = {name: getattr(clip, name)[1:] for name in ("radii", "starts", "velocities")}
    lonely = replace(clip, scene=replace(clip.scene, things=clip.scene.things[1:]), **alone)
    gone = torch.cat([video[:50], render([lonely], 81, HEIGHT, WIDTH)[0, 50:]])
    assert [thing.identity for thing in judge(gone, clip.scene).things] == [False, True]

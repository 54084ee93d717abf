"""A saved run continues as if it had never stopped, and a file that cannot be used says why."""

import json
import os
import resource
from dataclasses import fields, is_dataclass, replace
from itertools import islice

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightforcing.lightforcing_core.files.output import OutputError
from lightforcing.lightforcing_core.refusal import Refusal
from lightforcing.lightforcing_core.rollout.loop import rollout
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas
from lightforcing.lightforcing_core.rollout.runtime import Chunk, Runtime
from lightforcing.lightforcing_core.rollout.state import RunState, StateError, load_run_state, save_run_state
from lightforcing.lightforcing_core.rollout.timeline import Prompt

from ...support.rollouts import recipe_of, text

SIZE = (4, 4)
SIGMAS = (1.0, 0.6, 0.0)
MODEL = "wan, 2 layers of 2 heads, width 256"


def start(frames=8, *, kv_dtype="same", batch=1, **options):
    """A run of chunks of 3 before its first chunk."""
    arguments = {"frames_per_chunk": 3, "sigmas": SIGMAS, "context": text(1), **options}
    return RunState(recipe_of(latent_shape=(batch, 16, frames, *SIZE), **arguments), MODEL, kv_dtype)


def remaining(dit, state):
    """The chunks that a state lacks."""
    return rollout(dit, state.recipe, Runtime(kv=state.kv), state.finished)


def completed(dit, state, count=None):
    """The state after `count` more chunks, by default after all."""
    for chunk in islice(remaining(dit, state), count):
        state = state.extended_by(chunk)
    return state


def resumed(dit, state, path, cuts):
    """The run, stopped, saved and loaded again after every number of chunks in `cuts`, then run to its end."""
    for count in [*cuts, None]:
        state = load_run_state(save_run_state(state, path))
        if state.is_complete:
            break
        state = completed(dit, state, count)
    return state


def filled(state, seed=0):
    """The state with all its chunks made of noise."""
    generator = torch.Generator().manual_seed(seed)
    recipe, begin = state.recipe, state.recipe.initial_frames
    for index, frames in list(enumerate(recipe.chunk_lengths()))[recipe.first_index :]:
        state = state.extended_by(Chunk(index, begin, torch.randn(1, 16, frames, *SIZE, generator=generator)))
        begin += frames
    return state


@st.composite
def runs(draw):
    frames, per_chunk = draw(st.integers(3, 11)), draw(st.integers(1, 4))
    sinks = draw(st.integers(0, 2))
    switches = st.sampled_from(["hard", "soft", "blend", *["cut"] * (sinks < 2)])
    changes = draw(st.dictionaries(st.integers(1, 4), st.tuples(switches, st.integers(1, 3)), max_size=2))
    cut = {"cut": {"jump": draw(st.integers(0, 50)), "pin": draw(st.integers(0, 1))}}
    prompts = [Prompt(text(10 + c, 4 + c), c, how, n, **cut.get(how, {})) for c, (how, n) in changes.items()]
    prompts.insert(0, Prompt(text(1)))
    given_frames = draw(st.integers(0, min(5, frames - 1)))
    state = start(
        frames,
        frames_per_chunk=per_chunk,
        first_sigmas=draw(st.sampled_from([None, (1.0, 0.0)])),
        growth=draw(st.sampled_from([None, (0.0, 0.3, 0.6)])),
        window=draw(st.none() | st.integers(sinks + per_chunk + 1, sinks + per_chunk + 4)),
        sink_frames=sinks,
        sink_rope=draw(st.sampled_from(["fixed", "follow"])),
        seed=draw(st.integers(0, 2**64 - 1)),
        chunk_seeds=draw(st.dictionaries(st.integers(0, 3), st.integers(0, 9), max_size=2)),
        context_noise=draw(st.sampled_from([0.0, 125.0])),
        kv_dtype=draw(st.sampled_from(["same", "same", "int8", "fp8"])),
        context=prompts,
        initial_latents=torch.randn(1, 16, given_frames, *SIZE) if given_frames else None,
    )
    end = draw(st.integers(0, state.recipe.chunk_lengths()[-1] - 1)) if per_chunk > 1 else 0
    last = torch.randn(1, 16, end, *SIZE) if end else None
    return replace(state, recipe=replace(state.recipe, last_latents=last))


CASES = (
    start(8, cfg=3.0, negative=text(9)),
    start(8, growth=(0.0, 0.5), window=5, sink_frames=1, context=[Prompt(text(1)), Prompt(text(2), 2)]),
    start(14, initial_latents=torch.zeros(1, 16, 1, *SIZE), window=6, sink_frames=3, sink_rope="average"),
    start(8, last_latents=torch.ones(1, 16, 1, *SIZE), cfg=3.0, negative=text(9)),
    start(9, last_latents=torch.ones(1, 16, 2, *SIZE), growth=(0.0, 0.5), window=5, sink_frames=1),
    start(context=[Prompt(first := text(1)), Prompt(text(2), 1), Prompt(first, 2)]),
    filled(
        start(
            8,
            sigmas=few_step_sigmas(),
            first_sigmas=(0.1 + 0.2, 0.0),
            growth=(0.0, 1 / 3),
            seed=2**64 - 1,
            chunk_seeds={2: 5},
            initial_latents=torch.randn(1, 16, 5, *SIZE).bfloat16(),
            context=[Prompt(text(1).half()), Prompt(text(2).half(), 1, "blend", 3)],
        )
    ),
)


def same(one, other):
    """Whether two values that may hold tensors and dataclasses are equal, dtypes included."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one):
        return all(same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@given(runs())
@example(CASES[0])
@example(CASES[3])
@example(CASES[5])
@example(CASES[6])
def test_every_recipe_survives_the_file(tmp_path_factory, state):
    loaded = load_run_state(save_run_state(state, tmp_path_factory.getbasetemp() / "recipe.safetensors"))
    assert same(loaded.recipe.prompts, state.recipe.prompts)
    assert same(replace(loaded, recipe=replace(loaded.recipe, context=state.recipe.context)), state)


@settings(max_examples=25)
@given(runs(), st.lists(st.integers(0, 2), max_size=3))
@example(CASES[0], [1, 1])
@example(CASES[1], [2])
@example(CASES[2], [0, 2])
@example(CASES[3], [1, 1])
@example(CASES[4], [2])
def test_resumed_equals_uninterrupted(dit, tmp_path_factory, state, cuts):
    whole = completed(dit, state)
    again = resumed(dit, state, tmp_path_factory.getbasetemp() / "state.safetensors", cuts)
    assert again.is_complete
    assert same(again.finished, whole.finished)


@pytest.mark.parametrize("options", [{}, {"growth": (0.0, 0.5), "window": 5, "sink_frames": 1}])
@pytest.mark.parametrize("frames", [8, 9])
def test_lengthened_continues_as_if_asked_for_at_once(dit, options, frames):
    """A video of 8 ends with a chunk of 2; in the longer one it has 3, so it is made again."""
    state = completed(dit, start(frames, **options)).lengthened(14)
    assert len(state.finished) == frames // 3
    assert torch.equal(completed(dit, state).latents, completed(dit, start(14, **options)).latents)


@pytest.mark.parametrize("finished", [1, 3])
def test_lengthened_moves_the_given_end(dit, finished):
    """The chunk that led to it is made again; the others stay."""
    end = torch.randn(1, 16, 1, *SIZE)
    state = completed(dit, start(9, last_latents=end), finished).lengthened(15)
    assert len(state.finished) == min(finished, 2)
    latents = completed(dit, state).latents
    assert torch.equal(latents, completed(dit, start(15, last_latents=end)).latents)
    assert torch.equal(latents[:, :, -1:], end)


def test_a_finished_run_says_how_to_go_on(dit):
    with pytest.raises(Refusal, match=r"already holds all 8 latent frames of the video.*longer"):
        remaining(dit, filled(start(8)))
    with pytest.raises(StateError, match="already has 8 latent frames; 8 would not"):
        start(8).lengthened(8)


def test_loaded_tensors_are_aligned_like_any_other(tmp_path):
    """Matrix products of tensors at odd addresses may round differently, and the video would not be the same."""
    state = filled(start(context=text(1, 3)[:, :, :31], negative=text(2, 3)[:, :, :31]))
    loaded = load_run_state(save_run_state(state, tmp_path / "state.safetensors"))
    tensors = (*loaded.finished, loaded.recipe.guidance.negative, loaded.recipe.prompts[0].context)
    assert [tensor.data_ptr() % 64 for tensor in tensors] == [0] * 5


def test_chunks_are_kept_as_they_were_when_added():
    latents = torch.zeros(1, 16, 3, *SIZE)
    state = start().extended_by(Chunk(0, 0, latents))
    latents.fill_(1.0)
    assert not state.latents.any()


def test_chunks_of_another_place_or_video_or_model_are_refused():
    chunk = torch.zeros(1, 16, 3, *SIZE)
    state = start().extended_by(Chunk(0, 0, chunk))
    for index, begin in ((0, 0), (2, 6), (1, 4)):
        with pytest.raises(StateError, match=f"chunk {index} starts at latent frame {begin}.*chunk 1 at 3"):
            state.extended_by(Chunk(index, begin, chunk))
    with pytest.raises(StateError, match="the end of the video"):
        filled(start(8)).extended_by(Chunk(3, 8, chunk))
    with pytest.raises(Refusal, match=r"chunk 0 of shape \[1, 16, 2, 4, 4\]; pass one of \[1, 16, 3"):
        replace(state, finished=(chunk[:, :, :2],))
    with pytest.raises(Refusal, match="4 chunks of a video that has 3"):
        replace(state, finished=(chunk,) * 4)
    state.check_model(MODEL)
    with pytest.raises(StateError, match=f"made by the model {MODEL}, the loaded model is wan 14B"):
        state.check_model("wan 14B")


def rewritten(path, without=(), **metadata):
    """The file with another header, or without some tensors."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in without}
    save_file(tensors, path, metadata={**old, **metadata})


def with_fact(path, name, value):
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["state"])
    rewritten(path, state=json.dumps({**facts, name: value}))


def with_a_flipped_bit(path):
    damaged = bytearray(path.read_bytes())
    damaged[-1000] ^= 1
    path.write_bytes(damaged)


UNREADABLE = [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short or no safetensors file"),
    (lambda path: path.write_bytes(b""), "cut short or no safetensors file"),
    *(
        (lambda path, fact=fact: with_fact(path, *fact), f"header is damaged.*{reason}")
        for fact, reason in (
            (("sink_frames", 0.0), "whole numbers"),
            (("latent_shape", [1, 16, 6_000_000_000, *SIZE]), "6000000000.*over 1000000"),
            (("sigmas", [1.0, float("nan"), 0.0]), "does not fall"),
            (("cfg", float("inf")), ""),
            (("seed", 10**400), "401 digits"),
            (("seed", 2**65), "whole numbers"),
            (("finished", -1), "whole numbers"),
            (("frames_per_chunk", True), ""),
            (("model", 5), "another type"),
            (("growth", ["half"]), "could not convert"),
            (("growth", ["0.5", "0"]), "another type"),
            (("growth", [False, False]), "another type"),
            (("growth", {"0.5": 1}), "another type"),
            (("sigmas", [True, 0.0]), "another type"),
            (("first_sigmas", ["1", "0"]), "another type"),
            (("kv_dtype", "int3"), "kv_dtype 'int3'"),
            (("chunk_seeds", [[0, "7"]]), "whole numbers"),
            (("extra", 1), "extra"),
        )
    ),
    (lambda path: rewritten(path, state="[" * 2000 + "]" * 2000), "nested deeper than 100"),
    (lambda path: rewritten(path, version="9" * 5000), "header is damaged"),
    (lambda path: (path.unlink(), path.mkdir()), r"cannot be read \(a folder, not a file\)"),
    (os.remove, r"cannot be read \(No such file or directory\); choose another file"),
    (lambda path: save_file({"x": torch.zeros(2)}, path, metadata={"format": "pt"}), "holds no run state.*pt"),
    (lambda path: rewritten(path, version="4"), "version 4, this one reads up to 3; update"),
    (lambda path: rewritten(path, ("chunk.00001",)), r"chunk\.00001 is missing"),
    (with_a_flipped_bit, "damaged"),
]


@pytest.mark.parametrize(("damage", "message"), UNREADABLE)
def test_a_file_that_cannot_be_used_says_why(tmp_path, damage, message):
    path = save_run_state(filled(start()), tmp_path / "state.safetensors")
    damage(path)
    with pytest.raises(StateError, match=message) as caught:
        load_run_state(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ({}, "1"),
        ({"last_latents": torch.zeros(1, 16, 1, *SIZE)}, "2"),
        ({"kv_dtype": "int8"}, "2"),
        ({"context": [Prompt(text(1)), Prompt(text(2), 1, "cut")]}, "3"),
    ],
)
def test_only_what_older_versions_would_ignore_needs_the_newer_one(tmp_path, options, version):
    path = save_run_state(start(**options), tmp_path / "state.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["version"] == version


def test_an_older_run_goes_on_with_the_keys_that_its_cache_kept(dit, tmp_path):
    state = replace(start(kv_dtype="int8"), key_mean=False)
    whole = completed(dit, state).latents
    assert torch.equal(resumed(dit, state, tmp_path / "state.safetensors", [2]).latents, whole)
    assert not torch.equal(completed(dit, replace(state, key_mean=True)).latents, whole)


def test_a_full_disk_keeps_the_former_state_or_leaves_nothing(tmp_path):
    """The error of a real write that meets a limit."""
    limits, path, large = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "state.safetensors", filled(start(576))
    for former, left in ((None, "no file was left"), (start(), "unchanged")):
        if former:
            save_run_state(former, path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(OutputError, match=rf"state\.safetensors.*File too large.*{left}"):
                save_run_state(large, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(tmp_path) == [path.name] * bool(former)
    assert load_run_state(path).finished == ()

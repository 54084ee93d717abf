"""A saved run continues as if it had never stopped, and a file that cannot be used says why."""

import errno
import json
import os
import resource
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightforcing.lightforcing_core.attention.dispatch import AttentionOptions
from lightforcing.lightforcing_core.files import tensors as tensor_files
from lightforcing.lightforcing_core.files.output import OutputError
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.rollout import state as run_state
from lightforcing.lightforcing_core.rollout.rollout import Chunk, few_step_sigmas, rollout, seeded_noise
from lightforcing.lightforcing_core.rollout.state import (
    RunState,
    StateError,
    load_run_state,
    resume_arguments,
    save_run_state,
)
from lightforcing.lightforcing_core.rollout.timeline import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT, SIZE = 32, (4, 4)
SIGMAS = (1.0, 0.6, 0.0)
FINE = AttentionOptions(backend="reference", block=(16, 16), keep_frames=3, sink_frames=1, near_frames=1)
MODEL = "wan, 2 layers of 2 heads, width 256"


@pytest.fixture(scope="module")
def dit():
    return wan_from_state_dict(random_state_dict(dim=256, ffn_dim=320, layers=2, text_dim=TEXT))


def text(seed, tokens=5):
    return torch.randn(1, tokens, TEXT, generator=torch.Generator().manual_seed(seed))


def start(frames=8, **options):
    """A run of chunks of 3 before its first chunk."""
    shape = (1, 16, frames, *SIZE)
    arguments = {"frames_per_chunk": 3, "sigmas": SIGMAS, "prompts": (Prompt(text(1)),), "attention": FINE}
    return RunState(model=MODEL, latent_shape=shape, **{**arguments, **options})


def uninterrupted(dit, state):
    """The video that `state` asks for, told to `rollout` without any help of the module under test."""
    chunks = rollout(
        dit,
        list(state.prompts),
        latent_shape=state.latent_shape,
        frames_per_chunk=state.frames_per_chunk,
        sigmas=state.sigmas,
        first_sigmas=state.first_sigmas,
        growth=state.growth,
        window=state.window,
        sink_frames=state.sink_frames,
        sink_rope=state.sink_rope,
        noise=seeded_noise(state.seed, state.chunk_seeds),
        initial_latents=state.given,
        last_latents=state.last_latents,
        context_noise=state.context_noise,
        cfg=state.cfg,
        negative=state.negative,
        attention=state.attention,
        kv=KVOptions(state.kv_dtype),
    )
    return [chunk.latents for chunk in chunks]


def resumed(dit, state, path, cuts):
    """The run, stopped, saved and loaded again after every number of chunks in `cuts`, then run to its end."""
    for count in [*cuts, None]:
        save_run_state(state, path)
        state = load_run_state(path)
        if state.is_complete:
            break
        for chunk in islice(rollout(dit, **resume_arguments(state)), count):
            state = state.extended_by(chunk)
    return state


def filled(state, seed=0):
    """The state with all its chunks made of noise."""
    generator = torch.Generator().manual_seed(seed)
    begin = state.given_frames
    for index, frames in list(enumerate(state.chunk_lengths()))[state.first_index :]:
        state = state.extended_by(Chunk(index, begin, torch.randn(1, 16, frames, *SIZE, generator=generator)))
        begin += frames
    return state


@st.composite
def runs(draw):
    frames, per_chunk = draw(st.integers(3, 11)), draw(st.integers(1, 4))
    sinks = draw(st.integers(0, 2))
    switches = st.sampled_from(["hard", "soft", "blend"])
    changes = draw(st.dictionaries(st.integers(1, 4), st.tuples(switches, st.integers(1, 3)), max_size=2))
    prompts = [Prompt(text(1)), *(Prompt(text(10 + c, 4 + c), c, how, n) for c, (how, n) in changes.items())]
    given_frames = draw(st.integers(0, min(5, frames - 1)))
    state = start(
        frames,
        frames_per_chunk=per_chunk,
        first_sigmas=draw(st.sampled_from([None, (1.0, 0.0)])),
        growth=draw(st.sampled_from([None, (0.0, 0.3, 0.6)])),
        window=draw(st.none() | st.integers(sinks + per_chunk, sinks + per_chunk + 4)),
        sink_frames=sinks,
        sink_rope=draw(st.sampled_from(["fixed", "follow"])),
        seed=draw(st.integers(0, 2**64 - 1)),
        chunk_seeds=draw(st.dictionaries(st.integers(0, 3), st.integers(0, 9), max_size=2)),
        context_noise=draw(st.sampled_from([0.0, 125.0])),
        kv_dtype=draw(st.sampled_from(["same", "same", "int8", "fp8"])),
        prompts=tuple(prompts),
        given=torch.randn(1, 16, given_frames, *SIZE) if given_frames else None,
    )
    end = draw(st.integers(0, state.chunk_lengths()[-1] - 1))
    return replace(state, last_latents=torch.randn(1, 16, end, *SIZE)) if end else state


@settings(max_examples=25)
@given(runs(), st.lists(st.integers(0, 2), max_size=3))
@example(start(8, cfg=3.0, negative=text(9)), [1, 1])
@example(start(8, growth=(0.0, 0.5), window=5, sink_frames=1, prompts=(Prompt(text(1)), Prompt(text(2), 2))), [2])
@example(start(8, given=torch.zeros(1, 16, 1, *SIZE)), [0, 2])
@example(start(8, last_latents=torch.ones(1, 16, 1, *SIZE), cfg=3.0, negative=text(9)), [1, 1])
@example(start(9, last_latents=torch.ones(1, 16, 2, *SIZE), growth=(0.0, 0.5), window=5, sink_frames=1), [2])
def test_resumed_equals_uninterrupted(dit, tmp_path_factory, state, cuts):
    whole = uninterrupted(dit, state)
    again = resumed(dit, state, tmp_path_factory.getbasetemp() / "state.safetensors", cuts)
    assert again.is_complete
    assert [one.shape for one in again.finished] == [one.shape for one in whole]
    assert all(torch.equal(one, other) for one, other in zip(again.finished, whole, strict=True))


@pytest.mark.parametrize("options", [{}, {"growth": (0.0, 0.5), "window": 5, "sink_frames": 1}])
@pytest.mark.parametrize("frames", [8, 9])
def test_lengthened_continues_as_if_asked_for_at_once(dit, options, frames):
    """A video of 8 ends with a chunk of 2; in the longer one it has 3, so it is made again."""
    state = start(frames, **options)
    for chunk in rollout(dit, **resume_arguments(state)):
        state = state.extended_by(chunk)
    state = state.lengthened(14)
    assert len(state.finished) == frames // 3
    for chunk in rollout(dit, **resume_arguments(state)):
        state = state.extended_by(chunk)
    whole = uninterrupted(dit, start(14, **options))
    assert torch.equal(state.latents, torch.cat(whole, dim=2))


@pytest.mark.parametrize("finished", [1, 3])
def test_lengthened_moves_the_given_end(dit, finished):
    """The chunk that led to it is made again; the others stay."""
    end = torch.randn(1, 16, 1, *SIZE)
    state = start(9, last_latents=end)
    for chunk in islice(rollout(dit, **resume_arguments(state)), finished):
        state = state.extended_by(chunk)
    state = state.lengthened(15)
    assert len(state.finished) == min(finished, 2)
    for chunk in rollout(dit, **resume_arguments(state)):
        state = state.extended_by(chunk)
    assert torch.equal(state.latents, torch.cat(uninterrupted(dit, start(15, last_latents=end)), dim=2))
    assert torch.equal(state.latents[:, :, -1:], end)


def test_a_finished_run_says_how_to_go_on():
    with pytest.raises(StateError, match=r"all 8 latent frames of this video are finished.*longer"):
        resume_arguments(filled(start(8)))
    with pytest.raises(StateError, match="already has 8 latent frames; 8 would not"):
        start(8).lengthened(8)


def test_every_field_survives_the_file(tmp_path):
    state = filled(
        start(
            8,
            sigmas=tuple(few_step_sigmas()),
            first_sigmas=(0.1 + 0.2, 0.0),
            growth=(0.0, 1 / 3),
            window=7,
            sink_frames=1,
            sink_rope="follow",
            seed=2**64 - 1,
            chunk_seeds={2: 5},
            context_noise=12.5,
            cfg=2.5,
            negative=text(3),
            given=torch.randn(1, 16, 5, *SIZE).bfloat16(),
            last_latents=torch.randn(1, 16, 2, *SIZE),
            prompts=(Prompt(text(1).half()), Prompt(text(2).half(), 1, "blend", 3)),
        )
    )
    loaded = load_run_state(save_run_state(state, tmp_path / "state.safetensors"))
    plain = vars(state).keys() - {"prompts", "given", "last_latents", "negative", "finished"}
    assert {name: getattr(loaded, name) for name in plain} == {name: getattr(state, name) for name in plain}
    for name in ("given", "last_latents", "negative", "latents"):
        one, other = getattr(loaded, name), getattr(state, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for one, other in zip(loaded.prompts, state.prompts, strict=True):
        assert torch.equal(one.context, other.context)
        assert (one.context.dtype, one.start_chunk, one.switch, one.blend_chunks) == (
            other.context.dtype,
            other.start_chunk,
            other.switch,
            other.blend_chunks,
        )


def test_loaded_tensors_are_aligned_like_any_other(tmp_path):
    """Matrix products of tensors at odd addresses may round differently, and the video would not be the same."""
    state = filled(start(prompts=(Prompt(text(1, 3)[:, :, :31]),), negative=text(2, 3)[:, :, :31]))
    loaded = load_run_state(save_run_state(state, tmp_path / "state.safetensors"))
    tensors = (*loaded.finished, loaded.negative, loaded.prompts[0].context)
    assert [tensor.data_ptr() % 64 for tensor in tensors] == [0] * 5


def test_a_prompt_may_return(tmp_path):
    first = text(1)
    state = start(prompts=(Prompt(first), Prompt(text(2), 1), Prompt(first, 2)))
    loaded = load_run_state(save_run_state(state, tmp_path / "state.safetensors"))
    assert torch.equal(loaded.prompts[2].context, first)


def test_a_batch_may_start_from_one_image(tmp_path):
    state = replace(start(7, given=torch.randn(1, 16, 1, *SIZE)), latent_shape=(2, 16, 7, *SIZE))
    state = state.extended_by(Chunk(1, 1, torch.randn(2, 16, 3, *SIZE)))
    loaded = load_run_state(save_run_state(state, tmp_path / "state.safetensors"))
    assert loaded.latents.shape == (2, 16, 4, *SIZE)


def test_chunks_are_kept_as_they_were_when_added():
    latents = torch.zeros(1, 16, 3, *SIZE)
    state = start().extended_by(Chunk(0, 0, latents))
    latents.fill_(1.0)
    assert not state.latents.any()


@pytest.mark.parametrize(("index", "begin"), [(0, 0), (2, 6), (1, 4)])
def test_chunks_out_of_order_are_refused(index, begin):
    state = start().extended_by(Chunk(0, 0, torch.zeros(1, 16, 3, *SIZE)))
    with pytest.raises(StateError, match=f"chunk {index} starts at latent frame {begin}.*chunk 1 at 3"):
        state.extended_by(Chunk(index, begin, torch.zeros(1, 16, 3, *SIZE)))


def test_a_chunk_after_the_end_is_refused():
    with pytest.raises(StateError, match="the end of the video"):
        filled(start(8)).extended_by(Chunk(3, 8, torch.zeros(1, 16, 1, *SIZE)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finished": (torch.zeros(1, 16, 2, *SIZE),)}, r"chunk 0 has shape \(1, 16, 2, 4, 4\); expected \(1, 16, 3"),
        ({"finished": (torch.zeros(1, 16, 3, *SIZE),) * 4}, "4 chunks are finished.* has 3"),
        ({"given": torch.zeros(1, 16, 1, 2, 2)}, r"given latents have shape \(1, 16, 1, 2, 2\)"),
        ({"given": torch.zeros(1, 16, 8, *SIZE)}, "already fill 8 of 8"),
        ({"prompts": ()}, "no prompt starts at chunk 0"),
        ({"last_latents": torch.zeros(1, 16, 1, 2, 2)}, r"last_latents have shape \(1, 16, 1, 2, 2\)"),
        ({"last_latents": torch.zeros(1, 16, 2, *SIZE)}, "the last chunk's 2.*ask for 9 latent frames instead of 8"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(start(), **change)


def test_another_model_is_refused_with_both_names():
    state = start()
    state.check_model(MODEL)
    with pytest.raises(StateError, match=f"made by the model {MODEL}, the loaded model is wan 14B"):
        state.check_model("wan 14B")


class TestUnreadableFiles:
    @pytest.fixture
    def saved(self, tmp_path):
        return save_run_state(filled(start()), tmp_path / "state.safetensors")

    def rewritten(self, path, **metadata):
        """The same tensors under another header."""
        with run_state.safe_open(path, framework="pt") as file:
            old = file.metadata()
        save_file(load_file(path), path, metadata={**old, **metadata})

    def refused(self, path, message):
        with pytest.raises(StateError, match=message) as caught:
            load_run_state(path)
        assert str(path) in str(caught.value)

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "nothing.safetensors", "no such file")
        self.refused(tmp_path, "no such file")

    @pytest.mark.parametrize("left", [20, 3000, -1])
    def test_cut_short(self, saved, left):
        saved.write_bytes(saved.read_bytes()[:left])
        self.refused(saved, "damaged or cut short")

    def test_empty(self, saved):
        saved.write_bytes(b"")
        self.refused(saved, "is empty")

    @pytest.mark.parametrize("contents", [b"abc", b"\x80\x02}q\x00.", b"a text file, longer than a header\n" * 9])
    def test_not_safetensors(self, saved, contents):
        saved.write_bytes(contents)
        self.refused(saved, "no safetensors file")

    def test_other_kinds_of_safetensors(self, saved):
        save_file({"weight": torch.zeros(2)}, saved)
        self.refused(saved, "holds no run state.*some other safetensors")
        save_file({"weight": torch.zeros(2)}, saved, metadata={"format": "pt"})
        self.refused(saved, "holds no run state.*'pt'")

    def test_newer_version(self, saved):
        self.rewritten(saved, version="3")
        self.refused(saved, "version 3, this one reads up to 2; update")

    def test_only_a_given_end_needs_the_newer_version(self, saved, tmp_path):
        """An older pack would go on without the end; without one it reads the file as ever."""
        ended = save_run_state(start(last_latents=torch.zeros(1, 16, 1, *SIZE)), tmp_path / "ended.safetensors")
        for path, version in ((saved, "1"), (ended, "2")):
            with run_state.safe_open(path, framework="pt") as file:
                assert file.metadata()["version"] == version
                assert ("last_latents" in file.keys()) == (version == "2")  # noqa: SIM118 (no mapping)

    @pytest.mark.parametrize("state", ["{", "[]", "{}", '{"checksums": {}}'])
    def test_damaged_header(self, saved, state):
        self.rewritten(saved, state=state)
        self.refused(saved, "header is damaged")

    def test_header_with_values_of_the_wrong_kind(self, saved):
        with run_state.safe_open(saved, framework="pt") as file:
            facts = json.loads(file.metadata()["state"])
        for name, value in (("frames_per_chunk", "three"), ("latent_shape", [1, 16]), ("prompts", 7), ("extra", 1)):
            self.rewritten(saved, state=json.dumps({**facts, name: value}))
            self.refused(saved, "header is damaged")

    def test_missing_tensors_are_named(self, saved):
        with run_state.safe_open(saved, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(saved)
        del tensors["chunk.00001"], tensors["prompt.0"]
        save_file(tensors, saved, metadata=metadata)
        self.refused(saved, r"chunk\.00001, prompt\.0 is missing")

    def test_one_flipped_bit(self, saved):
        damaged = bytearray(saved.read_bytes())
        damaged[-1000] ^= 1
        saved.write_bytes(damaged)
        self.refused(saved, "wrong checksum")


class TestFullDisk:
    def test_keeps_the_former_state(self, tmp_path, monkeypatch):
        path = save_run_state(start(), tmp_path / "state.safetensors")

        def half(tensors, partial, metadata):
            partial.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(tensor_files, "save_file", half)
        with pytest.raises(OutputError, match=r"state\.safetensors.*No space left.*unharmed"):
            save_run_state(filled(start()), path)
        assert load_run_state(path).finished == ()
        assert os.listdir(tmp_path) == [path.name]

    def test_leaves_nothing_where_nothing_was(self, tmp_path):
        """The error of a real write that meets a limit, which safetensors reports in its own way."""
        former = resource.getrlimit(resource.RLIMIT_FSIZE)
        state = filled(start(9 * 64))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, former[1]))
        try:
            with pytest.raises(OutputError, match=r"state\.safetensors.*File too large.*nothing was left"):
                save_run_state(state, tmp_path / "state.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
        assert os.listdir(tmp_path) == []

    def test_too_little_space_is_an_error_before_the_write(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tensor_files, "save_file", pytest.fail)
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
        with pytest.raises(OutputError, match="needed; free some space"):
            save_run_state(filled(start()), tmp_path / "state.safetensors")

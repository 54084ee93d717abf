"""Looks before and after a run: what is measured then, and that the video is the same."""

import pytest
import torch

from lightforcing.lightforcing_core import fast_path, machine, profile
from lightforcing.lightforcing_core.attention.backends.dense import WORK, FastestDense, sdpa
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.model.kv_storage import KVOptions
from lightforcing.lightforcing_core.rollout import look
from lightforcing.lightforcing_core.rollout.look import DENSE, Looks
from lightforcing.lightforcing_core.rollout.recipe import few_step_sigmas
from lightforcing.lightforcing_core.rollout.state import RunState, load_run_state, save_run_state

from ...support.rollouts import recipe_of, roll, text, video

AUTO = AttentionOptions(block=(16, 16), keep_frames=3, sink_frames=1, near_frames=1)
OPTIONS = {"latent_shape": (1, 16, 9, 8, 8), "frames_per_chunk": 3, "sigmas": few_step_sigmas(), "attention": AUTO}
OPTIONS["growth"] = [0.0, 0.4, 0.6]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A machine about which nothing is known; the names of the choices that are measured, and their candidates."""
    monkeypatch.setenv("LIGHTFORCING_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LIGHTFORCING_PROFILE")
    tried = []
    measure = machine._measure

    def seen(session, choice, unknown, *rest):
        tried.append((choice.work, unknown))
        measure(session, choice, unknown, *rest)

    monkeypatch.setattr(machine, "_measure", seen)
    for memory in (look._looked, machine.settled, machine._checked):
        memory.clear()
    yield tried
    for memory in (look._looked, machine.settled, machine._checked):
        memory.clear()


def looks_of(recipe, kv="same", dense=sdpa):
    shape = recipe.cache_shape(layers=4, heads=2, head_dim=16, dtype=torch.float32)
    return Looks(recipe, shape, KVOptions(kv), torch.device("cpu"), dense)


@pytest.mark.parametrize("kv", ["same", "int8"])
@pytest.mark.parametrize(("times", "growth"), [((2.0, 1.0), (0.0, 0.0, 0.0, 0.6)), ((1.0, 2.0), (0.0, 0.4, 0.6, 0.6))])
def test_dense_attention_wins_where_it_is_faster(measured, monkeypatch, times, growth, kv):
    slow_and_fast = dict(zip(("sparse", "dense"), times, strict=True))
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: 1e-3 * slow_and_fast.get(run.args[0], 1.0))
    recipe = recipe_of(context=text(0), **OPTIONS)
    with machine.measuring():
        chosen = looks_of(recipe, kv).dense_where_faster()
    assert chosen.growth == growth
    assert measured == [(DENSE, ["dense"])] * 2
    with machine.safe():
        assert looks_of(recipe, kv).dense_where_faster() is recipe


def test_ways_of_dense_attention_are_proved_on_outliers_before_it_is_timed_against_sparse(measured, monkeypatch):
    def rounded_keys(q, k, v):
        scale = k.abs().amax((1, 3), keepdim=True) / 2047  # right within 1e-3 for normal numbers
        return sdpa(q, (k / scale).round() * scale, v)

    monkeypatch.setattr(look, "ONE_WAY", ())
    with machine.measuring():
        dense = FastestDense({"torch": sdpa, "rounded": rounded_keys})
        looks_of(recipe_of(context=text(0), **OPTIONS), dense=dense).dense_where_faster()
    assert [tried for tried in measured if tried[0] == WORK] == [(WORK, ["rounded"])] * 2
    states = [rows["rounded"].state for rows in profile.rows(torch.device("cpu")).values() if "rounded" in rows]
    assert states == ["quarantined"] * 2


def test_chunks_denoised_at_once_are_measured_together(measured):
    joint = {"attention": AttentionOptions(block=(16, 16), policy="rolling_forcing"), "latent_shape": (1, 16, 40, 8, 8)}
    recipe, seen = recipe_of(context=text(0), **OPTIONS | joint, sink_frames=3, sink_rope="follow"), []

    def run_layer(state, index):
        seen.append((index, state.chunk.frames, len(state.cache.slot_frames), state.cache.storage.dtype))

    looks_of(recipe, "int8").look(run_layer)
    looks_of(recipe, "int8").look(run_layer, rest=True)
    assert seen == [(0, 12, 21, torch.float32)]


def test_a_named_backend_is_kept(measured):
    recipe = recipe_of(context=text(0), **OPTIONS | {"attention": AttentionOptions("reference", (16, 16))})
    with machine.measuring():
        assert looks_of(recipe).dense_where_faster() is recipe
    assert not measured


def test_saved_run_keeps_its_dense_chunks(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "seconds_of", lambda run, device: 2e-3 if run.args[0] == "sparse" else 1e-3)
    with machine.measuring():
        recipe = looks_of(recipe_of(context=text(0), **OPTIONS)).dense_where_faster()
    saved = load_run_state(save_run_state(RunState(recipe, "a model"), tmp_path / "run.safetensors"))
    assert saved.recipe.growth == (0.0, 0.0, 0.0, 0.6)
    assert saved.lengthened(12).recipe.sparsity(3) == 0.6


def test_a_run_measures_before_its_first_chunk_and_after_its_last_and_is_the_same(dit, monkeypatch, measured):
    events = []

    def run(**options):
        def noise(chunk, draw, shape):
            events.append(f"chunk {chunk}")
            return torch.randn(shape, generator=torch.Generator().manual_seed(10 * chunk + draw))

        return video(roll(dit, text(0), noise=noise, **OPTIONS, **options))

    usual = torch.nn.functional.scaled_dot_product_attention

    def attention(q, k, v):
        def once_more():
            return usual(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        ways, shape = ("usual", "other"), (q.shape[1], k.shape[1])
        machine.choose("dense", shape, q.device, ways, lambda name: once_more(), incumbent="usual", tolerance=0.0)
        if machine.has_time():
            events.append("look")
        return once_more()

    before = torch.get_rng_state()
    looked = run(dense_attention=attention)
    assert torch.equal(torch.get_rng_state(), before)
    chunks = [event for event in events if event != "look"]
    assert events.index(chunks[0]) > 0
    assert "look" not in events[events.index(chunks[0]) : len(events) - events[::-1].index(chunks[-1])]
    assert events[-1] == "look"  # at the chunks that see less
    tried = len(measured)
    assert tried >= 2
    events.clear()
    assert torch.equal(run(dense_attention=attention), looked)
    assert len(measured) == tried
    assert "look" not in events  # a process looks once
    monkeypatch.setenv("LIGHTFORCING_PROFILE", "off")
    assert torch.equal(run(), looked)


def test_a_failing_look_is_a_warning_and_the_run_continues(dit, measured, monkeypatch, caplog):
    monkeypatch.setattr(look, "_choose_backend", lambda *_: 1 / 0)
    assert len(list(roll(dit, text(0), **OPTIONS))) == 3
    assert "chunk 2 is not measured (ZeroDivisionError" in caplog.text
    look._looked.clear()
    monkeypatch.setattr(look, "raise_if_fatal", lambda error: (_ for _ in ()).throw(fast_path.DeviceLost("gone")))
    with pytest.raises(fast_path.DeviceLost):
        list(roll(dit, text(0), **OPTIONS))


def test_cancelling_the_last_look_costs_no_chunk(dit, measured, monkeypatch, caplog):
    class Cancelled(BaseException):
        pass

    def cancelled(self, run_layer, *, rest=False):
        if rest:
            raise Cancelled

    monkeypatch.setattr(Looks, "look", cancelled)
    assert len(list(roll(dit, text(0), **OPTIONS))) == 3
    assert "measuring after the last chunk ended early: Cancelled" in caplog.text

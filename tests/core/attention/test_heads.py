"""Roles of heads and the rules that read by them, against brute force and numbers worked out by hand."""

import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.attention.policies import FrameBudget, View
from lightforcing.lightforcing_core.attention.policies.heads import DummyForcing, ForcingKV, lowest
from lightforcing.lightforcing_core.attention.roles import (
    DYNAMIC,
    FIRST,
    LAST,
    NEAR,
    STATIC,
    dummy_forcing_roles,
    forcing_kv_roles,
    group_masses,
    read_roles,
)
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape, KVOptions

from . import policies_by_hand as by_hand

BUDGET = FrameBudget()
LAYERS = [{"static_head": [1], "dynamic_head": [0, 2]}, {"static_head": [0, 1, 2], "dynamic_head": []}]


@pytest.mark.parametrize("form", [LAYERS, {"layers": LAYERS, "threshold": 0.8}])
def test_published_roles_are_read(form):
    assert read_roles(json.dumps(form)) == ((DYNAMIC, STATIC, DYNAMIC), (STATIC,) * 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no list of layers"),
        ("[3]", "layer 0 of the roles does not name"),
        ('[{"static_head": [0], "dynamic_head": [true]}]', "layer 0 of the roles"),
        ('[{"static_head": [0], "dynamic_head": [0]}]', "does not name each head from 0 on once"),
        ('[{"static_head": [0], "dynamic_head": [2]}]', "does not name each head from 0 on once"),
        ('[{"static_head": [0], "dynamic_head": []}, {"static_head": [0], "dynamic_head": [1]}]', "equally many heads"),
        ("[" * 200 + "]" * 200, "nested deeper"),
    ],
)
def test_other_roles_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_roles(text)


def test_masses_of_the_worked_example():
    keys = torch.tensor([0.2, 0.5, -0.1, 1.0, 0.3, 0.0]).view(6, 1, 1)
    masses = group_masses(torch.ones(1, 1, 1), keys, [1, 2, 3])
    torch.testing.assert_close(masses, torch.tensor([[0.138119, 0.288763, 0.573118]]), rtol=0, atol=1e-6)


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_masses_equal_a_plain_softmax(sizes, seed):
    assume(sum(sizes))
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, 2, 4, generator=generator) for n in (7, sum(sizes)))
    masses, ids = group_masses(q, k, sizes, rows=4), iter(range(sum(sizes)))
    groups = [[next(ids) for _ in range(size)] for size in sizes]
    for head in range(2):
        want = by_hand.masses(q[::2, head].tolist(), k[:, head].tolist(), groups)
        assert masses[head].tolist() == pytest.approx(want, abs=1e-5)


def test_roles_of_the_worked_masses():
    masses = torch.tensor([0.30, 0.05, 0.05, 0.02, 0.03, 0.05, 0.10, 0.15, 0.25]).view(1, 1, 9)
    assert forcing_kv_roles(masses) == ((DYNAMIC,),)  # .785714
    assert forcing_kv_roles(masses, sinks=3) == ((STATIC,),)  # .916667
    first, near = torch.tensor([[[0.40, 0.10, 0.02], [0.05, 0.30, 0.01]], [[0.10, 0.30, 0.03], [0.45, 0.05, 0.02]]])
    masses = torch.stack([first, near, 1 - first - near], -1)
    assert dummy_forcing_roles(masses, 2) == ((FIRST, NEAR, LAST), (NEAR, FIRST, LAST))
    assert dummy_forcing_roles(masses, 3) == ((FIRST, LAST, LAST), (NEAR, FIRST, LAST))


def test_the_segments_that_are_least_alike_are_kept():
    rows = [0.99, 0.95, 0.80, 0.97, 0.60, 0.98, 0.90, 0.96, 0.70, 0.99, 0.65, 0.97, 0.98, 0.85, 0.75, 0.93, 0.62, 0.99]
    assert lowest(torch.tensor(rows), 6).tolist() == [2, 4, 8, 10, 14, 16]
    assert [ForcingKV(share=share).segments for share in (0.2, 0.25, 0.3, 0.33, 0.5)] == [4, 4, 5, 6, 9]


def ring(tokens, roles, changed=None, frames=(0, *range(11, 18)), current=3, block=64):
    layout = FrameBlocks(tokens, block)
    view = View(frames, current, layout, layout, 1, len(roles[0]), roles=roles)
    return view._replace(changed=None if changed is None else torch.tensor(changed))


def test_lists_of_the_worked_ring():
    roles = ((DYNAMIC, STATIC), (DYNAMIC, STATIC))
    plan = ForcingKV().plan(ring(1536, roles, [2, 4, 8, 10, 14, 16]), 0.5, BUDGET)
    (dynamic, static), counts = plan.of_layer(1).blocks[0, :, 0].tolist(), plan.of_layer(1).counts[0, :, 0].tolist()
    assert static[:120] == [*range(24), *range(96, 192)]
    first_of_runs = 32, 40, 56, 64, 80, 88
    assert dynamic == sorted({*static[:120], *(first + at for first in first_of_runs for at in range(4))})
    assert (counts, plan.kept) == ([144, 120], 144)
    assert plan.of_layer(0).counts.unique().tolist() == [120]
    assert plan.density == (0.625 * 3 + 0.75) / 4
    runs = [ForcingKV().plan(ring(1560, roles, [place]), 0.5, BUDGET).of_layer(1).counts[0, 0, 0] for place in range(6)]
    assert [int(run) - 5 * 25 for run in runs] == [5, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("estimator", ["mean", "lse"])
def test_dynamic_heads_choose_blocks_by_their_scores(estimator):
    roles = ((DYNAMIC, STATIC), (DYNAMIC, STATIC))
    plan = ForcingKV(blocks=0.5).plan(ring(1536, roles), 0.5, BUDGET)
    assert plan.of_layer(0).counts.unique().tolist() == [120]  # layer 0 has static heads only
    assert (plan.kept, plan.density) == (120, (0.625 * 3 + 0.5) / 4)
    generator = torch.Generator().manual_seed(0)
    q, k, subs = (torch.randn(1, blocks, 2, 16, generator=generator) for blocks in (72, 192, 768))
    blocks, counts = plan.of_layer(1).select(q, k, torch.empty(1, 8, 2, 16), subs if estimator == "lse" else None)
    assert counts.unique().tolist() == [96, 120]
    assert (blocks[0, 1, :, :120] == torch.tensor([*range(24), *range(96, 192)])).all()
    for row, query in enumerate(q[0, :, 0].double()):
        scores = k[0, :, 0].double() @ query
        if estimator == "lse":
            parts = subs[0, :, 0].double() @ query / 4
            scores = parts.unflatten(0, (192, 4)).exp().sum(1)
        assert set(blocks[0, 0, row, :96].tolist()) == set(scores.argsort(descending=True)[:96].tolist())


@st.composite
def rings(draw, kinds):
    """A full ring in any order of slots, ragged blocks or not, roles of any kind, segments of any number."""
    own = draw(st.integers(1, 3))
    start = draw(st.integers(6, 20))
    frames = draw(st.permutations([0, *range(start - 4, start + own)]))
    layouts = [FrameBlocks(draw(st.shared(st.integers(1, 130), key="tokens")), 16) for _ in "qk"]
    roles = tuple(tuple(draw(st.lists(st.integers(0, kinds - 1), min_size=2, max_size=2))) for _ in range(3))
    changed = draw(st.none() | st.lists(st.integers(0, 17), min_size=6, max_size=6, unique=True).map(sorted))
    view = View(frames, own, *layouts, draw(st.integers(1, 2)), 2, roles=roles)
    return view._replace(changed=None if changed is None else torch.tensor(changed))


def check_lists(plan, view, by_role):
    """Every list against the one by hand, whose frames are in the order of time."""
    per_frame, most = view.k_layout.per_frame, 0
    for layer in range(len(view.roles)):
        selection = plan.of_layer(layer)
        assert selection.blocks.shape == (view.batch, view.heads, view.q_blocks, plan.kept)
        for head in range(view.heads):
            want = by_role(layer, view.roles[layer][head])
            want = sorted(view.in_time[block // per_frame] * per_frame + block % per_frame for block in want)
            assert (selection.counts[:, head] == len(want)).all()
            assert (selection.blocks[:, head, :, : len(want)] == torch.tensor(want)).all()
            most = max(most, len(want))
    assert most <= plan.kept <= view.k_blocks


@given(view=rings(2))
def test_forcing_kv_equals_brute_force(view):
    changed = [] if view.changed is None else [divmod(number, 6) for number in view.changed.tolist()]
    sizes = len(view.slot_frames), view.current
    check_lists(
        ForcingKV().plan(view, 0.5, BUDGET),
        view,
        lambda layer, role: by_hand.forcing_kv(*sizes, layer and role, changed, view.k_layout.per_frame),
    )


@given(view=rings(3), near=st.integers(1, 4))
def test_dummy_forcing_equals_brute_force(view, near):
    rule, sizes = DummyForcing(near=near), (len(view.slot_frames), view.current)
    plan, per_frame = rule.plan(view, 0.5, BUDGET), view.k_layout.per_frame
    check_lists(plan, view, lambda _, role: by_hand.dummy_forcing(*sizes, rule.names[role], near, per_frame))
    counts = torch.stack([plan.of_layer(layer).counts.float() for layer in range(3)])
    assert plan.density == pytest.approx(counts.mean().item() / view.k_blocks)


@given(tokens=st.integers(81, 130), frames=st.integers(4, 6), seed=st.integers(0, 99))
def test_changed_segments_equal_brute_force(tokens, frames, seed):
    keys = torch.randn(frames * tokens, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = ForcingKV().changed(
        lambda layer: keys, FrameBlocks(tokens, 16), ((STATIC,) * 3, (DYNAMIC, STATIC, DYNAMIC))
    )
    want = by_hand.changed(keys.unflatten(0, (frames, -1))[-4:].tolist(), (0, 2), tokens, 16, 6)
    assert found.tolist() == want


def test_nothing_has_changed_in_fewer_than_four_frames_or_in_segments_without_blocks():
    keys, layout = torch.randn(96, 2, 4), FrameBlocks(24, 16)
    roles = ((DYNAMIC,) * 2,) * 2
    assert ForcingKV().changed(lambda layer: keys, layout, roles).tolist() == [0, 1, 6, 7, 12, 13]
    assert ForcingKV().changed(lambda layer: keys[:72], layout, roles) is None


def test_changes_are_those_of_the_first_layer_behind_layer_0_that_has_dynamic_heads():
    static, mixed, layers = (STATIC, STATIC), (STATIC, DYNAMIC), []

    def changed(roles, rule):
        layers.clear()
        return rule.changed(lambda layer: layers.append(layer) or torch.randn(96, 2, 4), FrameBlocks(24, 16), roles)

    assert (changed((mixed, mixed, mixed), ForcingKV()) is not None, layers) == (True, [1])
    assert (changed((mixed, static, mixed), ForcingKV()) is not None, layers) == (True, [2])
    assert (changed((mixed, static), ForcingKV()), layers) == (None, [])
    assert (changed((mixed, mixed), ForcingKV(share=0.0)), layers) == (None, [])
    assert (changed((mixed, mixed), DummyForcing()), layers) == (None, [])


@pytest.mark.parametrize("dtype", ["same", "int8", "fp8"])
def test_keys_of_a_ring_that_moved_come_in_the_order_of_time(dtype):
    cache = KVCache(CacheShape(1, 2, 4, (4, 6), 2, 64, block_k=16, sink_frames=1), KVOptions(dtype))
    keys = torch.randn(2, 8 * 24, 2, 64)
    for part in (*keys[:, : 4 * 24].split(48, dim=1), *keys[:, 4 * 24 :].split(24, dim=1)):
        cache.open(part.shape[1] // 24)
        cache.store(0, part, part)
        cache.commit()
    want = torch.cat([keys[0, :24], keys[0, 5 * 24 :]])
    assert cache.slot_frames != sorted(cache.slot_frames)
    torch.testing.assert_close(cache.keys_in_time(0), want, rtol=0, atol={"same": 0, "int8": 0.05, "fp8": 0.3}[dtype])


@pytest.mark.parametrize(
    ("rule", "view", "reason"),
    [
        (ForcingKV(), ring(96, ((),)), "the roles of its heads are not known yet"),
        (ForcingKV(), ring(96, ((0,),), frames=range(10, 17)), "its window holds 4 past frames"),
        (ForcingKV(), ring(96, ((0,),), frames=range(6)), ""),
        (ForcingKV(), ring(96, ((0,),)), ""),
        (DummyForcing(), ring(96, ((0,),), frames=range(6)), "roles decide only after 6 frames"),
        (DummyForcing(), ring(96, ((0,),), frames=range(9, 15)), "its window holds 3 past frames"),
        (DummyForcing(), ring(96, ((0,),)), ""),
        (DummyForcing(split=18), ring(96, ((0,),)), "roles decide only after 18 frames"),
    ],
)
def test_everything_visible_is_read_for_a_reason(rule, view, reason):
    view = view._replace(roles=()) if view.roles == ((),) else view
    assert (rule.why_all(view) or "").partition(", fewer")[0] == reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "topk", "roles": ((0,),)}, "attention policy 'topk' does not read by roles"),
        ({"policy": "forcing_kv", "roles": ((0, 2),)}, "0 for static, 1 for dynamic"),
        ({"policy": "dummy_forcing", "roles": ((0, 1), (0,))}, "as many numbers in each layer"),
        ({"policy": "dummy_forcing", "settings": (("near", 0),)}, "near 0 reads no near frame"),
        ({"policy": "dummy_forcing", "settings": (("dummies", 2.0),)}, r"dummies 2.0 is outside \[0, 1\]"),
        ({"policy": "forcing_kv", "settings": (("share", -0.1),)}, "share -0.1 is outside"),
        ({"policy": "forcing_kv", "settings": (("blocks", 1.1),)}, "blocks 1.1 is outside"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)


def test_roles_survive_a_saved_run():
    options = AttentionOptions(policy="dummy_forcing", roles=((0, 1), (2, 0)), settings=(("near", 6),))
    assert AttentionOptions.from_saved(json.loads(json.dumps(options.to_saved()))) == options
    assert options.head_rule.described(options.roles) == "first 2, near 1, last 1"

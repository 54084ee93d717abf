import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightforcing.lightforcing_core.model import rope
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape, KVOptions
from lightforcing.lightforcing_core.model.rope import RopeTable, axis_dims

TOKENS, HEADS, DIM = 5, 2, 12


def make_cache(slots, sinks=0, **options):
    shape = {"layers": 2, "batch": 2, "grid": (1, TOKENS), "heads": HEADS, "head_dim": DIM, "block_k": 2}
    return KVCache(CacheShape(slots=slots, sink_frames=sinks, **{**shape, **options}))


def stored(cache, frames, pass_index):
    """Random keys of one pass, after they are stored: {(layer, frame): [2, TOKENS, HEADS, DIM]}."""
    generator, keys = torch.Generator().manual_seed(pass_index), {}
    for layer in range(2):
        k = torch.randn(2, len(frames) * TOKENS, HEADS, DIM, generator=generator)
        cache.store(layer, k, -k)
        keys |= {(layer, frame): part for frame, part in zip(frames, k.split(TOKENS, dim=1), strict=True)}
    return keys


@st.composite
def runs(draw):
    sinks = draw(st.integers(0, 3))
    longest = draw(st.integers(1, 4))
    slots = sinks + longest + draw(st.integers(0, 6))
    chunks = draw(st.lists(st.integers(1, longest), min_size=1, max_size=12))
    return sinks, slots, chunks


@given(run=runs(), sink_rope=st.sampled_from(["fixed", "follow"]), switches=st.sets(st.integers(1, 11), max_size=3))
def test_visible_frames_are_sinks_and_the_newest_and_pooling_equals_repooling(run, sink_rope, switches):
    sinks, slots, chunks = run
    cache = make_cache(slots, sinks, sink_rope=sink_rope)
    cache_keys, written = {}, 0
    for index, length in enumerate(chunks):
        if index in switches:  # a hard prompt switch: all that is visible is stored anew
            before = sorted(cache.slot_frames)
            cache.reopen()
            again = cache.current_frames
            if again:
                cache_keys |= stored(cache, again, 1000 + index)
            cache.commit()
            assert sorted(cache.slot_frames) == before
            is_whole = before == list(range(written))
            assert again == [frame for frame in before if frame >= sinks or is_whole]
        cache.open(length)
        frames = list(range(written, written + length))
        for repeat in range(2):  # a later pass overwrites the earlier one
            cache_keys |= stored(cache, frames, 2 * index + repeat)
        cache.commit()
        written += length

        # The rule, stated on its own: the first frames, then as many of the newest as still fit.
        visible_sinks = range(min(sinks, written))
        newest = range(max(len(visible_sinks), written - (slots - len(visible_sinks))), written)
        assert sorted(cache.slot_frames) == [*visible_sinks, *newest]
        assert cache.current_frames == frames
        for layer in range(2):
            memory = cache.visible(layer)
            k, v = memory.keys, memory.values
            for slot, frame in enumerate(cache.slot_frames):
                rows = slice(slot * TOKENS, (slot + 1) * TOKENS)
                torch.testing.assert_close(v[:, rows], -cache_keys[layer, frame], rtol=0, atol=0)
                if sink_rope == "fixed" or frame >= sinks:
                    torch.testing.assert_close(k[:, rows], cache_keys[layer, frame], rtol=0, atol=0)
            torch.testing.assert_close(memory.key_means, cache.layout.block_means(k), rtol=0, atol=0)
            repooled = cache.layout.frame_means(cache.layout.block_means(k))
            torch.testing.assert_close(memory.frame_means, repooled, rtol=0, atol=0)


def test_frames_before_a_skip_are_forgotten_but_the_sinks():
    cache = make_cache(8, 1)
    cache.open(3)
    cache.commit()
    cache.skip(6)
    assert cache.slot_frames == [0]
    cache.open(3)
    assert sorted(cache.slot_frames) == [0, 9, 10, 11]
    cache.commit()
    cache.open(3)
    assert sorted(cache.slot_frames) == [0, 9, 10, 11, 12, 13, 14]


def test_pinned_frames_stay_until_others_are_pinned_and_jumps_move_what_follows():
    """The trace of chunks in LongLive 2.0's cache of four, with cuts at 2 and 6."""
    cache, seen, positions = make_cache(4, 1), [], []
    for index in range(9):
        if index in (2, 6):
            cache.jump(8)
        cache.open(1)
        seen.append(sorted(cache.slot_frames))
        positions += cache.positions
        cache.commit()
        if index in (2, 6):
            cache.pin(8)
    late = [[0, 1, 2, 3], [0, 2, 3, 4], [0, 2, 4, 5], [0, 2, 5, 6], [0, 5, 6, 7], [0, 6, 7, 8]]
    assert seen == [[0], [0, 1], [0, 1, 2], *late]
    assert positions == [0, 1, 10, 11, 12, 13, 22, 23, 24]
    cache.reopen()
    assert (cache.current_frames, cache.positions) == ([7, 8], [23, 24])

    whole = make_cache(6)
    for jump in (0, 42):
        whole.jump(jump)
        whole.open(3)
        whole.commit()
    whole.reopen()
    assert whole.positions == [0, 1, 2, 45, 46, 47]


@pytest.mark.parametrize(("dtype", "error"), [("same", 1e-6), ("int8", 0.02)])
def test_sinks_take_a_thousandth_of_what_leaves(dtype, error):
    """In chunks of two, by keys that are roped anew at the place directly before the window."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 2, TOKENS, HEADS, DIM, generator=generator, dtype=torch.float64)  # k and v of each frame
    shape = CacheShape(2, 2, 6, (1, TOKENS), HEADS, DIM, 2, sink_frames=2, sink_rope="average", dtype=torch.float64)
    cache = KVCache(shape, KVOptions(dtype))

    def roped(k, place):
        return RopeTable([place], 1, TOKENS, DIM, dtype=torch.float64).rotate(k)

    sinks = x[:, :2].clone()
    for start in range(0, 12, 2):
        if start >= 6:
            sinks = 0.999 * sinks + 0.001 * x[:, start - 4 : start - 2]
        cache.open(2)
        k = torch.cat([roped(x[:, frame, 0], frame) for frame in (start, start + 1)], dim=1)
        for layer in range(2):
            cache.store(layer, k, x[:, start : start + 2, 1].flatten(1, 2))
        cache.commit()
        before_window = max(0, start - 4)
        for layer in range(2):
            for sink in range(2):
                k, v = cache._stored(cache.visible(layer), cache.slot_frames.index(sink))
                torch.testing.assert_close(
                    k.double(), roped(sinks[:, sink, 0], before_window + sink), rtol=0, atol=error
                )
                torch.testing.assert_close(v.double(), sinks[:, sink, 1], rtol=0, atol=error)


@pytest.mark.parametrize(("rope", "moved", "distance"), [("average", 0.61, 0.0082), ("average_float32", 1.0, 0.0952)])
def test_most_of_an_average_is_lost_in_bfloat16(rope, moved, distance):
    """After 100 chunks of unit normal values have left, as counted of the released code and of exact averages."""
    shape = CacheShape(1, 1, 2, (10, 20), 4, 16, sink_frames=1, sink_rope=rope, dtype=torch.bfloat16)
    cache, generator = KVCache(shape), torch.Generator().manual_seed(0)
    for _ in range(102):
        cache.open(1)
        values = torch.randn(1, 200, 4, 16, generator=generator).bfloat16()
        cache.store(0, values, values)
        cache.commit()
        first = values if cache.current_frames == [0] else first  # noqa: F821
    change = cache.storage.originals[0][1][0].float() - first.float()
    assert float((change != 0).float().mean()) == pytest.approx(moved, abs=0.02)
    assert float(change.square().mean().sqrt()) == pytest.approx(distance, rel=0.05)


def test_sinks_cannot_be_skipped():
    with pytest.raises(ValueError, match="frame 0 is one of the first 2"):
        make_cache(8, 2).skip(3)


def test_rotation_in_time_shifts_only_the_frame_index():
    k = torch.randn(1, 12, 2, 128, dtype=torch.float64)
    moved = RopeTable([7], 1, 1, 128, dtype=torch.float64, device=k.device).rotate(
        RopeTable([2], 3, 4, 128, dtype=torch.float64).rotate(k)
    )
    torch.testing.assert_close(moved, RopeTable([9], 3, 4, 128, dtype=torch.float64).rotate(k))


def test_rope_splits_a_head_as_wan_does_and_has_no_last_frame():
    assert axis_dims(128) == (44, 42, 42)
    table = RopeTable([5000], 1, 1, 128, dtype=torch.float64)
    expected = torch.tensor([5000 / 10000 ** (2 * j / 44) for j in range(22)], dtype=torch.float64).cos()
    torch.testing.assert_close(table.cos[0, 0, 0, :22], expected)
    assert (table.cos[0, 0, 0, 22:] == 1).all()


def test_rope_needs_no_float64_on_a_device_without_it(monkeypatch):
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert not (isinstance(out, torch.Tensor) and out.is_meta and out.dtype == torch.float64)
            return out

    arguments = {"order": torch.arange(11, -1, -1), "device": "meta"}
    with Refuse():
        with pytest.raises(AssertionError):
            RopeTable([2], 3, 4, 128, **arguments)
        monkeypatch.setattr(rope, "WITHOUT_FLOAT64", ("meta",))
        assert RopeTable([2], 3, 4, 128, **arguments).cos.device.type == "meta"


def test_a_chunk_must_be_committed_before_the_next_opens():
    cache = make_cache(6)
    cache.open(3)
    with pytest.raises(RuntimeError, match="not committed"):
        cache.open(3)

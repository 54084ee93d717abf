"""Where keys and values are kept: eight bits against sixteen, CPU memory against the device."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.options import Pools
from lightforcing.lightforcing_core.attention.quantised import STORED, dequantise_blocks, quantise_blocks
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape, KVOptions
from lightforcing.lightforcing_core.pinned import CpuMemory, bytes_of

LAYOUT = FrameBlocks(tokens_per_frame=10, block=4)
LAYERS, BATCH, HEADS, DIM = 3, 2, 2, 12


def make_cache(options, slots=6, layers=LAYERS, **more):
    shape = {"layers": layers, "batch": BATCH, "grid": (2, 5), "heads": HEADS, "head_dim": DIM, "block_k": 4}
    return KVCache(CacheShape(slots=slots, **{**shape, **more}), options)


def draw(frames, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, frames * 10, HEADS, DIM, generator=generator)


def fill(cache, chunks, seed=0):
    """Run chunks of 2 frames through every layer in order, two passes each, as forwards do; all that was read."""
    read = []
    for chunk in range(chunks):
        cache.open(2)
        for step in range(2):
            for layer in range(cache.shape.layers):
                number = 100 * (100 * (100 * seed + chunk) + step) + layer
                cache.store(layer, draw(2, number), draw(2, number + 50))
                memory = cache.visible(layer)
                read.append([x.clone() for x in (*memory.stored, memory.key_means)])
        cache.commit()
    return read


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_eight_bits_err_by_at_most_half_a_step_of_the_blocks_largest(dtype, magnitude):
    x = magnitude * draw(3, 1)
    x[:, 4:8] = 0  # a block of zeros comes back as zeros
    stored, scales = quantise_blocks(x, LAYOUT, STORED[dtype])
    assert stored.dtype is STORED[dtype]
    assert scales.shape == (BATCH, 3 * LAYOUT.per_frame, HEADS)
    error = (dequantise_blocks(stored, scales, LAYOUT, torch.float32) - x).abs()
    blocks = LAYOUT.block_of_token(3)
    for block in range(3 * LAYOUT.per_frame):
        inside = x[:, blocks == block].abs()
        largest = inside.amax((1, 3), keepdim=True)
        # int8 steps are even; an e4m3 number has 3 bits of mantissa, and below 2^-6 even steps of 2^-9.
        bound = largest / 254 if dtype == "int8" else torch.maximum(inside / 16, largest / 448 * 2**-10)
        assert (error[:, blocks == block] <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", ["same", "int8", "fp8"])
@pytest.mark.parametrize("host", [False, True])
def test_bytes_equal_the_stated_formula(dtype, host):
    cache = make_cache(KVOptions(dtype, host), pools=Pools(), dtype=torch.bfloat16)
    rows = 10 * DIM * 2 if dtype == "same" else 10 * DIM + 3 * 4  # 3 blocks with a scale of 4 bytes
    whole = 2 * LAYERS * BATCH * 6 * HEADS * rows
    mean = 0 if dtype == "same" else LAYERS * BATCH * HEADS * DIM * 4
    assert cache.storage.host_bytes == (whole if host else 0)
    assert cache.nbytes == (whole * 2 // LAYERS if host else whole) + mean


@pytest.mark.parametrize("sink_rope", ["fixed", "follow"])
@pytest.mark.parametrize("dtype", ["same", "int8"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_host_memory_changes_no_bit(sink_rope, dtype, layers):
    near, far = (
        fill(make_cache(KVOptions(dtype, host), layers=layers, sink_frames=1, sink_rope=sink_rope), 7)
        for host in (False, True)
    )
    for a, b in zip(near, far, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@given(chunks=st.lists(st.integers(1, 3), min_size=1, max_size=8), dtype=st.sampled_from(["int8", "fp8"]))
def test_eight_bit_cache_holds_each_visible_frame_as_it_would_be_quantised_alone(chunks, dtype):
    """Of keys less the mean of the first chunk's, but in the first dims."""
    cache = make_cache(KVOptions(dtype), slots=5, sink_frames=1)
    frames, made = {}, 0
    for number, length in enumerate(chunks):
        cache.open(length)
        k = draw(length, number) + torch.arange(DIM)
        if not made:
            mean = k.mean(1, keepdim=True) * (torch.arange(DIM) >= 3)
        for i in range(length):
            frames[made + i] = k[:, i * 10 : (i + 1) * 10]
        for layer in range(LAYERS):
            cache.store(layer, k, -k)
        cache.commit()
        made += length
        for slot, frame in enumerate(cache.slot_frames):
            k_read, v_read, k_scales, v_scales, *_ = cache.visible(LAYERS - 1)
            rows, blocks = slice(slot * 10, (slot + 1) * 10), slice(slot * 3, (slot + 1) * 3)
            for x, read, read_scales in ((frames[frame] - mean, k_read, k_scales), (-frames[frame], v_read, v_scales)):
                stored, scales = quantise_blocks(x, LAYOUT, STORED[dtype])
                assert (read[:, rows].float() == stored.float()).all()
                assert (read_scales[:, blocks] == scales).all()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_moved_sinks_are_quantised_from_their_first_values(dtype):
    plain, small = (make_cache(KVOptions(kind), sink_frames=1, sink_rope="follow", slots=4) for kind in ("same", dtype))
    for cache in (plain, small):
        fill(cache, 5)
    assert 0 not in plain.current_frames
    moved = plain.visible(1).keys[:, :10] - small.visible(1).key_mean[:, None]
    stored, scales = quantise_blocks(moved, LAYOUT, STORED[dtype])
    assert (small.visible(1).keys[:, :10].float() == stored.float()).all()
    assert (small.visible(1).key_scales[:, :3] == scales).all()
    torch.testing.assert_close(small.visible(1).key_means, plain.visible(1).key_means, rtol=0, atol=0)


class Copies(TorchDispatchMode):
    """Every copy into a tensor, as (target, source) are contiguous."""

    def __init__(self):
        super().__init__()
        self.contiguous = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.contiguous.append((args[0].is_contiguous(), args[1].is_contiguous()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["same", "int8"])
def test_what_the_bus_carries_is_contiguous_on_both_sides(dtype):
    """Anything else goes through memory that is not pinned, and the CPU waits for it."""
    cache = make_cache(KVOptions(dtype, host=True))
    fill(cache, 2)
    assert cache.storage.visible < cache.shape.slots  # so that a batch's slots do not lie side by side
    with Copies() as copies:
        cache.storage.at(2), cache.storage.at(0), cache.storage.at(1)
        cache.storage.written(1, [(1, 2), (0, 1)])
    assert len(copies.contiguous) > 8
    assert all(a and b for a, b in copies.contiguous)


class Driver:
    """As much of the CUDA runtime as pinning asks for; `status` is what registering answers."""

    def __init__(self, status=0):
        self.status, self.pinned, self.calls = status, {}, []

    def cudaHostRegister(self, address, nbytes, flags):
        self.calls.append("register")
        if self.status == 0:
            self.pinned[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address):
        self.calls.append("unregister")
        del self.pinned[address]
        return 0


def test_cpu_memory_is_one_pinned_buffer_that_free_returns(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    shapes = [((2, 3, 5), torch.float16), ((2, 7), torch.int8), ((4,), torch.float32)]
    memory = CpuMemory(bytes_of(shapes), torch.device("cpu"), wait=lambda: driver.calls.append("wait"))
    assert list(driver.pinned.values()) == [bytes_of(shapes)]
    tensors = [memory.take(*shape) for shape in shapes]
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tensor.shape, tensor.dtype, tensor.data_ptr() % 16) == (shape, dtype, 0)
        tensor.fill_(number + 1)
    assert [tensor.unique().tolist() for tensor in tensors] == [[1], [2], [3]]  # none lies over another
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        memory.take((257,), torch.int8)
    memory.free()
    memory.free()
    assert driver.calls == ["register", "wait", "unregister"]


def test_cpu_memory_that_is_dropped_is_unpinned_too(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    memory = CpuMemory(1024, torch.device("cpu"))
    assert memory.pinned
    del memory
    gc.collect()
    assert driver.pinned == {}


def test_cpu_memory_that_cannot_be_pinned_warns(monkeypatch, caplog):
    driver = Driver(status=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    memory = CpuMemory(1024, torch.device("cpu"))
    assert not memory.pinned
    assert "cannot be pinned (CUDA error 2)" in caplog.text
    memory.take((1024,), torch.int8).zero_()
    memory.free()
    assert driver.calls == ["register"]


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="'int4' is not known; use one of same, int8, fp8"):
        KVOptions("int4")

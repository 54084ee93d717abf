"""The fused store against the steps it replaces: rms_norm, RopeTable, FrameBlocks and quantise_blocks of the core."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from lightforcing.kernels import block_sparse, device, store
from lightforcing.kernels.store import LayerMemory, fused_store, why_not
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.quantised import quantise_blocks
from lightforcing.lightforcing_core.model.rope import RopeTable

from ..support.attention_problems import DEVICE

EPS = 1e-6


class Case:
    """Random projections and norm weights of one layer, and a poisoned ring for them."""

    def __init__(self, dtype=torch.float32, batch=1, grid=(2, 4, 10), heads=2, head_dim=32, block=(32, 16), seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.frames, self.tokens, self.slot_count = grid[0], grid[1] * grid[2], grid[0] + 3
        self.batch, self.heads, self.head_dim, self.block, self.dtype = batch, heads, head_dim, block, dtype
        self.slots = torch.randperm(self.slot_count, generator=generator)[: self.frames].int().to(DEVICE)
        shape = (batch, self.frames * self.tokens, heads * head_dim)

        def random(*shape, spread=1.0, centre=0.0):
            return (centre + spread * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)

        self.q, self.k, self.v = (random(*shape, spread=spread) for spread in (1.0, 3.0, 0.5))
        self.q_weight, self.k_weight = (random(shape[-1], spread=0.1, centre=1.0) for _ in range(2))
        self.rope = RopeTable(range(11, 11 + grid[0]), *grid[1:], head_dim, device=DEVICE)
        self.layout, self.parts = FrameBlocks(self.tokens, block[1]), FrameBlocks(self.tokens, block[1] // 4)

    def ring(self, dtype=None, pooled=True, rows=None):
        """A ring whose every byte is set, so that a value that should have been written shows, as does one too many."""
        dtype, per_frame = dtype or self.dtype, self.slot_count * self.layout.per_frame

        def poisoned(rows, *shape, dtype=self.dtype):
            size = (self.batch, rows, self.heads, *shape)
            return torch.full((*size[:-1], size[-1] * dtype.itemsize), 0x7F, dtype=torch.uint8).view(dtype).to(DEVICE)

        scales = [poisoned(per_frame, dtype=torch.float32) for _ in range(2)] if dtype != self.dtype else [None, None]
        return LayerMemory(
            *(poisoned(self.slot_count * (rows or self.tokens), self.head_dim, dtype=dtype) for _ in range(2)),
            *scales,
            key_means=poisoned(per_frame, self.head_dim) if pooled else None,
            frame_means=poisoned(self.slot_count, self.head_dim) if pooled else None,
            arrivals=torch.zeros(self.batch, self.slot_count, self.heads, dtype=torch.int32, device=DEVICE)
            if pooled
            else None,
            value_means=poisoned(per_frame, self.head_dim) if pooled else None,
            sub_means=poisoned(self.slot_count * self.parts.per_frame, self.head_dim) if pooled else None,
        )

    def run(self, target, with_q=True, **change):
        arguments = {
            "q": self.q if with_q else None,
            "k": self.k,
            "v": self.v,
            "q_weight": self.q_weight if with_q else None,
            "k_weight": self.k_weight,
            "eps": EPS,
            "cos": self.rope.cos,
            "sin": self.rope.sin,
            "ring": target,
            "slots": self.slots,
            "tokens_per_frame": self.tokens,
            "head_dim": self.head_dim,
            "block": self.block,
        }
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
        try:
            return fused_store(**(arguments | change))
        finally:
            torch.use_deterministic_algorithms(False)

    def unfused(self, x, weight, dtype=None):
        """The steps of the plain path, in `dtype`."""
        dtype = dtype or x.dtype
        normed = torch.nn.functional.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), EPS)
        rope = self.rope
        if dtype == torch.float64:
            rope = RopeTable.__new__(RopeTable)
            rope.cos, rope.sin = self.rope.cos.double(), self.rope.sin.double()
        return rope.rotate(normed.unflatten(-1, (self.heads, self.head_dim)))

    def current(self, tensor):
        """The rows of the current frames in time order, of a ring's tensor."""
        return tensor.unflatten(1, (self.slot_count, -1))[:, self.slots.long()].flatten(1, 2)

    def others(self, tensor):
        """The bytes of all rows that are not the current frames'."""
        idle = [slot for slot in range(self.slot_count) if slot not in self.slots.tolist()]
        return tensor.unflatten(1, (self.slot_count, -1))[:, idle].contiguous().view(torch.uint8)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """All heads in one program: the interpreter's time is programs."""
    monkeypatch.setattr(store, "PROGRAMS", 1)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same_bits(ring, other):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(ring, other, strict=True) if a is not None)


def assert_within_an_ulp(got, want, exact):
    """Of each rotated pair; almost always equal; and as close to float64 as the plain path."""
    ulp = torch.finfo(got.dtype).eps
    pair = want.double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*want.shape[:-1], -1, 2).flatten(-2)
    ulps = 8 if got.dtype == torch.float32 else 2  # float32 keeps every step's own rounding
    assert ((got.double() - want.double()).abs() <= ulps * ulp * pair).all()
    if got.dtype != torch.float32:
        assert (got != want).double().mean() <= 1e-3
    error, unfused = ((x.double() - exact).pow(2).mean().sqrt() for x in (got, want))
    assert error <= (1.2 if got.dtype == torch.float32 else 1.05) * unfused


CASES = [
    {"dtype": torch.bfloat16, "batch": 2, "grid": (2, 3, 7), "block": (32, 16)},
    {"dtype": torch.float16, "grid": (2, 3, 7), "block": (16, 16), "seed": 1},
    {"dtype": torch.float32, "batch": 2, "grid": (1, 3, 7), "seed": 2},
    {"dtype": torch.bfloat16, "grid": (3, 4, 8), "block": (16, 32), "head_dim": 128, "heads": 5, "seed": 3},
    {"dtype": torch.bfloat16, "grid": (1, 5, 13), "block": (64, 128), "head_dim": 64, "heads": 2, "seed": 4},
    {"dtype": torch.bfloat16, "grid": (1, 13, 41), "block": (128, 16), "head_dim": 16, "heads": 1, "seed": 5},
    {"dtype": torch.float32, "grid": (2, 1, 1), "block": (16, 16), "head_dim": 16, "heads": 2, "seed": 6},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_store_is_the_unfused_steps(case):
    case = Case(**case)
    ring = case.ring()
    idle = [case.others(tensor) for tensor in ring if tensor is not None]
    q, q_means = case.run(ring)

    assert_within_an_ulp(q, case.unfused(case.q, case.q_weight), case.unfused(case.q, case.q_weight, torch.float64))
    keys = case.current(ring.keys)
    assert_within_an_ulp(keys, case.unfused(case.k, case.k_weight), case.unfused(case.k, case.k_weight, torch.float64))
    values = case.v.unflatten(-1, (case.heads, case.head_dim))
    assert torch.equal(case.current(ring.values), values)

    # Means are of the values as stored, rounded as the plain path rounds them; only the order of sums is free.
    near = {"rtol": torch.finfo(case.dtype).eps, "atol": 1e-6}
    means = case.layout.block_means(keys)
    torch.testing.assert_close(q_means, FrameBlocks(case.tokens, case.block[0]).block_means(q), **near)
    torch.testing.assert_close(case.current(ring.key_means), means, **near)
    torch.testing.assert_close(case.current(ring.value_means), case.layout.block_means(values), **near)
    torch.testing.assert_close(case.current(ring.sub_means), case.parts.block_means(keys), **near)
    kept = case.current(ring.key_means)
    torch.testing.assert_close(case.current(ring.frame_means), case.layout.frame_means(kept), **near)

    assert all(map(torch.equal, idle, [case.others(tensor) for tensor in ring if tensor is not None]))
    assert not ring.arrivals.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bit_rings_hold_what_the_plain_path_quantises(stored, dtype):
    case = Case(dtype, batch=2, grid=(1, 4, 10), seed=7)
    case.v[:, : case.block[1], : case.head_dim] = 0  # a block of one head
    case.v[0, 20] *= 100  # an outlier costs its block only
    wide, ring = case.ring(), case.ring(stored)
    idle = [case.others(tensor) for tensor in ring if tensor is not None]
    mean = torch.randn(2, case.heads, case.head_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    case.run(wide)
    case.run(ring._replace(key_mean=mean))

    keys, values = case.current(wide.keys) - mean[:, None], case.current(wide.values)
    for x, kept, scales in ((keys, ring.keys, ring.key_scales), (values, ring.values, ring.value_scales)):
        kept, scales = case.current(kept), case.current(scales)
        want, want_scales = quantise_blocks(x, case.layout, stored)
        assert torch.equal(kept.float(), want.float())
        assert torch.equal(scales, want_scales)
    assert (case.current(ring.value_scales)[:, 0, 0] == 1).all()
    for name in ("key_means", "value_means", "frame_means", "sub_means"):
        assert torch.equal(bits(getattr(ring, name)), bits(getattr(wide, name)))  # from the unquantised keys
    assert all(map(torch.equal, idle, [case.others(tensor) for tensor in ring if tensor is not None]))


def test_splitting_the_heads_over_programs_changes_no_bit(monkeypatch):
    case = Case(torch.bfloat16, grid=(1, 4, 10), heads=3, head_dim=16, seed=8)
    results = []
    for programs in (1, 16, 10**6):  # three, two and one head a program, on 8 blocks of tokens
        monkeypatch.setattr(store, "PROGRAMS", programs)
        ring = case.ring()
        made = case.run(ring)
        results.append([bits(tensor) for tensor in (*made, *ring) if tensor is not None])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_keys_and_values_are_stored_as_ever_without_queries_or_means():
    case = Case(torch.bfloat16, grid=(1, 3, 7), seed=9)
    together, alone, bare = case.ring(), case.ring(), case.ring(pooled=False)
    case.run(together)
    case.run(bare)
    assert case.run(alone, with_q=False) is None
    assert same_bits(together, alone)
    assert same_bits(together[:2], bare[:2])


def test_steps_of_a_chunk_overwrite_each_other():
    case = Case(torch.bfloat16, grid=(2, 2, 9), block=(16, 16), head_dim=16, seed=13)
    ring, fresh = case.ring(), case.ring()
    case.run(ring)
    case.k, case.v = case.k * 0.5 + 1, -case.v
    want = case.run(fresh)
    assert all(map(torch.equal, case.run(ring), want))
    assert same_bits(ring, fresh)


def test_padded_frames_take_more_rows_and_no_other_bit():
    case = Case(block=(32, 32))
    padded, plain = case.ring(rows=64), case.ring()
    case.run(padded, rows_per_frame=64)
    case.run(plain)
    slots = [x.unflatten(1, (case.slot_count, -1)).contiguous().view(torch.uint8) for x in padded[:2]]
    for wide, narrow in zip(slots, plain[:2], strict=True):
        assert bool((wide[:, :, case.tokens :] == 0x7F).all())
        narrow = narrow.unflatten(1, (case.slot_count, -1)).contiguous().view(torch.uint8)
        assert torch.equal(wide[:, :, : case.tokens], narrow)
    assert same_bits(padded._replace(keys=plain.keys, values=plain.values), plain)


def test_parts_of_one_fused_projection_give_the_same():
    case = Case(torch.float32, batch=2, grid=(1, 3, 7), block=(32, 32), seed=11)
    packed, strided = case.ring(), case.ring()
    want = case.run(packed)
    case.q, case.k, case.v = torch.cat((case.q, case.k, case.v), -1).chunk(3, -1)
    assert all(map(torch.equal, case.run(strided), want))
    assert same_bits(packed, strided)


def test_slots_beyond_two_billion_values_are_reached():
    case = Case(torch.float16, grid=(1, 1, 16), heads=2, head_dim=128, block=(16, 16), seed=12)
    case.slot_count = 2**31 // (16 * 256) + 2  # memory that nobody touches costs nothing
    last = case.slot_count - 1
    shape = (1, case.slot_count * 16, 2, 128)
    keys, values = (torch.empty(shape, dtype=torch.int8, device=DEVICE) for _ in range(2))
    scales = [torch.empty(1, case.slot_count, 2, device=DEVICE) for _ in range(2)]
    slots = torch.tensor([last], dtype=torch.int32, device=DEVICE)
    case.run(LayerMemory(keys, values, *scales), with_q=False, slots=slots)
    want, want_scales = quantise_blocks(case.v.unflatten(-1, (2, 128)), case.layout, torch.int8)
    assert torch.equal(values[:, -16:], want)
    assert torch.equal(scales[1][:, last:], want_scales)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_frame": 33}, r"\(1, 80, 64\) is not \[B, frames · 33 tokens, heads · 32\]"),
        ({"v": torch.zeros(1, 40, 64)}, r"q, k and v must be .* \(1, 80, 64\) on .*, not .* \(1, 40, 64\)"),
        ({"k_weight": torch.zeros(63)}, "norm of k needs a contiguous weight of 64 values"),
        ({"q_weight": None}, "norm of q needs a contiguous weight of 64 values"),
    ],
)
def test_launcher_refuses_with_the_value(change, message):
    case = Case()
    change = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        case.run(case.ring(), **change)


@pytest.mark.parametrize(
    ("capability", "cache", "reason"),
    [
        ((7, 5), None, "sm_80 GPU or newer, this one is sm_75"),
        ((8, 6), torch.float8_e4m3fn, "float8_e4m3fn on sm_86; keep the cache in int8"),
        ((8, 6), torch.int8, None),
        ((8, 9), torch.float8_e4m3fn, None),
        ((9, 0), None, None),
    ],
)
def test_why_not_knows_what_chips_can(monkeypatch, capability, cache, reason):
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    x.shape = (1, 64, 1, 128)
    for got in (why_not(x, 128, (64, 64), cache), block_sparse.why_not(x, (64, 64), cache or x.dtype)):
        assert got is None if reason is None else reason in got
    assert "the tensors are on cpu" in why_not(torch.zeros(1, 8, 128), 128, (64, 64))
    assert "not as torch.float16" in why_not(x, 128, (64, 64), torch.float16)
    assert "head dims of 16, 32, 64, 128, not 48" in why_not(x, 48, (64, 64))
    assert "blocks of 16, 32, 64, 128 tokens, not (8, 16)" in why_not(x, 128, (8, 16))
    assert "blocks of 16, 32, 64, 128, 256 tokens, not (8, 16)" in block_sparse.why_not(x, (8, 16))
    assert "int8 or float8_e4m3fn, not torch.float16" in block_sparse.why_not(x, (64, 64), torch.float16)
    x.shape = (1, 64, 1, 256)
    assert "head dims up to 128, not 256" in block_sparse.why_not(x, (64, 64))

"""The block-sparse Triton kernel: its variants against float64, strides, memory it must not touch, refusals."""

import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from lightforcing.kernels import attend, block_sparse, tuning
from lightforcing.kernels.block_sparse import block_sparse_attention

from ..support.attention_problems import DEVICE, EIGHT_BIT, brute_force, spans
from .attention_cases import (
    CASES,
    HOW,
    Case,
    dense,
    every_query_block_reads,
    launched,
    poisoned,
)

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log2(0) is −inf, as it should be


@pytest.fixture
def poisoned_outputs():
    with poisoned():
        yield


@given(case=CASES, way=st.sampled_from(["lists", "tail", "dense"]), uneven=st.booleans(), how=HOW)
def test_every_variant_equals_brute_force(case, way, uneven, how):
    means, mask = case.means if way == "tail" else None, torch.ones_like(case.mask) if way == "dense" else None
    want = case.want(mask, means)
    with launched(**how), poisoned():
        got = case.attend_densely() if way == "dense" else case.attend(tail=means, uneven=uneven)
    case.check(got, want)


# Blocks of 128 that are walked in tiles of 64, of which a ragged block's second one may be nothing but padding.
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("tokens_per_frame", [128, 180])
def test_units_cut_into_parts_equal_brute_force(tokens_per_frame, with_tail, descriptors):
    case = Case(tokens_per_frame, (128, 128), 2, 1, 2, 1, 16, torch.float16, None, seed=tokens_per_frame)
    means = case.means if with_tail else None
    want = case.want(means=means)
    units = case.counts.numel() * (2 if with_tail else 1)  # beside a tail a tile has 64 rows
    for per_sm in (units - 1, 2 * units + 1):  # one unit into many parts; all units into two, none whole
        with launched(descriptors=descriptors, per_sm=per_sm) as calls:
            got = case.attend(tail=means)
        case.check(got, want)
        ((forward, programs, *_), (combine, *_)) = calls[0]
        assert (forward, combine) == (block_sparse.forward, block_sparse.combine)
        assert programs[0] > units


# One block listed and 6 parts: the tail's 3 tiles leave parts without a mean, or with listed blocks only. Of 16 blocks
# and 17 tiles of means in 17 parts the first part gets no block, and the tile of the listed ones.
@pytest.mark.parametrize(
    ("past", "listed", "parts", "with_tail"),
    [(5, [4], 6, False), (5, [4], 6, True), (5, [], 6, False), (271, list(range(16)), 17, True)],
)
def test_parts_that_find_no_key_change_nothing(past, listed, parts, with_tail):
    case = Case(16, (16, 16), 1, past, 1, 1, 32, torch.float32, None, seed=0)
    blocks, counts = every_query_block_reads(listed, 1, 1, 1, width=16)
    mask, means = torch.zeros_like(case.mask), case.means if with_tail else None
    mask[..., listed] = True
    want = case.want(mask, means)
    with launched(per_sm=parts), mock.patch.object(tuning, "cut", return_value=(0, parts)):
        got = case.attend(blocks, counts, tail=means)
    case.check(got, want)


@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("scale", [2.0, 0.0, -0.3])
def test_scores_are_scaled_by_any_number(scale, stored):
    case = Case(40, (16, 32), 1, 2, 1, 2, 16, torch.float32, stored, seed=7)
    want = brute_force(case.q * scale * 16**0.5, *case.exact, case.mask, 40, case.block, case.means)
    case.check(case.attend(scale=scale, tail=case.means), want)


NARROW = pytest.mark.parametrize(
    ("tokens_per_frame", "block", "dim", "dtype", "how"),
    [
        (70, (32, 64), 24, torch.float32, {"halves": True}),
        (70, (64, 64), 128, torch.bfloat16, {"halves": True, "per_sm": 3}),
        (130, (128, 32), 64, torch.float16, {"descriptors": True}),
        (64, (16, 128), 16, torch.bfloat16, {}),
    ],
)


@NARROW
@pytest.mark.parametrize("outlier", [0.0, 100.0])
def test_int8_scores_are_those_of_queries_rounded_by_row(tokens_per_frame, block, dim, dtype, how, outlier):
    """Of each query the largest number is exact, and others are off by half a step of its 127."""
    case = Case(tokens_per_frame, block, 1, 1, 1, 2, dim, dtype, torch.int8, seed=dim)
    case.q[..., 3] += outlier
    case.q[:, -1] = 0
    step = case.q.float().abs().amax(-1, keepdim=True) / 127
    want = case.want(q=(case.q.float() / step.clamp(min=1e-30)).round() * step)
    with launched(**how, narrow=True), poisoned():
        got = case.attend()
    assert (got.double() - want).abs().max() <= max(case.tolerance, 1e-4) * max(1.0, want.abs().max().item())


@NARROW
@pytest.mark.parametrize("with_tail", [False, True])
def test_weights_in_float8_are_off_by_half_a_step_each(tokens_per_frame, block, dim, dtype, how, with_tail):
    """Which is a sixteenth of a weight, or for the smallest half of a fixed step; blocks' scales differ by up to 8."""
    case = Case(tokens_per_frame, block, 1, 1, 1, 2, dim, dtype, torch.float8_e4m3fn, seed=dim)
    means = case.means if with_tail else None
    want = case.want(means=means)
    keys, values = case.exact
    case.exact = keys, values.abs()
    size = case.want(means=means and (means[0], means[1].abs()))
    with launched(**how, narrow=True), poisoned():
        got = case.attend(tail=means)
    error = (got.double() - want).abs()
    assert (error <= size / 16 + case.tolerance * max(1.0, want.abs().max().item()) + values.abs().max() * 2**-12).all()
    share = error.norm() / want.norm()
    assert share < 0.04
    assert with_tail or share > 1e-3


def after_steps(text, *words):
    """$0 and $1 after the steps of an inline assembly on the 32 bits of $2, and of $3."""
    registers = dict(zip(("$2", "$3"), words, strict=False))

    def number(name):
        return registers[name] if name in registers else int(name, 0)

    for step, arguments in re.findall(r"\b([a-z0-9.]+) ([^;{]+);", text.replace(".reg .b32 x, m, s, f;", "")):
        to, *names = arguments.split(", ")
        a, b, *more = *map(number, names), 0
        if step == "prmt.b32":
            some = (a | b << 32).to_bytes(8, "little")
            result = int.from_bytes(bytes(some[more[0] >> 4 * i & 7] for i in range(4)), "little")
        elif step == "fma.rn.bf16x2":
            a, b, c = (torch.tensor([x]).to(torch.uint32).view(torch.bfloat16).double() for x in (a, b, more[0]))
            result = (a * b + c).to(torch.bfloat16).view(torch.uint32).item()
        else:
            other = more[0] if more else 0
            result = {"mov": a, "and": a & b, "shl": a << b, "shr": a >> b, "lop3": a & b | other}[step.split(".")[0]]
        registers[to] = result & 0xFFFFFFFF
    return [torch.tensor([registers[name]]).to(torch.uint32) for name in ("$0", "$1")]


@pytest.mark.parametrize(
    ("text", "dtype", "order"),
    [
        (attend.INT8_PAIRS, torch.int8, (0, 2, 1, 3)),
        (attend.FLOAT8_PAIRS, torch.float8_e4m3fn, (0, 2, 1, 3)),
        (attend.FLOAT8_FOUR, torch.float8_e4m3fn, (0, 1, 2, 3)),
    ],
)
def test_machine_code_widens_every_8_bit_number_exactly(text, dtype, order):
    for first in range(0, 256, 2):
        some = [first, 255 - first, first + 1, first ^ 0x55]
        got = torch.cat(after_steps(text.value, int.from_bytes(bytes(some), "little"))).view(torch.bfloat16)
        want = torch.tensor([some[i] for i in order], dtype=torch.uint8).view(dtype).to(torch.bfloat16)
        is_number = ~want.isnan()  # a block with a NaN has NaN as its scale
        assert torch.equal(got[is_number], want[is_number])


def test_machine_code_parts_the_bytes_of_pairs():
    assert [x.item() for x in after_steps(attend.APART.value, 0x33221100, 0x77665544)] == [0x66442200, 0x77553311]


def test_longest_lists_are_begun_first():
    case = Case(40, (16, 32), 1, 2, 2, 2, 16, torch.float32, None, seed=4)
    with launched() as calls:
        case.attend(uneven=True)
        case.attend()
    order, none = (dict(zip(block_sparse.forward.arg_names, call[0][2], strict=False))["order_ptr"] for call in calls)
    begun = case.counts.flatten()[order.long()]
    assert (begun.diff() <= 0).all()
    assert begun[0] > begun[-1]
    assert none is None


@pytest.mark.parametrize("stored", [None, *EIGHT_BIT])
@pytest.mark.parametrize("tokens_per_frame", [32, 50])
def test_descriptors_never_read_beyond_a_listed_block_or_a_frame(tokens_per_frame, stored):
    """All other blocks are NaN, or nonsense in eight bits: the ragged end of a block is not the next block's start."""
    case = Case(tokens_per_frame, (32, 16), 1, 2, 1, 2, 32, torch.float32, stored, seed=3)
    last = len(spans(2, tokens_per_frame, 16)) - 1  # of the second frame
    blocks, counts = every_query_block_reads([0, last], 1, 2, case.counts.shape[-1])
    mask = torch.zeros_like(case.mask)
    mask[..., [0, last]] = True
    want = case.want(mask)
    for i, (start, end) in enumerate(spans(3, tokens_per_frame, 16)):
        if i not in (0, last):
            for x in case.stored:
                x[:, start:end] = 127 if stored == torch.int8 else torch.nan
    with launched(descriptors=True) as calls:
        got = case.attend(blocks, counts)
    assert calls[0][0][3]["DESCRIPTORS"]
    case.check(got, want)


@pytest.mark.parametrize(("dim", "offset", "fits"), [(16, 0, True), (16, 1, False), (12, 0, False)])
def test_tensors_that_tma_cannot_address_are_read_through_pointers(dim, offset, fits):
    memory = torch.randn(2, 32 * dim + 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    k, v = (x[offset : offset + 32 * dim].view(1, 32, 1, dim) for x in memory)
    q = torch.randn(1, 16, 1, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.float16)
    blocks, counts = every_query_block_reads([1], 1, 1, 1)
    with launched(descriptors=True) as calls:
        got = block_sparse_attention(q, k, v, blocks, counts, tokens_per_frame=16, block_q=16, block_k=16)
    assert calls[0][0][3]["DESCRIPTORS"] == fits
    assert (got.double() - dense(q, k, v, list(range(16, 32)))).abs().max() <= 4e-3


# Blocks that are cut into tiles of 64: ragged ends in the first and in the second tile, whole tiles of padding.
@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("tokens_per_frame", [128, 130, 180, 250])
@pytest.mark.parametrize(
    ("stored", "with_tail"), [(None, False), (None, True), (torch.int8, False), (torch.int8, True)]
)
def test_blocks_larger_than_a_tile_equal_brute_force(tokens_per_frame, stored, with_tail):
    case = Case(tokens_per_frame, (128, 128), 1, 1, 1, 2, 32, torch.float32, stored, seed=tokens_per_frame)
    means = case.means if with_tail else None
    want = case.want(means=means)
    got = case.attend(tail=means)
    case.check(got, want)


@pytest.mark.parametrize(
    "layout", ["cache slice", "fused projections", "heads first", "every second head", "last dim strided"]
)
def test_any_strides_are_honoured(layout):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 2, 64, generator=generator).to(DEVICE) for tokens in (40, 120, 120))
    want = dense(q, k, v, [*range(16, 32), *range(80, 96)])
    if layout == "cache slice":  # rows of other frames around, so the batch stride is not L · H · D; k's is not v's
        k_cache, v_cache = (torch.full((2, tokens, 2, 64), torch.nan, device=DEVICE) for tokens in (200, 150))
        k_cache[:, 30:150], v_cache[:, 10:130] = k, v
        k, v = k_cache[:, 30:150], v_cache[:, 10:130]
    elif layout == "fused projections":  # rows of three widths
        q, k, v = (torch.cat([x] * (3 - i), dim=2)[:, :, :2] for i, x in enumerate((q, k, v)))
    elif layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "every second head":
        q, k, v = (x.repeat_interleave(2, dim=2)[:, :, ::2] for x in (q, k, v))
    else:
        q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    blocks, counts = every_query_block_reads([1, 6], 2, 2, 3, width=5)
    got = block_sparse_attention(q, k, v, blocks, counts, tokens_per_frame=40, block_q=16, block_k=16)
    assert got.is_contiguous()
    assert (got.double() - want).abs().max() <= 1e-5


def test_large_scores_do_not_overflow():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 32, 1, 64, generator=generator).to(DEVICE) for _ in range(3))
    q, k = q * 40, k * 40  # scores in the thousands
    blocks, counts = every_query_block_reads([0, 1], 1, 1, 2)
    got = block_sparse_attention(q, k, v, blocks, counts, tokens_per_frame=32, block_q=16, block_k=16)
    assert (got.double() - dense(q, k, v, list(range(32)))).abs().max() <= 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"counts": torch.zeros(1, 1, 3, dtype=torch.int32)},
            r"counts must be torch.int32 \(1, 1, 2\) on .* not torch.int32 \(1, 1, 3\)",
        ),
        ({"counts": torch.zeros(1, 1, 2)}, r"counts must be torch.int32 .* not torch.float32"),
        ({"k": torch.zeros(1, 32, 1, 64).char()}, "k is torch.int8, v is torch.float32 and scales are missing"),
        ({"scales": (torch.ones(1, 2, 1),) * 2}, "k is torch.float32, v is torch.float32 and scales are given"),
        (
            {"tail": (torch.zeros(1, 3, 1, 64),) * 2},
            r"tail must be torch.float32 \(1, 2, 1, 64\) on .* not .*\(1, 3, 1, 64\)",
        ),
    ],
)
def test_launcher_refuses_with_the_value(change, message):
    arguments = {
        **dict.fromkeys("qkv", torch.zeros(1, 32, 1, 64)),
        "blocks": torch.zeros(1, 1, 2, 2, dtype=torch.int32),
        "counts": torch.zeros(1, 1, 2, dtype=torch.int32),
        "tokens_per_frame": 32,
        "block_q": 16,
        "block_k": 16,
    }
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**(arguments | change))


@pytest.fixture
def a_gpu(monkeypatch):
    """As much of an sm_90 GPU as choosing launch parameters looks at."""
    gpu = SimpleNamespace(name="GPU", multi_processor_count=4)
    monkeypatch.setattr(block_sparse, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


KIND = tuning.Kind(64, 64, 128, torch.bfloat16, torch.bfloat16, (False, False))
ON_GPU = SimpleNamespace(is_cuda=True, shape=(1, 4608, 12, 128), device=torch.device("cuda", 1))


class Machine:
    """Chooses the last candidate of every choice."""

    def __init__(self, *, is_trying=False):
        self.asked, self.settled, self.is_trying, self.is_off = [], {}, lambda: is_trying, lambda: False

    def choose(self, work, facts, device, names, run, *, incumbent, tolerance):
        self.asked.append((incumbent, list(names)))
        return list(names)[-1] if run else incumbent


@pytest.mark.usefixtures("a_gpu")
def test_each_round_is_given_the_winner_of_all_before_until_something_is_measured_again():
    machine = Machine()
    launch = block_sparse._launch_for(KIND, ON_GPU, print, machine)
    last = [names[-1] for _, names in machine.asked]
    assert [incumbent for incumbent, _ in machine.asked] == [str(tuning.default_launch(KIND, (9, 0))), *last[:-1]]
    assert str(launch) == last[-1]
    assert (launch.descriptors, launch.per_sm) == (True, 2)
    asked = len(machine.asked)
    assert block_sparse._launch_for(KIND, ON_GPU, print, machine) == launch
    assert len(machine.asked) == asked
    machine.settled.clear()
    block_sparse._launch_for(KIND, ON_GPU, print, machine)
    assert len(machine.asked) == 2 * asked
    block_sparse._launch_for(KIND, ON_GPU, print, trying := Machine(is_trying=True))
    assert not trying.settled


def test_launches_are_timed_with_the_lists_of_a_full_window():
    case = Case(40, (16, 32), 1, 2, 1, 2, 16, torch.float32, None, seed=5)
    blocks, counts = block_sparse._lengthened(case.blocks, case.counts)
    assert blocks.shape[-1] >= block_sparse.FULL_LIST
    case.check(case.attend(blocks.contiguous(), counts), case.want())


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(("captures", "tokens"), [(True, 4608), (False, 64)])
def test_nothing_is_measured_while_a_graph_is_captured_or_with_little_work(monkeypatch, captures, tokens):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    some = SimpleNamespace(**{**vars(ON_GPU), "shape": (1, tokens, 1, 128)})
    machine = Machine()
    assert block_sparse._launch_for(KIND, some, print, machine) == tuning.default_launch(KIND, (9, 0))
    assert bool(machine.asked) == captures  # for what is proved already
    assert not machine.settled

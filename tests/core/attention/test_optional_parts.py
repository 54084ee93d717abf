"""8-bit keys and values, the pooled tail and the log-sum-exp: every backend equals brute force with any of them."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightforcing.lightforcing_core.attention.backends import flex as flex_backend
from lightforcing.lightforcing_core.attention.backends import reference
from lightforcing.lightforcing_core.attention.backends.flex import Flex
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.dispatch import (
    BackendUnavailable,
    choose,
    dense_attention_8bit,
)

from ...support.attention_problems import EIGHT_BIT, SHAPES, Problem

# The interpreter computes with numpy, which remarks that the logarithm of nothing is −inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


def check(got, want, atol=1e-4):
    for x, exact in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), exact, atol=atol, rtol=0)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("stored", [None, *EIGHT_BIT])
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backend_equals_brute_force_and_the_log_sum_exp_changes_nothing_else(backend, stored, with_tail, shape):
    problem = Problem(*shape, stored, batch=2)
    means = problem.means if with_tail else None
    got = problem.attend(backend, tail=means, wants_lse=True)
    assert got.lse.dtype == torch.float32
    check(got, problem.brute_force(means=means))
    assert torch.equal(got.out, problem.attend(backend, tail=means).out)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_sum_exp_of_narrow_queries_is_kept_in_float32(backend, dtype):
    problem = Problem(100, (64, 32), 1, 3, dtype=dtype)
    _, lse = problem.attend(backend, wants_lse=True)
    assert lse.dtype == torch.float32
    check([lse], [problem.brute_force()[1]])


def test_reference_log_sum_exp_can_be_differentiated():
    problem = Problem(20, (16, 16), 1, 2, dtype=torch.float64)
    problem.mask[:] = True

    def attend(q):
        problem.q = q
        return tuple(problem.attend("reference", wants_lse=True))

    assert torch.autograd.gradcheck(attend, problem.q.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("with_tail", [False, True])
def test_attention_over_two_halves_of_the_keys_adds_up_to_attention_over_all(backend, stored, with_tail):
    """As if half of a cache were on another device: each part sees its frames, with the tail of its own blocks."""
    problem = Problem(40, (32, 16), 2, 4, stored, batch=2)
    problem.mask[0, 0, 1] = torch.arange(12) < 6  # keys of one half only
    want = problem.brute_force(means=problem.means if with_tail else None)
    whole = problem.kv, problem.scales
    parts = []
    for tokens, blocks in ((slice(0, 80), slice(0, 6)), (slice(80, 160), slice(6, 12))):
        problem.kv = [x[:, tokens] for x in whole[0]]
        scales, tail = (x and tuple(side[:, blocks] for side in x) for x in (whole[1], problem.means))
        options = {"mask": problem.mask[..., blocks], "scales": scales, "tail": tail if with_tail else None}
        parts.append(problem.attend(backend, **options, wants_lse=True))
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    lse = lses.logsumexp(0)
    shares = (lses - lse).exp().nan_to_num(0)  # the shares of nothing in nothing
    check(((shares[..., None] * outs).sum(0), lse), want)


def test_reference_gathers_8bit_blocks_a_few_at_a_time(monkeypatch):
    problem = Problem(*SHAPES[0], torch.int8)
    at_once = problem.attend("reference", tail=problem.means).out
    monkeypatch.setattr(reference, "REFERENCE_CHUNK", 1)
    torch.testing.assert_close(problem.attend("reference", tail=problem.means).out, at_once, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("stored", EIGHT_BIT)
@pytest.mark.parametrize("tokens_per_frame", [40, 64])
def test_dense_attention_over_an_8bit_cache_equals_brute_force(backend, stored, tokens_per_frame):
    problem = Problem(tokens_per_frame, (64, 32), 1, 3, stored, batch=2)
    got = dense_attention_8bit(problem.q, *problem.kv, problem.scales, FrameBlocks(tokens_per_frame, 32), backend)
    want, _ = problem.brute_force(torch.ones_like(problem.mask))
    assert got.shape == problem.q.shape
    assert (got.double() - want).abs().max() <= 1e-4


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor wider than 8 bits that an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dtype.itemsize > 1:
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("stored", EIGHT_BIT)
def test_no_wider_copy_of_an_8bit_cache_is_made(stored, monkeypatch):
    problem = Problem(32, (32, 32), 1, 8, stored, heads=4)
    cache = problem.kv[0].numel()
    monkeypatch.setattr(flex_backend, "_compiled", lambda *kind, lse: lambda q, *rest: (q, None))
    monkeypatch.setattr(reference, "REFERENCE_CHUNK", 1)
    call = problem.call()
    runs = {
        "flex": lambda: Flex().run(call),
        "reference": lambda: reference.Reference().run(call),
        "dense": lambda: dense_attention_8bit(problem.q, *problem.kv, problem.scales, FrameBlocks(32, 32), "reference"),
    }
    for name, run in runs.items():
        with LargestTensor() as largest:
            run()
        assert largest.elements <= cache // 4, name  # one head of four


# -------------------------------------------------------------------------------------------------------- flex


@pytest.mark.usefixtures("flex_runs")
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("stored", EIGHT_BIT)
def test_flex_with_8bit_keys_and_values_equals_brute_force(stored, with_tail):
    problem = Problem(64, (16, 32), 2, 2, stored, batch=2)
    means = problem.means if with_tail else None
    check([problem.attend("flex", tail=means).out], problem.brute_force(means=means)[:1])


@pytest.mark.usefixtures("flex_runs")
def test_flex_with_a_tail_equals_brute_force_and_compiles_once():
    """Ragged frames, more means than a block holds, and query blocks that read every block of some tiles, or none."""
    from torch._dynamo.utils import counters

    graphs = []
    for k_frames in (5, 7, 6):
        problem = Problem(40, (32, 16), 2, k_frames, batch=2)
        problem.mask[0, 0, 1] = True
        problem.mask[0, 1, 0, :16] = True
        problem.mask[0, 1, 0, 16:] = False
        check([problem.attend("flex", tail=problem.means).out], problem.brute_force(means=problem.means)[:1])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """flex as PyTorch's own eager code, which has a log-sum-exp on CPU but ignores lists: it reads every key."""
    monkeypatch.setattr(flex_backend.torch, "compile", functools.partial(torch.compile, backend="eager"))
    flex_backend._compiled.cache_clear()
    yield
    flex_backend._compiled.cache_clear()


@pytest.mark.usefixtures("uncompiled_flex")
@pytest.mark.parametrize(("stored", "with_tail"), [(None, False), (None, True), (torch.int8, False)])
def test_flex_gives_a_natural_log_of_real_tokens_only(stored, with_tail):
    """Ragged frames on both sides; of a tail nothing is visible if every block is read."""
    problem = Problem(40, (32, 16), 1, 2, stored)
    problem.mask[:] = True
    means = problem.means if with_tail else None
    got = Flex().run(problem.call(tail=means, wants_lse=True))
    assert got.lse.dtype == torch.float32
    check(got, problem.brute_force(means=means))


def test_flex_is_asked_for_what_its_compiler_can_do():
    problem = Problem(40, (32, 16), 1, 2)
    call = problem.call(wants_lse=True)
    assert choose(call).name == "reference"
    with pytest.raises(BackendUnavailable, match="'flex' cannot run: flex_attention gives no log-sum-exp on CPU"):
        choose(call, "flex")

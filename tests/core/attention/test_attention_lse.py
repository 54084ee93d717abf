"""`sparse_attention(..., return_lse=True)`: every backend's log-sum-exp, and parts of the keys that add up by it."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightforcing.lightforcing_core.attention import attention_backends
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.dispatch import BackendUnavailable, choose_backend, sparse_attention
from lightforcing.lightforcing_core.attention.selection import BlockSelection

from ...support.attention_problems import EIGHT_BIT, SHAPES, SIZES, Problem, let_flex_fail

# The interpreter computes with numpy, which remarks that the logarithm of nothing is −inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


def check(got, want, atol=1e-4):
    for x, exact in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), exact, atol=atol, rtol=0)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("stored", [None, *EIGHT_BIT])
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_sum_exp_equals_brute_force(backend, stored, with_tail, shape):
    problem = Problem(*shape, stored, batch=2)
    means = problem.means if with_tail else None
    out, lse = problem.attend(backend, tail=means, return_lse=True)
    assert lse.dtype == torch.float32
    check((out, lse), problem.brute_force_and_lse(problem.mask, means))
    assert torch.equal(out, problem.attend(backend, tail=means))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_sum_exp_of_narrow_queries_is_kept_in_float32(backend, dtype):
    problem = Problem(100, (64, 32), 1, 3, None, dtype=dtype)
    _, lse = problem.attend(backend, return_lse=True)
    assert lse.dtype == torch.float32
    check([lse], [problem.brute_force_and_lse(problem.mask)[1]])


@settings(max_examples=20)
@given(**SIZES, with_tail=st.booleans())
def test_reference_keeps_float64(with_tail, **sizes):
    problem = Problem(stored=None, dtype=torch.float64, **sizes)
    means = problem.means if with_tail else None
    got = problem.attend("reference", tail=means, return_lse=True)
    assert got[1].dtype == torch.float64
    check(got, problem.brute_force_and_lse(problem.mask, means), atol=1e-12)


def test_reference_log_sum_exp_can_be_differentiated():
    problem = Problem(20, (16, 16), 1, 2, None, dtype=torch.float64)
    problem.mask[:] = True

    def attend(q):
        problem.q = q
        return problem.attend("reference", return_lse=True)

    assert torch.autograd.gradcheck(attend, problem.q.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("stored", [None, torch.int8])
@pytest.mark.parametrize("with_tail", [False, True])
def test_attention_over_two_halves_of_the_keys_adds_up_to_attention_over_all(backend, stored, with_tail):
    """As when half of a cache lies in another memory: each part sees its frames, with the tail of its own blocks."""
    problem = Problem(40, (32, 16), 2, 4, stored, batch=2)
    problem.mask[0, 0, 1] = torch.arange(12) < 6  # keys of one half only
    parts = []
    for tokens, blocks in ((slice(0, 80), slice(0, 6)), (slice(80, 160), slice(6, 12))):
        scales, tail = (x and tuple(side[:, blocks] for side in x) for x in (problem.scales, problem.means))
        part = sparse_attention(
            problem.q,
            *(x[:, tokens] for x in problem.kv),
            mask=problem.mask[..., blocks],
            tokens_per_frame=40,
            block=(32, 16),
            backend=backend,
            scales=scales,
            tail=tail if with_tail else None,
            return_lse=True,
        )
        parts.append(part)
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    lse = lses.logsumexp(0)
    shares = (lses - lse).exp().nan_to_num(0)  # the shares of nothing in nothing
    whole = problem.attend(backend, tail=problem.means if with_tail else None, return_lse=True)
    check(((shares[..., None] * outs).sum(0), lse), [x.double() for x in whole])
    check(whole, problem.brute_force_and_lse(problem.mask, problem.means if with_tail else None))


# -------------------------------------------------------------------------------------------------------- flex


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """flex as PyTorch's own eager code, which has a log-sum-exp on CPU but ignores lists: it reads every key."""
    monkeypatch.setattr(attention_backends.torch, "compile", functools.partial(torch.compile, backend="eager"))
    attention_backends._compiled_flex.cache_clear()
    yield
    attention_backends._compiled_flex.cache_clear()


@pytest.mark.usefixtures("uncompiled_flex")
@pytest.mark.parametrize(("stored", "with_tail"), [(None, False), (None, True), (torch.int8, False)])
def test_flex_gives_a_natural_log_of_real_tokens_only(stored, with_tail):
    """Ragged frames on both sides; of a tail nothing is visible where every block is read."""
    problem = Problem(40, (32, 16), 1, 2, stored)
    problem.mask[:] = True
    means = problem.means if with_tail else None
    layouts = [FrameBlocks(40, size) for size in (32, 16)]
    selection = BlockSelection.from_mask(problem.mask)
    call = attention_backends.Attention(
        problem.q, *problem.kv, selection, *layouts, 32**-0.5, problem.scales, means, lse=True
    )
    out, lse = attention_backends.run_flex(call)
    assert lse.dtype == torch.float32
    check((out, lse), problem.brute_force_and_lse(problem.mask, means))


def test_flex_is_asked_for_what_its_compiler_can_do():
    q = torch.empty(1, 4608, 12, 128)
    assert choose_backend(q, q, lse=True).name == "reference"
    with pytest.raises(BackendUnavailable, match="'flex' cannot run: flex_attention gives no log-sum-exp on CPU"):
        choose_backend(q, q, backend="flex", lse=True)


def test_a_failure_with_a_log_sum_exp_does_not_decide_for_calls_without(monkeypatch):
    let_flex_fail(monkeypatch)
    problem = Problem(*SHAPES[0], None)
    check(problem.attend("auto", return_lse=True), problem.brute_force_and_lse(problem.mask))
    assert choose_backend(problem.q, problem.q, lse=True).name == "reference"
    assert choose_backend(problem.q, problem.q).name == "flex"

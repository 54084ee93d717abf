"""8-bit keys and values and the pooled tail: every backend equals brute force with any of them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightforcing.lightforcing_core.attention.backends import flex as flex_backend
from lightforcing.lightforcing_core.attention.backends import reference
from lightforcing.lightforcing_core.attention.backends.flex import Flex
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.dispatch import dense_attention_8bit

from ...support.attention_problems import EIGHT_BIT, SHAPES, Problem

# The interpreter computes with numpy, which remarks that the logarithm of nothing is −inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


def check(got, want):
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("backend", "shape"), [("triton", SHAPES[0]), ("flex", SHAPES[1]), *(("reference", shape) for shape in SHAPES)]
)
@pytest.mark.parametrize("stored", [None, *EIGHT_BIT])
@pytest.mark.parametrize("with_tail", [False, True])
def test_backend_equals_brute_force(request, backend, stored, with_tail, shape):
    if backend == "flex":
        request.getfixturevalue("flex_runs")  # skips if it cannot run here
    problem = Problem(*shape, stored, batch=2)
    means = problem.means if with_tail else None
    check(problem.attend(backend, tail=means), problem.brute_force(means=means))


@pytest.mark.parametrize("stored", [None, torch.int8])
def test_reference_result_does_not_depend_on_how_much_it_gathers_at_once(monkeypatch, stored):
    problem = Problem(*SHAPES[0], stored)
    at_once = problem.attend("reference", tail=problem.means)
    monkeypatch.setattr(reference, "REFERENCE_CHUNK", 1)
    torch.testing.assert_close(problem.attend("reference", tail=problem.means), at_once, atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("stored", EIGHT_BIT)
@pytest.mark.parametrize("tokens_per_frame", [40, 64])
def test_dense_attention_over_an_8bit_cache_equals_brute_force(backend, stored, tokens_per_frame):
    problem = Problem(tokens_per_frame, (64, 32), 1, 3, stored, batch=2)
    got = dense_attention_8bit(problem.q, *problem.kv, problem.scales, FrameBlocks(tokens_per_frame, 32), backend)
    check(got, problem.brute_force(torch.ones_like(problem.mask)))


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
    monkeypatch.setattr(flex_backend, "_compiled", lambda *kind: lambda q, *rest: q)
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
def test_flex_with_a_tail_equals_brute_force_and_compiles_once():
    """Ragged frames, more means than a block holds, and query blocks that read every block of some tiles, or none."""
    from torch._dynamo.utils import counters

    graphs = []
    for k_frames in (5, 7, 6):
        problem = Problem(40, (32, 16), 2, k_frames, batch=2)
        problem.mask[0, 0, 1] = True
        problem.mask[0, 1, 0, :16] = True
        problem.mask[0, 1, 0, 16:] = False
        check(problem.attend("flex", tail=problem.means), problem.brute_force(means=problem.means))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]

"""When `SelectionPlan.select` takes the fused kernel, what it says if it does not, and what a failing kernel does."""

from unittest import mock

import pytest
import torch

from lightforcing.lightforcing_core.attention import selection as selection_module
from lightforcing.lightforcing_core.attention.blocks import FrameBlocks
from lightforcing.lightforcing_core.attention.selection import why_not_fused

pytest.importorskip("triton")

from lightforcing.kernels import selection as kernel

from ...support.attention_problems import DEVICE, selection_plan


class OnCuda(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    plan = selection_plan(range(10), 3, FrameBlocks(20, 8), 0.7, device=DEVICE)
    return plan, [torch.randn(1, rows, 1, 8, generator=generator).to(DEVICE) for rows in (3, 30, 10)]


@pytest.mark.parametrize("by_parts", [False, True])
def test_the_fused_kernel_runs_if_nothing_is_against_it(monkeypatch, by_parts):
    plan, inputs = problem()
    by_means = plan.select(*inputs)
    if by_parts:  # 10 to a frame of 20
        inputs.append(torch.randn(1, 100, 1, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    want = plan.select(*inputs)
    monkeypatch.setattr(selection_module, "why_not_fused", lambda *arguments: None)
    monkeypatch.setattr(selection_module, "best", None)  # the torch path cannot run
    got = plan.select(*inputs)
    assert torch.equal(got.blocks, want.blocks)
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.blocks, by_means.blocks) != by_parts


def test_a_kernel_that_fails_is_replaced_for_the_run(monkeypatch, caplog):
    plan, inputs = problem()
    want = plan.select(*inputs)
    fail = mock.Mock(side_effect=RuntimeError("no such luck\nat all"))
    monkeypatch.setattr(kernel, "select_blocks", fail)
    on_gpu = [inputs[0].as_subclass(OnCuda), *inputs[1:]]
    for _ in range(3):
        got = plan.select(*on_gpu)
        assert torch.equal(got.blocks.as_subclass(torch.Tensor), want.blocks)
    fail.assert_called_once()
    parts = torch.zeros(1, 100, 1, 8, device=DEVICE)
    assert why_not_fused(*on_gpu).startswith("selection kernel failed")
    assert why_not_fused(*on_gpu, parts) is None  # another kernel, not yet tried
    (record,) = caplog.records
    assert record.getMessage().endswith("(RuntimeError: no such luck); selecting through torch until the next run")


def test_the_reason_against_the_fused_kernel_names_it(monkeypatch):
    _, inputs = problem()
    on_gpu = [inputs[0].as_subclass(OnCuda), *inputs[1:]]
    if DEVICE == "cpu":
        assert why_not_fused(*inputs) == "the fused kernel is for CUDA tensors, not for cpu"
    assert "one dtype, not torch.float32 and torch.float16 and torch.float32" in why_not_fused(
        on_gpu[0], inputs[1].half(), inputs[2]
    )
    assert "and torch.bfloat16" in why_not_fused(*on_gpu, inputs[1].bfloat16())
    assert "not torch.float64" in why_not_fused(*(x.double() for x in on_gpu))
    monkeypatch.setattr(selection_module, "why_no_kernels", lambda: "triton is not installed")
    assert why_not_fused(*on_gpu) == "triton is not installed"

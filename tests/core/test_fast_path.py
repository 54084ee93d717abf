"""Fast paths: a failure costs one warning for the run, except where it means that memory or the device is gone."""

import logging

import pytest
import torch

from lightforcing.lightforcing_core import fast_path
from lightforcing.lightforcing_core.fast_path import DeviceLost, FastPath, begin_run, recording

PATH = FastPath("fused store", torch.device("cpu"), torch.float32, (64, 64), 128)
OTHERS = [
    PATH._replace(kind="triton"),
    PATH._replace(device=torch.device("meta")),
    PATH._replace(dtype=torch.float16),
    PATH._replace(block=(128, 64)),
    PATH._replace(head_dim=64),
    PATH._replace(detail="tail"),
]


def fails(error):
    def run():
        raise error

    return run


def test_a_failure_is_logged_once_and_remembered_until_the_next_run(caplog):
    tries = []

    def broken():
        tries.append(1)
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nand more")

    with caplog.at_level(logging.WARNING):
        assert [PATH.attempt(broken, "running the modules") for _ in range(3)] == [None] * 3
    assert len(tries) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "[Light Forcing] fused store failed on cpu in torch.float32, blocks (64, 64), head dim 128 (RuntimeError: "
        "PTX was compiled with an unsupported toolchain); running the modules until the next run"
    ]
    assert PATH.failure is not None
    begin_run()
    assert PATH.attempt(lambda: 7, "running the modules") == 7


@pytest.mark.parametrize("other", OTHERS)
def test_a_failure_bans_nothing_else(other):
    PATH.attempt(fails(ValueError("no")), "running the modules")
    assert other.failure is None
    assert other.attempt(lambda: 7, "running the modules") == 7


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_raised_as_such_and_bans_nothing(error):
    with pytest.raises(torch.OutOfMemoryError):
        PATH.attempt(fails(error), "running the modules")
    assert PATH.failure is None


@pytest.mark.parametrize(
    "text", ["CUDA error: an illegal memory access was encountered", "CUDA error: device-side assert triggered"]
)
def test_nothing_falls_back_once_the_device_is_lost(text):
    with pytest.raises(DeviceLost, match="restart ComfyUI"):
        PATH.attempt(fails(RuntimeError(text)), "running the modules")
    assert PATH.failure is None


def test_a_kernel_that_needs_more_shared_memory_than_there_is_only_fails():
    error = RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376")
    assert PATH.attempt(fails(error), "running the modules") is None
    assert PATH.failure is not None


def test_a_failure_while_recording_fails_only_the_recording():
    with recording(), pytest.raises(RuntimeError, match="not while capturing"):
        PATH.attempt(fails(RuntimeError("not while capturing")), "running the modules")
    assert PATH.failure is None
    assert not fast_path.is_recording()

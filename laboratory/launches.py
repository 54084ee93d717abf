"""Launches and host time of a forward's layers, counted on a CPU: python -m laboratory.launches.

Python takes the same path as on a GPU, but the kernels, compiled for sm_90, are not launched. When host time is
measured, each matrix product, dense attention and RMS norm, one launch each on a GPU, is replaced by an allocation.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import typer
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightforcing.lightforcing_core.attention import selection
from lightforcing.lightforcing_core.attention.backends import TRITON
from lightforcing.lightforcing_core.attention.backends.base import DenseAttention
from lightforcing.lightforcing_core.attention.backends.dense import sdpa
from lightforcing.lightforcing_core.attention.options import AttentionOptions
from lightforcing.lightforcing_core.model import fused
from lightforcing.lightforcing_core.model.causal import ModelState, predict
from lightforcing.lightforcing_core.model.kv_cache import KVCache
from lightforcing.lightforcing_core.model.kv_storage import CacheShape
from lightforcing.lightforcing_core.model.wan import HEAD_DIM, random_state_dict, wan_from_state_dict

DIM, LAYERS, CHUNK, PAST, TOKENS, TEXT, BLOCK = 128, 30, 3, 6, 4, 32, 16
ALLOCATIONS = ("empty", "empty_like", "new_empty")
# A chunk of a checkpoint trained with sparse attention, and of others by default.
SETTINGS: dict[str, dict[str, Any]] = {"published": {}, "with a tail": {"tail": True, "estimator": "lse"}}
# Launches and host time per layer while every step was a launch of its own; the time in those of a `torch.add`.
BEFORE = {"published": (22, 356), "with a tail": (23, 369)}
fired: Counter[str] = Counter()  # launches of kernels by name; bound kernels outlive one count


class Launches(TorchDispatchMode):
    """Counts the operations of torch that a GPU runs as kernels: those that make or change memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        is_new = any(x.untyped_storage()._cdata not in given for x in tree_iter(out) if isinstance(x, torch.Tensor))
        name = func._schema.name.removeprefix("aten::")
        if (is_new and name not in ALLOCATIONS) or func._schema.is_mutable:
            self.count[name] += 1
        return out


def forward(setting: str, layers: int, dense: DenseAttention) -> Callable[[], object]:
    """A step of an open chunk that skips 60 % of the key blocks."""
    dtype = torch.bfloat16
    dit = wan_from_state_dict(random_state_dict(dim=DIM, ffn_dim=DIM, layers=layers, text_dim=TEXT), dtype=dtype)
    slots = PAST + CHUNK
    options = AttentionOptions(block=(BLOCK, BLOCK), **SETTINGS[setting])
    sizes = layers, 1, slots, (1, TOKENS), DIM // HEAD_DIM, HEAD_DIM, BLOCK
    state = ModelState(KVCache(CacheShape(*sizes, pools=options.pools(sparse=True), dtype=dtype)), options, dense)
    state.follow(torch.zeros(1, TEXT, TEXT, dtype=dtype))
    for _ in range(PAST // CHUNK):
        state.open_chunk(CHUNK, 0.0, None)
        state.cache.commit()
    state.open_chunk(CHUNK, 0.6, None)
    return partial(predict, dit, torch.zeros(1, 16, CHUNK, 4, 4, dtype=dtype), torch.full((1,), 500.0), state)


@contextmanager
def absent_gpu() -> Iterator[None]:
    """Kernels are bound for a GPU that is not here; `fired` counts their launches."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    from lightforcing.kernels import device
    from lightforcing.kernels import selection as select_kernel

    class Absent:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    def no_handles(kernel: Any) -> None:
        kernel._run = lambda *_: fired.update((kernel.name,))

    def why_not(q: Any, k: Any, frames: Any, *_: Any) -> str | None:
        return select_kernel.why_not(q, k.shape[1], frames.shape[1])

    driver.set_active(Absent())
    with ExitStack() as stack:
        for owner, name, value in (
            (CompiledKernel, "_init_handles", no_handles),
            (device, "why_not", lambda *_, **__: None),
            (device, "multiprocessors", lambda _: 132),
            (fused, "DEVICES", ("cuda", "cpu")),
            (fused, "EPILOGUES", ("cuda", "cpu")),
            (TRITON, "why_not_auto", lambda _: None),
            (selection, "why_not_fused", why_not),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def allocated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def allocated_activation(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, use_gelu: bool) -> torch.Tensor:
    return x.new_empty(len(x), len(bias))


def allocated(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def counted(setting: str, layers: int) -> Counter[str]:
    """Launches of a step's forward, by name."""
    with absent_gpu():
        run = forward(setting, layers, sdpa)
        run()
        fired.clear()
        with Launches() as seen:
            run()
    return seen.count + fired


def milliseconds(setting: str, repeats: int) -> tuple[float, float]:
    """Median process time of a step's forward and, between them, of a `torch.add` of one number."""
    one = torch.zeros(1)
    samples, adds = [], []
    with absent_gpu(), ExitStack() as stack:
        run = forward(setting, LAYERS, allocated)
        run()
        for owner, name, value in (
            (functional, "linear", allocated_linear),
            (functional, "rms_norm", allocated),
            (torch, "_addmm_activation", allocated_activation),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        for _ in range(repeats):
            adds.append(process_seconds(lambda: [torch.add(one, one) for _ in range(1000)]))
            samples.append(process_seconds(run))
    return 1e3 * statistics.median(samples), statistics.median(adds)


def process_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(repeats: int = 200) -> None:
    """Print launches and host time, and their ratios to those before."""
    torch.set_num_threads(1)
    for setting, (launches, adds) in BEFORE.items():
        with torch.inference_mode():
            one, two = (counted(setting, layers) for layers in (LAYERS, LAYERS + 1))
            whole, add = milliseconds(setting, repeats)
        a_layer, total = two - one, sum(one.values())
        print(f"{setting}: {sum(a_layer.values())} launches per layer ({launches} before), {total} per forward")
        print(", ".join(f"{count} {name}" for name, count in a_layer.items()))
        print(
            f"{whole / LAYERS:.3f} ms of host time per layer, {whole / LAYERS / add:.0f} times that of torch.add;",
            end=" ",
        )
        print(f"{adds / (whole / LAYERS / add):.2f} times as fast as before")


if __name__ == "__main__":
    typer.run(main)

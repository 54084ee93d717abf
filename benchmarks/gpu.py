"""The stages of `lightforcing doctor` and `lightforcing bench gpu`.

On a CPU all is small, and each stage remarks on what it left out.
"""

import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from ..lightforcing_core import machine, profile
from ..lightforcing_core.fast_path import MIN_TRITON, one_line, why_no_kernels
from ..lightforcing_core.model.cuda_capture import CudaRecorder
from ..lightforcing_core.rollout import loop
from ..lightforcing_core.rollout.runtime import Runtime, StepEvent
from . import attention, decode, rollout, step
from .checks import kernels
from .console import Put, Record
from .settings import AttentionBench, DecodeBench, GpuBench, Machine, Model, Picture, RolloutBench, Say, StepBench
from .stages import Stage, run_stages
from .timing import facts as facts_of

OLDEST = {"torch": (2, 7), "triton": MIN_TRITON}
# Products of a chunk at 480×832 in the 1.3B model, as rows, depth and columns.
SHAPES = {
    "8192": (8192, 8192, 8192),
    "out": (4680, 1536, 1536),
    "qkv": (4680, 1536, 4608),
    "up": (4680, 1536, 8960),
    "down": (4680, 8960, 1536),
}
REAL = Picture(480, 832)
SECONDS = 150  # of a stage at level 0
Run = Callable[[GpuBench, Record, Put], str | None]


def facts(bench: GpuBench, record: Record, put: Put) -> str | None:
    """Machine and versions, and advice if they do not fit."""
    device = Machine().prepare()
    found = facts_of(device) | {"key": profile.machine_of(device)[0]}
    found["compiler"] = next((name for name in ("cl", "gcc", "clang", "cc") if shutil.which(name)), None)
    for name, oldest in OLDEST.items():
        if found[name] and tuple(map(int, found[name].split(".")[:2])) < oldest:
            put("advice", name, f"{found[name]} is too old: install {name} {'.'.join(map(str, oldest))} or newer")
            found["outdated"] = name
    for name, fact in found.items():
        put("facts", name, fact)
    if device.type == "cuda":
        for without, reason in (("kernels", why_no_kernels()), ("CUDA graphs", CudaRecorder.why_not(device))):
            if reason:
                put("advice", f"no {without}", reason)
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        put("advice", "torch", "it is a CPU build: install one with CUDA from pytorch.org")
    if not found["compiler"] and found["system"] == "Linux":
        put("advice", "compiler", "Triton and flex attention need one: install gcc and g++")
    return None


def ceilings(bench: GpuBench, record: Record, put: Put) -> str | None:
    """Rates of copies, products and launches, which nothing here exceeds."""
    device = Machine().prepare()
    gpu = device.type == "cuda"

    def seconds(run: Callable[[], object]) -> float:
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.1).median

    x, small = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (1 << (30 if gpu else 26), 8))
    put("ceilings", "copy GB/s", 2e-9 * x.nbytes / seconds(x.clone))
    put("ceilings", "torch.add µs", 1e6 * seconds(partial(torch.add, small, small)))
    put("ceilings", "torch.add and wait µs", 1e6 * seconds(lambda: torch.add(small, small).cpu()))
    one = torch.ones((), device=device)
    for name, sizes in SHAPES.items():
        rows, depth, columns = sizes if gpu else (size // 8 for size in sizes)
        a, b = (torch.randn(n, depth, device=device, dtype=torch.bfloat16) for n in (rows, columns))
        runs = {"bf16": partial(torch.mm, a, b.T)}
        if gpu:
            a8, b8 = (x.to(torch.float8_e4m3fn) for x in (a, b))
            product = partial(torch._scaled_mm, a8, b8.T, out_dtype=torch.bfloat16)
            runs["fp8 by row"] = partial(product, scale_a=one.repeat(rows, 1), scale_b=one.repeat(1, columns))
            runs["fp8 by tensor"] = partial(product, scale_a=one, scale_b=one)
        for kind, run in runs.items():
            try:
                rate: float | str = 2e-12 * rows * depth * columns / seconds(run)
            except RuntimeError as error:  # the chip has no such product, or memory ran out
                rate = one_line(error)
            put("ceilings", f"{name} {kind} TFLOPS", rate)
    return None if gpu else "no GPU: no fp8, and products of an eighth in each dimension"


def faults(bench: GpuBench, record: Record, put: Put) -> str | None:
    """Whether the next run is right after one was cancelled or had no memory, and whether a second card agrees."""
    device, tiny = Machine().prepare(), RolloutBench(21)

    def latents(place: torch.device = device, on_step: Callable[[StepEvent], object] | None = None) -> Tensor:
        recipe = rollout.recipe_of(tiny, "sparse", tiny.frames, place)
        dit = step.random_wan(tiny.model, place, torch.bfloat16)
        made = [torch.empty(1, 16, 0, *tiny.picture.latent)]
        with suppress(KeyboardInterrupt, torch.OutOfMemoryError):
            for chunk in loop.rollout(dit, recipe, Runtime(on_step=on_step)):
                made.append(chunk.latents.cpu())
        return torch.cat(made, dim=2)

    def cancel(event: StepEvent) -> None:
        if event.chunk:
            raise KeyboardInterrupt

    whole = latents()
    put("faults", "cancelled run keeps its chunk", torch.equal(latents(on_step=cancel), whole[:, :, :3]))
    put("faults", "next run is right", torch.equal(latents(), whole))
    if device.type == "cpu":
        return "no GPU: memory and a second card were not tried"
    balloon = []
    with suppress(torch.OutOfMemoryError):
        balloon.append(torch.empty(torch.cuda.mem_get_info()[0] - (64 << 20), dtype=torch.uint8, device=device))
    latents()
    balloon.clear()
    put("faults", "run after one without memory is right", torch.equal(latents(), whole))
    if torch.cuda.device_count() > 1:
        put("faults", "second card agrees", torch.allclose(latents(torch.device("cuda:1")), whole, atol=0.05))
    return None


def choices(bench: GpuBench, record: Record, put: Put) -> str | None:
    """The choices that were measured on this machine, now or before."""
    for choice, candidates in profile.rows(Machine().prepare()).items():
        put("choices", choice, {name: f"{row.state}, {row.because}" for name, row in candidates.items()})
    return None


def _timed(
    measure: Callable[[Any, Put], None], gpu: Any, cpu: Any, less: str, bench: GpuBench, record: Record, put: Put
) -> str | None:
    """Measure by settings for a GPU, with more rounds the higher the level, or by those for a CPU, which are `less`.

    With `apply`, unproven candidates are tried meanwhile, and what is proved is kept.
    """
    rounds = {"rounds" if isinstance(gpu, RolloutBench) else "repeats": (5, 7, 20)[bench.level]}
    is_gpu = torch.cuda.is_available()
    with machine.measuring(seconds=60.0) if bench.apply else nullcontext():
        measure(replace(gpu, **rounds) if is_gpu else cpu, put)
    return None if is_gpu else f"no GPU: {less}"


CHECKS: dict[str, Run] = {"facts": facts, "ceilings": ceilings, "kernels": kernels}
MEASUREMENTS: dict[str, Run] = {
    "attention": partial(
        _timed,
        attention.measure,
        AttentionBench(1560, chunks=(2, 4, 7), sparsity=(0.6, 0.8, 0.88)),
        AttentionBench(390, 1, chunks=(7,), sparsity=(0.88,), repeats=3),
        "one head, a quarter of the tokens",
    ),
    "forward": partial(
        _timed,
        step.measure,
        StepBench(picture=REAL, cuda_graph=True, fp8=True),
        StepBench(model=Model(256, 512, 1), picture=Picture(64, 96), cuda_graph=True, fp8=True, repeats=5),
        "one layer of width 256 at 64×96",
    ),
    "decode": partial(
        _timed,
        decode.measure,
        DecodeBench(picture=REAL),
        DecodeBench((4,), Picture(32, 48)),
        "a tiny VAE instead of LightVAE and Wan's own, 32×48",
    ),
    "clip": partial(
        _timed,
        rollout.measure,
        RolloutBench(decode=True, model=Model(), picture=REAL),
        RolloutBench(21, decode=True, vae_dim=4),
        "21 frames of a tiny model and VAE at 64×96",
    ),
    "faults": faults,
    "choices": choices,
}


def measure(bench: GpuBench, put: Put, say: Say, *, everything: bool = True) -> None:
    """Run the checks, or all stages."""
    chosen, seconds = CHECKS | MEASUREMENTS if everything else CHECKS, SECONDS * (1, 3, 10)[bench.level]
    run_stages([Stage(name, partial(run, bench), seconds) for name, run in chosen.items()], put, say)

"""The stages of `lightforcing doctor` and `lightforcing bench gpu`.

Levels: 0 quick, 1 normal, 2 full. On a CPU all is small, and each stage remarks on what it left out.
"""

import shutil
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..lightforcing_core import machine, profile
from ..lightforcing_core.fast_path import MIN_TRITON, one_line, why_no_kernels
from ..lightforcing_core.model.cuda_capture import CudaRecorder
from ..lightforcing_core.rollout.loop import rollout
from ..lightforcing_core.rollout.runtime import Runtime, StepEvent
from .attention import flat_rows, run_attention
from .checks import compile_kernels, numerics
from .record import facts as facts_of
from .rollout import random_wan, recipe_of, run_rollout, schedule_of
from .settings import REAL_LAYERS, AttentionBench, Machine, Model, Picture, RolloutBench, StepBench
from .stages import Put, Report, Stage
from .step import run_step

OLDEST = {"torch": (2, 7), "triton": MIN_TRITON}
# Products of a chunk at 480×832 in the 1.3B model, as rows, depth and columns.
SHAPES = {
    "8192": (8192, 8192, 8192),
    "out": (4680, 1536, 1536),
    "qkv": (4680, 1536, 4608),
    "up": (4680, 1536, 8960),
    "down": (4680, 8960, 1536),
}
REAL, SMALL = Picture(480, 832), Picture(64, 96)
LITTLE = Model(256, 512, 2)


def stages(level: int, *, everything: bool, apply: bool = False) -> list[Stage]:
    """Stages 0 to 3, or all. apply: try unproven candidates and keep what is proved."""
    limits = {facts: 30, ceilings: 30, compile_kernels: 60, numerics: 90}
    rest = {attention: 60, forward: 60, clip: 150, faults: 60, choices: 30} if everything else {}
    slack = (1, 3, 10)[level]
    made = [Stage(run.__name__.partition("_")[0], partial(run, level), slack * s) for run, s in limits.items()]
    return made + [Stage(run.__name__, partial(run, level, apply), slack * s) for run, s in rest.items()]


def _proving(apply: bool) -> AbstractContextManager[None]:
    return machine.measuring(seconds=60.0) if apply else nullcontext()


def facts(level: int, report: Report, put: Put) -> None:
    """Machine and versions, and advice if they do not fit."""
    device = Machine().prepare()
    key, here = profile.machine_of(device)
    put("key", key)
    found = facts_of(device) | here
    found["compiler"] = next((name for name in ("cl", "gcc", "clang", "cc") if shutil.which(name)), None)
    put("facts", found)
    for name, oldest in OLDEST.items():
        if found[name] and tuple(map(int, found[name].split(".")[:2])) < oldest:
            put("advice", f"{name} {found[name]} is too old: install {name} {'.'.join(map(str, oldest))} or newer")
            put("ok", False)
    if device.type == "cuda":
        for without, reason in (("kernels", why_no_kernels()), ("CUDA graphs", CudaRecorder.why_not(device))):
            if reason:
                put("advice", f"no {without}: {reason}")
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        put("advice", "this torch is a CPU build: install one with CUDA from pytorch.org")
    if not found["compiler"] and found["system"] == "Linux":
        put("advice", "Triton and flex attention need a compiler: install gcc and g++")


def ceilings(level: int, report: Report, put: Put) -> str | None:
    """Rates of copies, products and launches, which nothing here exceeds."""
    device = Machine().prepare()
    gpu = device.type == "cuda"

    def note(name: str, amount: float, run: Callable[[], object]) -> None:
        try:
            run()
            rate: float | str = amount / statistics.median(machine.seconds_of(run, device) for _ in range(5))
        except RuntimeError as error:
            rate = one_line(error)
        put("ceilings", {name: rate})

    x, small = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (1 << (30 if gpu else 26), 8))
    note("copy GB/s", 2e-9 * x.nbytes, x.clone)
    adds = [machine.seconds_of(partial(torch.add, small, small), torch.device("cpu")) for _ in range(1000)]
    put("ceilings", {"torch.add host µs": 1e6 * statistics.median(adds)})
    if gpu:
        waits = [machine.seconds_of(lambda: small.add_(1).cpu(), torch.device("cpu")) for _ in range(20)]
        put("ceilings", {"launch and wait µs": 1e6 * statistics.median(waits)})
    one = torch.ones((), device=device)
    for name, sizes in SHAPES.items():
        rows, depth, columns = sizes if gpu else (size // 8 for size in sizes)
        a, b = (torch.randn(n, depth, device=device, dtype=torch.bfloat16) for n in (rows, columns))
        work = 2e-12 * rows * depth * columns
        note(f"{name} bf16 TFLOPS", work, partial(torch.mm, a, b.T))
        for kind in ("by row", "by tensor") if gpu else ():
            with suppress(RuntimeError):  # the chip or torch has no fp8
                a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
                scales = (one.repeat(rows, 1), one.repeat(1, columns)) if kind == "by row" else (one, one)
                product = partial(torch._scaled_mm, a8, b8.T, *scales, out_dtype=torch.bfloat16)
                note(f"{name} fp8 {kind} TFLOPS", work, product)
    return None if gpu else "no GPU: no fp8, and products of an eighth in each dimension"


def attention(level: int, apply: bool, report: Report, put: Put) -> str | None:
    """Sparse attention against the best dense one, chunk by chunk."""
    gpu = torch.cuda.is_available()
    bench = AttentionBench(1560, chunks=(2, 4, 7), repeats=(5, 7, 20)[level])
    if not gpu:
        bench = replace(bench, tokens_per_frame=390, heads=1, chunks=(7,), repeats=3)
    for sparsity in (0.6, 0.8, 0.88) if gpu else (0.88,):
        with _proving(apply):
            result = run_attention(replace(bench, sparsity=sparsity), str)
        for row in flat_rows(result):
            put("attention", {"sparsity": sparsity} | row)
    put("facts", {"no": result["not_here"]})
    return None if gpu else "no GPU: one head, a quarter of the tokens"


def forward(level: int, apply: bool, report: Report, put: Put) -> str | None:
    """One forward of the last chunk, as a graph too if possible; host against device."""
    device = Machine().prepare()
    bench = StepBench(7, picture=REAL, cuda_graph=not CudaRecorder.why_not(device), repeats=(5, 7, 20)[level])
    if device.type == "cpu":
        bench = replace(bench, model=replace(LITTLE, layers=1), picture=SMALL)
    with _proving(apply):
        result = run_step(bench)
    times = {f"{name} ms": 1e3 * arm["median"] for name, arm in result["arms"].items()}
    launch_bound = device.type == "cuda" and result["host_ms"] > times["sparse ms"]
    found = {"backend": result["backend"]["name"], "host ms": result["host_ms"], "launch bound": launch_bound}
    put("forward", times | found)
    return None if device.type == "cuda" else "no GPU: one layer of width 256 at 64×96"


def clip(level: int, apply: bool, report: Report, put: Put) -> str | None:
    """Whole videos with LightVAE, both arms by turns, and the decoding in them."""
    gpu = torch.cuda.is_available()
    bench = RolloutBench(81, decode=True, model=Model(layers=REAL_LAYERS), picture=REAL, rounds=(5, 7, 20)[level])
    if not gpu:
        bench = replace(bench, frames=21, vae_dim=4, model=LITTLE, picture=SMALL, rounds=1)
    with _proving(apply):
        result = run_rollout(bench, str)
    last = result["chunks"][-1]
    for arm, seconds in result["seconds"].items():
        put("clip", {f"{arm} FPS": bench.frames / seconds, f"{arm} last chunk ms": 1e3 * sum(last[arm].values())})
    put("clip", {"sparse / dense": result["dense_over_sparse"]["video"], "GB": result["peak_bytes"] / 1e9})
    put("clip", {"CUDA graphs": result["cuda_graphs"]["sparse"]})
    put("decode", {"ms per chunk": 1e3 * last["sparse"]["decode"]})
    return None if gpu else "no GPU: 21 frames of a tiny model and VAE at 64×96"


def faults(level: int, apply: bool, report: Report, put: Put) -> str | None:
    """Whether the next run is right after one was cancelled or had no memory, and whether a second card agrees."""
    device, bench = Machine().prepare(), RolloutBench(21, model=LITTLE, picture=SMALL)

    def latents(place: torch.device = device, on_step: Callable[[StepEvent], object] | None = None) -> Tensor:
        recipe = recipe_of(bench, schedule_of(bench, "sparse", bench.frames), place)
        made = [torch.empty(0)]
        with suppress(KeyboardInterrupt, torch.OutOfMemoryError):
            for chunk in rollout(random_wan(bench, place, torch.bfloat16), recipe, Runtime(on_step=on_step)):
                made.append(chunk.latents.cpu())
        return torch.cat(made, dim=2) if len(made) > 1 else made[0]

    def cancel(event: StepEvent) -> None:
        if event.chunk:
            raise KeyboardInterrupt

    whole = latents()
    put("faults", {"cancelled run keeps its chunk": torch.equal(latents(on_step=cancel), whole[:, :, :3])})
    put("faults", {"next run is right": torch.equal(latents(), whole)})
    if device.type == "cpu":
        return "no GPU: memory and a second card were not tried"
    balloon = []
    with suppress(torch.OutOfMemoryError):
        balloon.append(torch.empty(torch.cuda.mem_get_info()[0] - (64 << 20), dtype=torch.uint8, device=device))
    latents()
    balloon.clear()
    put("faults", {"run after one without memory is right": torch.equal(latents(), whole)})
    if torch.cuda.device_count() > 1:
        put("faults", {"second card agrees": torch.allclose(latents(torch.device("cuda:1")), whole, atol=0.05)})
    return None


def choices(level: int, apply: bool, report: Report, put: Put) -> None:
    """The choices that were measured on this machine, now or before."""
    put("choices", profile.as_json(Machine().prepare())["choices"])

"""`bench memory`: the estimate made before a run against the peak that the run really reaches.

The peak is what torch's own allocator hands out: its statistics on a GPU, its profiler's allocation events on a CPU,
which are exact where resident memory is not.
"""

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ..lightforcing_core.attention.dispatch import AttentionOptions, choose_backend
from ..lightforcing_core.memory.estimate import MemoryEstimate, ModelSize, estimate
from ..lightforcing_core.model.kv_storage import KVOptions
from ..lightforcing_core.model.wan import HEAD_DIM, random_state_dict, wan_from_state_dict
from ..lightforcing_core.rollout.rollout import few_step_sigmas, rollout
from ..lightforcing_core.rollout.schedule import Schedule
from ..lightforcing_core.vae.streaming import StreamingDecoder
from ..lightforcing_core.vae.tiled import TiledDecoder
from ..lightforcing_core.vae.wan_vae import random_vae_state_dict, vae_from_state_dict
from .record import facts


@dataclass(frozen=True)
class MemoryCase:
    """One run whose peak is estimated and measured; `schedule` is as long as it takes for the cache to fill."""

    name: str
    schedule: Schedule
    height: int
    width: int
    dim: int = 256
    ffn_dim: int = 1536
    layers: int = 4
    text_tokens: int = 512
    text_dim: int = 4096
    vae_dim: int | None = None
    batch: int = 1
    cfg: float = 1.0
    backend: str = "auto"
    dtype: str = "bfloat16"
    kv: KVOptions = field(default_factory=KVOptions)
    decode_tiles: int = 1


def _short(latent_frames: int) -> Schedule:
    return Schedule(latent_frames, target=0.88, base=0.98)


def _long(latent_frames: int) -> Schedule:
    return Schedule(latent_frames, target=0.85, base=0.95, window=12, sink_frames=1, sink_rope="follow")


# Small enough for two cores, each with another part in the lead.
CPU_CASES = (
    MemoryCase("dense, KV in the lead", Schedule(21), 192, 320, layers=8),
    MemoryCase("sparse, attention's own copies", _short(12), 240, 416, backend="flex"),
    MemoryCase("long video, sinks follow", _long(18), 192, 320, layers=6, backend="flex"),
    MemoryCase("decode in the lead", _short(6), 256, 384, dim=128, ffn_dim=512, layers=2, vae_dim=24),
    MemoryCase("guided batch of two", _short(9), 128, 192, batch=2, cfg=3.0),
    MemoryCase("8-bit KV cache", Schedule(21), 192, 320, layers=8, kv=KVOptions("int8")),
)

_REAL = MemoryCase("81 frames, sparse", _short(21), 512, 768, dim=1536, ffn_dim=8960, layers=30, vae_dim=24)
CUDA_CASES = (
    _REAL,
    replace(_REAL, name="81 frames, dense", schedule=Schedule(21)),
    replace(_REAL, name="81 frames at 480x832, sparse", height=480, width=832),
    replace(_REAL, name="long video, window 12", schedule=_long(18)),
    replace(_REAL, name="full Wan VAE", schedule=_short(9), vae_dim=96),
    replace(_REAL, name="full Wan VAE in 2x2 tiles", schedule=_short(9), vae_dim=96, decode_tiles=2),
    replace(_REAL, name="8-bit KV cache", kv=KVOptions("int8")),
    replace(_REAL, name="KV cache in host memory", kv=KVOptions(host=True)),
)


def run_memory(cases: tuple[MemoryCase, ...] | None = None, device_name: str = "cpu") -> dict[str, Any]:
    """Estimate and measure every case (default: those of this kind of device); the record of `bench memory`."""
    device = torch.device(device_name)
    cases = cases or (CUDA_CASES if device.type == "cuda" else CPU_CASES)
    rows = [_row(case, device) for case in cases]
    return {
        "bench": "memory",
        **facts(device, {"device": device_name}),
        "measured": "peak of torch's allocator from before the weights are made to the last decoded chunk",
        "largest_error": max(abs(row["error"]) for row in rows),
        "cases": rows,
    }


def _row(case: MemoryCase, device: torch.device) -> dict[str, Any]:
    expected, backend = _estimated(case, device)
    measured = measured_peak(case, device)
    return {
        "case": {**asdict(case), "schedule": asdict(case.schedule)},
        "backend": backend,
        "estimated_bytes": expected.total,
        "measured_bytes": measured,
        "error": expected.total / measured - 1.0,
        "parts": asdict(expected),
        "summary": str(expected),
    }


def _estimated(case: MemoryCase, device: torch.device) -> tuple[MemoryEstimate, str]:
    dtype = getattr(torch, case.dtype)
    tokens, heads = (case.height // 16) * (case.width // 16), case.dim // HEAD_DIM
    chunk, visible = max(case.schedule.chunk_lengths()), case.schedule.visible_frames()
    q, k = (
        torch.empty(case.batch, frames * tokens, heads, HEAD_DIM, dtype=dtype, device=device)
        for frames in (chunk, visible)
    )
    backend = choose_backend(q, k, k, backend=case.backend).name
    size = ModelSize.of_wan(dim=case.dim, ffn_dim=case.ffn_dim, layers=case.layers, text_dim=case.text_dim, dtype=dtype)
    expected = estimate(
        size,
        case.schedule,
        height=case.height,
        width=case.width,
        batch=case.batch,
        guided=case.cfg != 1.0,
        kv=case.kv,
        backend=backend,
        text_tokens=case.text_tokens,
        dtype=dtype,
        vae_dim=case.vae_dim,
        vae_dtype=dtype,
        decode_tiles=case.decode_tiles,
    )
    return expected, backend if case.schedule.target else "dense"


def measured_peak(case: MemoryCase, device: torch.device) -> int:
    """Bytes that torch's allocator held at the most while this case ran, over what it held before."""
    weights, vae_weights = _weights(case)
    for _ in _run(case, weights, vae_weights, device, _short(6)):  # compile outside the measurement
        pass
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in _run(case, weights, vae_weights, device, case.schedule):
            pass
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        for _ in _run(case, weights, vae_weights, device, case.schedule):
            pass
    return _peak_of_events(record)


def _weights(case: MemoryCase) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random state dicts, on the CPU, in float32: the run casts them and so owns its copies."""
    dit = random_state_dict(dim=case.dim, ffn_dim=case.ffn_dim, layers=case.layers, text_dim=case.text_dim)
    return dit, random_vae_state_dict(dim=case.vae_dim) if case.vae_dim else {}


def _run(
    case: MemoryCase,
    weights: dict[str, torch.Tensor],
    vae_weights: dict[str, torch.Tensor],
    device: torch.device,
    schedule: Schedule,
) -> Iterator[None]:
    dtype = getattr(torch, case.dtype)
    dit = wan_from_state_dict({name: _own(tensor, name, dtype, device) for name, tensor in weights.items()})
    decoder = None
    if vae_weights:
        vae: nn.Module = vae_from_state_dict(vae_weights, dtype=dtype, device=device)
        decoder = TiledDecoder(lambda: StreamingDecoder(vae), case.decode_tiles)
    text = torch.zeros(1, case.text_tokens, case.text_dim, dtype=dtype, device=device)
    chunks = rollout(
        dit,
        text,
        latent_shape=(case.batch, 16, schedule.latent_frames, case.height // 8, case.width // 8),
        frames_per_chunk=schedule.frames_per_chunk,
        sigmas=few_step_sigmas((1000, 500)),
        growth=schedule.sparsities(),
        window=schedule.window,
        sink_frames=schedule.sink_frames,
        sink_rope=schedule.sink_rope,
        cfg=case.cfg,
        negative=text.clone() if case.cfg != 1.0 else None,
        attention=AttentionOptions(backend=case.backend),
        kv=case.kv,
    )
    for chunk in chunks:
        if decoder is not None:
            decoder.decode(chunk.latents)
        del chunk
        yield


def _own(tensor: torch.Tensor, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return tensor.to(device, torch.float32 if name.startswith("patch_embedding.") else dtype, copy=True)


def _peak_of_events(record: profile) -> int:
    """The largest running sum of the profiler's allocations and frees, in bytes."""
    results: Any = record.profiler.kineto_results if record.profiler else None
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak

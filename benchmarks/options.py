"""`bench options`: the error and the time of one attention with each option beyond the published method.

Queries and keys are synthetic: smooth fields over time, rows and columns, with noise and a few loud tokens, rotated as
Wan rotates them. They show the effect of an option on data with structure; the effect on videos needs trained weights.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..lightforcing_core.attention.backends.dense import sdpa
from ..lightforcing_core.attention.blocks import tile_order
from ..lightforcing_core.model.rope import RopeTable
from .layer import CHUNKS, FRAMES, HEAD_DIM, LayerAttention, published
from .record import facts
from .settings import OptionsBench, Say
from .timing import ratio, samples_of, take_turns, warm_up_rule

PUBLISHED: dict[str, Any] = {"estimator": "mean", "tail": False, "tiles": False, "kv": "same"}
ARMS: dict[str, dict[str, Any]] = {
    "published": {},
    "lse": {"estimator": "lse"},
    "tail": {"tail": True},
    "tiles": {"tiles": True},
    "tail + tiles": {"tail": True, "tiles": True},
    "kv int8": {"kv": "int8"},
    "kv fp8": {"kv": "fp8"},
}


def run_options(bench: OptionsBench, say: Say) -> dict[str, Any]:
    """Measure every arm of `ARMS` against dense attention; returns the record of `bench options`."""
    device, dtype = bench.place.prepare()
    rows, columns = bench.picture.grid
    with torch.inference_mode():
        fields = {tiles: made(bench, tiles) for tiles in (False, True)}
        truth = {tiles: sdpa(*qkv) for tiles, qkv in fields.items()}
        tensors = {tiles: [x.to(device, dtype) for x in qkv] for tiles, qkv in fields.items()}
        arms, found = {}, {}
        for name, changes in ARMS.items():
            choice = PUBLISHED | changes
            options = {key: value for key, value in choice.items() if key != "kv"}
            arm = LayerAttention(
                *tensors[choice["tiles"]],
                tokens_per_frame=rows * columns,
                sparsity=bench.sparsity,
                options=replace(published(bench.backend, bench.picture.block), **options),
                kv=choice["kv"],
            )
            expected = truth[choice["tiles"]]
            error = float((arm().float().cpu() - expected).norm() / expected.norm())
            arms[name], found[name] = arm, {**choice, "backend": arm.backend, "error": error}
            say(f"{name} done")
        samples = take_turns({**arms, "dense": lambda: sdpa(*tensors[False])}, repeats=bench.repeats, device=device)
    timed = samples_of(samples)
    for name, row in found.items():
        row |= {
            "over_published": ratio(samples[name], samples["published"]),
            "dense_over_this": ratio(samples["dense"], samples[name]),
            "samples": timed[name],
        }
    return {
        "bench": "options",
        **facts(device, bench),
        "warm_up": warm_up_rule(bench.repeats),
        "error": "norm of the difference to dense float32 attention over its norm",
        "timed": "pooling the chunk, selection and attention; older keys are pooled, and 8-bit ones stored, already",
        "arms": found,
    }


def made(bench: OptionsBench, tiles: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the last chunk and keys and values of all frames, [1, L, H, 128] in float32, roped."""
    rows, columns = bench.picture.grid
    frames = CHUNKS * FRAMES
    generator = torch.Generator().manual_seed(0)

    def field() -> Tensor:
        coarse = torch.randn(1, bench.heads * HEAD_DIM, 6, 5, 7, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (frames, rows, columns), mode="trilinear", align_corners=True)
        return fine.flatten(2).transpose(1, 2).unflatten(2, (bench.heads, HEAD_DIM))

    k = field()
    q, v = k + 0.5 * field(), field()
    k, v = (x + 0.5 * torch.randn(x.shape, generator=generator) for x in (k, v))
    loud = torch.rand(1, k.shape[1], 1, 1, generator=generator) < 0.01
    k = torch.where(loud, 3.0 * k, k)
    order = tile_order(rows, columns, bench.picture.block[1]) if tiles else None
    table = RopeTable(0, frames, rows, columns, HEAD_DIM, order=order)
    if order is not None:
        q, k, v = (x.unflatten(1, (frames, -1))[:, :, order].flatten(1, 2) for x in (q, k, v))
    q, k = table.rotate(q), table.rotate(k)
    q = q[:, -FRAMES * rows * columns :]
    scores = (q[:, ::97] * HEAD_DIM**-0.5).transpose(1, 2) @ k[:, ::31].permute(0, 2, 3, 1)
    # Contiguous as in the model, since dense attention is slower on other layouts.
    return (q * (bench.sharpness / scores.std())).contiguous(), k.contiguous(), v.contiguous()

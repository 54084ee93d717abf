"""`bench options`: what each option beyond the published method does to the error and the time of one attention.

Queries and keys are made, not taken from a model: smooth fields over time, rows and columns, with noise and a few
loud tokens, rotated as Wan rotates them. They show how an option behaves on data with structure; what it does to
video only trained weights can tell.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..lightforcing_core.attention.blocks import FrameBlocks, tile_order
from ..lightforcing_core.attention.dispatch import choose_backend, sparse_attention
from ..lightforcing_core.attention.quantised import STORED, KVDtype, quantise_blocks
from ..lightforcing_core.attention.selection import SelectionPlan, sub_block_layout
from ..lightforcing_core.families import FAMILIES
from ..lightforcing_core.model.causal import sdpa
from ..lightforcing_core.model.rope import RopeTable
from .record import facts
from .timing import ratio, take_turns, warm_up_rule

HEAD_DIM = 128
CHUNK, FRAMES = 3, 21  # latent frames of a chunk, and of the video at its last chunk


@dataclass(frozen=True)
class OptionsBench:
    """What is measured: the last chunk of 81 frames at `height` × `width` video pixels, `sparsity` of it skipped.

    sharpness: standard deviation of the scaled scores; the higher, the fewer keys share the attention.
    """

    height: int = 512
    width: int = 768
    heads: int = 1
    sparsity: float = 0.88
    block: tuple[int, int] = (64, 64)
    sharpness: float = 2.0
    backend: str = "auto"
    device: str = "cpu"
    dtype: str = "bfloat16"
    repeats: int = 3
    seed: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return self.height // 16, self.width // 16


@dataclass(frozen=True)
class Choice:
    """One arm: the options that it sets."""

    estimator: str = "mean"
    tail: bool = False
    tiles: bool = False
    kv: KVDtype = "same"


ARMS = {
    "published": Choice(),
    "lse": Choice(estimator="lse"),
    "tail": Choice(tail=True),
    "tiles": Choice(tiles=True),
    "tail + tiles": Choice(tail=True, tiles=True),
    "kv int8": Choice(kv="int8"),
    "kv fp8": Choice(kv="fp8"),
}


def run_options(bench: OptionsBench, on_arm: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure every arm of `ARMS` against dense attention; the record that `bench options` writes."""
    device, dtype = torch.device(bench.device), getattr(torch, bench.dtype)
    with torch.inference_mode():
        raster, tiled = (made(bench, tiles) for tiles in (False, True))
        truth = {False: exact(*raster), True: exact(*tiled)}
        arms, rows = {}, {}
        for name, choice in ARMS.items():
            q, k, v = (x.to(device, dtype) for x in (tiled if choice.tiles else raster))
            arm, backend = _arm(bench, choice, q, k, v)
            error = (arm().float().cpu() - truth[choice.tiles]).norm() / truth[choice.tiles].norm()
            arms[name], rows[name] = arm, {**asdict(choice), "backend": backend, "error": float(error)}
            if on_arm is not None:
                on_arm(name)
        q, k, v = (x.to(device, dtype) for x in raster)
        samples = take_turns({**arms, "dense": lambda: sdpa(q, k, v)}, repeats=bench.repeats, device=device)
    for name, row in rows.items():
        row |= {
            "over_published": ratio(samples[name], samples["published"]),
            "dense_over_this": ratio(samples["dense"], samples[name]),
            "samples": samples[name].to_dict(),
        }
    return {
        "bench": "options",
        **facts(device, asdict(bench)),
        "warm_up": warm_up_rule(bench.repeats),
        "error": "norm of the difference to dense float32 attention over its norm",
        "timed": "pooling the chunk, selection and attention; older keys are pooled, and 8-bit ones stored, already",
        "arms": rows,
    }


def made(bench: OptionsBench, tiles: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the last chunk and keys and values of all frames, [1, L, H, 128] in float32, roped."""
    rows, columns = bench.grid
    generator = torch.Generator().manual_seed(bench.seed)

    def field(channels: int) -> Tensor:
        coarse = torch.randn(1, channels, 6, 5, 7, generator=generator)
        size = (FRAMES, rows, columns)
        return torch.nn.functional.interpolate(coarse, size=size, mode="trilinear", align_corners=True)[0]

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(1).t().unflatten(1, (bench.heads, HEAD_DIM))[None]

    width = bench.heads * HEAD_DIM
    shared = field(width)
    q, k, v = (tokens(part) for part in (shared + 0.5 * field(width), shared, field(width)))
    k, v = (x + 0.5 * torch.randn(x.shape, generator=generator) for x in (k, v))
    loud = torch.rand(1, k.shape[1], 1, 1, generator=generator) < 0.01
    k = torch.where(loud, 3.0 * k, k)
    order = tile_order(rows, columns, bench.block[1]) if tiles else None
    table = RopeTable(0, FRAMES, rows, columns, HEAD_DIM, order=order)
    if order is not None:
        q, k, v = (x.unflatten(1, (FRAMES, -1))[:, :, order].flatten(1, 2) for x in (q, k, v))
    q, k = table.rotate(q), table.rotate(k)
    q = q[:, -CHUNK * rows * columns :]
    scores = (q[:, ::97] * HEAD_DIM**-0.5).transpose(1, 2) @ k[:, ::31].permute(0, 2, 3, 1)
    # Laid out as the model's: dense attention over anything else is slower than it need be.
    return (q * (bench.sharpness / scores.std())).contiguous(), k.contiguous(), v.contiguous()


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention in float32, head by head."""
    return torch.cat([sdpa(*(x[:, :, h : h + 1] for x in (q, k, v))) for h in range(q.shape[2])], dim=2)


def _arm(bench: OptionsBench, choice: Choice, q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], Tensor], str]:
    """The attention of one choice, pooling and selection included, and the backend that runs it."""
    rows, columns = bench.grid
    q_layout, k_layout = (FrameBlocks(rows * columns, size) for size in bench.block)
    sub_layout = sub_block_layout(k_layout)
    family = FAMILIES["light_forcing_short"]
    plan = SelectionPlan.build(
        range(FRAMES),
        CHUNK,
        k_layout,
        sparsity=bench.sparsity,
        keep_frames=family.keep_frames,
        sink_frames=family.keep_sink,
        near_frames=family.keep_near,
        device=k.device,
    )
    means = k_layout.block_means(k)
    frame_means, v_means = k_layout.frame_means(means), k_layout.block_means(v)
    sub_means = sub_layout.block_means(k) if choice.estimator == "lse" else None
    scales = None
    stored_k, stored_v = k, v
    if choice.kv != "same":
        (stored_k, k_scales), (stored_v, v_scales) = (quantise_blocks(x, k_layout, STORED[choice.kv]) for x in (k, v))
        scales = k_scales, v_scales
    own = slice(k.shape[1] - q.shape[1], None)

    def attend() -> Tensor:
        (k_layout if sub_means is None else sub_layout).block_means(k[:, own])
        if choice.tail:
            k_layout.block_means(v[:, own])
        selection = plan.select(
            q_layout.block_means(q), means, frame_means, estimator=choice.estimator, sub_means=sub_means
        )
        return sparse_attention(
            q,
            stored_k,
            stored_v,
            selection=selection,
            tokens_per_frame=rows * columns,
            block=bench.block,
            backend=bench.backend,
            scales=scales,
            tail=(means, v_means) if choice.tail else None,
        )

    chosen = choose_backend(q, stored_k, block=bench.block, backend=bench.backend, tail=choice.tail)
    return attend, chosen.name

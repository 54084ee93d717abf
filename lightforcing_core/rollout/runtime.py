"""How a rollout runs on this machine, and its reports; nothing here is saved with a run."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..attention.backends.base import DenseAttention
from ..attention.backends.dense import FastestDense
from ..model.causal import Pass
from ..model.cuda_graph import CudaGraph
from ..model.kv_storage import KVOptions
from ..parallel.shares import Exchange
from ..pinned import Weights
from ..refusal import check_choice
from .recipe import Noise, Recipe
from .record import RunRecorder

Denoise = Callable[[Tensor, float, Sequence[Pass]], Tensor]
Replay = Literal["all", "window"]


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: its index in the video, its first latent frame and latents [B, C, frames, h, w].

    begun: noisy latents of the chunks behind it that were denoised with it, if any; a continued run needs them.
    """

    index: int
    start_frame: int
    latents: Tensor
    begun: Tensor | None = None


@dataclass(frozen=True)
class StepEvent:
    """One finished denoising step: the `step`-th of `steps` (from 0) of the `chunk`-th of `chunks` generated chunks.

    With chunks that are denoised at once, it is that of the first of them, and counts their common steps.
    index, start_frame: of the chunk in the video, see `Chunk`.
    done, total: steps of the whole run.
    x, x0: [B, C, frames, h, w], the step's input and its prediction.
    density, no_backend: see `ChunkAttention`. If queries and keys decide the density, it is that of the last chunk of
        which it is recorded, or None.
    """

    chunk: int
    chunks: int
    index: int
    start_frame: int
    step: int
    steps: int
    done: int
    total: int
    x: Tensor
    x0: Tensor
    density: float | None
    no_backend: str | None = None


@dataclass(frozen=True, eq=False)
class Runtime:
    """How a recipe runs on this machine. Raises Refusal for choices that do not exist.

    device, dtype: of the KV cache and the computation; None takes the prompt's device and the model's dtype.
    kv: how the KV cache is kept.
    dense_attention: dense attention over [B, L, H, D].
    noise: called as noise(chunk_index, draw, shape); draw 0 is the chunk's initial noise, draw s ≥ 1 the fresh noise
        after denoising step s. None draws the recipe's own.
    denoise: denoise(x, sigma, passes) → x0, for callers that run the model and do the guidance themselves; x is float32
        [B, C, f, h, w]. A step has a pass for each of the recipe's guides, a commit has one; see `causal.Pass`.
    replay: how a continued video is read again. "all" feeds every frame, so that the result equals one long run;
        "window" only the frames that later chunks may see, at a cost that does not grow with the video.
    on_step: called after every denoising step.
    direct: called as direct(recipe, chunk_index) before each chunk that is generated; returns the recipe to follow from
        that chunk on, the same one or `recipe.with_prompt(…)` of a prompt that starts there. The last one returned, run
        from the start, gives the same video. With several ranks it must return the same to each.
    recorder: records the blocks that the run reads and the time it takes.
    measuring: a context in which `machine` measures, before the first chunk and after the last: it runs single layers,
        through `denoise` if that is given. None is `machine.measuring`, or no measurement if `denoise` is given.
    cuda_graph: whether passes are launched as CUDA graphs, see `cuda_graph`; "auto" does so if possible and otherwise
        records why not, "on" refuses to run without.
    weights: keeps the model's weights in place for graphs; None if they do not move.
    exchange: the ranks that compute this video together, each in a call of its own with the same recipe and the same
        other choices; None if this one does so alone. Every rank yields every chunk.
    """

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    kv: KVOptions = field(default_factory=KVOptions)
    dense_attention: DenseAttention = field(default_factory=FastestDense)
    noise: Noise | None = None
    denoise: Denoise | None = None
    replay: Replay = "all"
    on_step: Callable[[StepEvent], object] | None = None
    direct: Callable[[Recipe, int], Recipe] | None = None
    recorder: RunRecorder | None = None
    cuda_graph: CudaGraph = "auto"
    measuring: Callable[[], AbstractContextManager[None]] | None = None
    weights: Weights | None = None
    exchange: Exchange | None = None

    def __post_init__(self) -> None:
        check_choice("replay", self.replay, Replay)
        check_choice("cuda_graph", self.cuda_graph, CudaGraph)

"""Estimate a run's memory before it starts: weights, KV cache, step, decode.

Nothing is looked up in a table: one layer's forward and one chunk's decode run on tensors without data while their
allocations are counted, so the estimate follows the code when the code changes.
"""

import functools
import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ...kernels.layer_memory import LayerMemory
from ..attention.backends import BACKENDS, DENSE
from ..attention.backends.base import Backend, DenseAttention
from ..attention.blocks import FrameBlocks
from ..attention.chunk import shapes_of
from ..attention.options import AttentionOptions
from ..attention.policies import View
from ..attention.quantised import STORED
from ..checkpoint.load import WanSize
from ..model.causal import ModelState, TextMemory, predict
from ..model.joint_cache import JointCache
from ..model.kv_cache import KVCache
from ..model.kv_storage import CacheShape, KVOptions
from ..model.wan import HEAD_DIM, Wan
from ..parallel.shares import parts_of, shares_of
from ..rollout.recipe import Recipe
from ..vae.streaming import FRAMES_AT_ONCE, StreamingDecoder
from ..vae.tiled import TiledDecoder, tile_spans
from ..vae.wan_vae import WanVAE


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run needs. `step` and `decode` alternate unless overlapped; the rest is held throughout.

    cache: keys, values, pooled keys and sink originals.
    prompt: the text and its keys and values in every layer.
    step, decode: the activations of one forward, and of decoding one chunk, its frames included.
    history: the frames that the decoder keeps between chunks.
    host: pinned CPU memory, which is not part of the total.
    overlapped: whether a chunk is decoded while the next one is sampled.
    graph: the activations that a recorded step and a recorded decode keep to themselves.
    """

    weights: int
    cache: int
    prompt: int
    step: int
    vae: int = 0
    history: int = 0
    decode: int = 0
    host: int = 0
    overlapped: bool = False
    graph: int = 0

    @property
    def total(self) -> int:
        work = self.step + self.decode if self.overlapped else max(self.step, self.decode)
        return self.weights + self.vae + self.cache + self.prompt + self.history + self.graph + work

    def sped_up(self, *, overlap: bool, cuda_graph: bool) -> "MemoryEstimate":
        """The same run with overlapped decode and with recorded passes, if asked for."""
        return replace(self, overlapped=overlap, graph=self.step + self.decode if cuda_graph else 0)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "KV cache": self.cache, "one step": self.step + self.prompt}
        if self.vae:
            parts |= {"VAE": self.vae, "overlapped decode" if self.overlapped else "decode": self.decode + self.history}
        if self.graph:
            parts["CUDA graph"] = self.graph
        listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
        pinned = f" and {gib(self.host)} GiB of CPU memory" if self.host else ""
        return f"needs about {gib(self.total)} GiB ({listed}){pinned}"


def size_of(dit: Any) -> WanSize:
    """The sizes of a module tree in Wan's layout."""
    return WanSize(
        dim=dit.dim,
        ffn_dim=dit.blocks[0].ffn[0].out_features,
        layers=len(dit.blocks),
        text_dim=dit.text_embedding[0].in_features,
        parameters=sum(parameter.numel() for parameter in dit.parameters()),
    )


def estimate(
    model: WanSize,
    recipe: Recipe,
    *,
    weights: int,
    kv: KVOptions | None = None,
    backend: str = "triton",
    dtype: torch.dtype = torch.bfloat16,
    ranks: int = 1,
) -> MemoryEstimate:
    """The memory of a rollout of `recipe`, whose tensors may be on the meta device.

    weights: bytes of the model's on the device.
    backend: of sparse chunks, as `choose_backend` names it.
    dtype: of the computation.
    ranks: that compute the video together; the first one, which has most, is estimated.

    Not counted: decoding (see `decode_bytes`), the text encoder, and memory that an allocator wastes between tensors.
    """
    named = {one.name: one for one in (*BACKENDS, DENSE)}
    kv, passes = kv or KVOptions(), len(recipe.guides)
    heads = parts_of(model.dim // HEAD_DIM, ranks)[0]
    shape = recipe.cache_shape(layers=model.layers, heads=heads, head_dim=HEAD_DIM, dtype=dtype)
    batch, channels, _, height, width = recipe.latent_shape
    latents = batch, channels, recipe.pass_frames, height, width
    options = replace(recipe.attention, backend="auto" if backend == DENSE.name else backend)
    has_sparse_chunks = options.rule is not None and recipe.is_sparse
    # The Triton kernel reads an 8-bit cache in dense chunks too.
    runs = (*[named[backend]] * has_sparse_chunks, *[DENSE] * (options.backend != "triton"))
    step, prompt = _step_bytes(model, shape, latents, recipe.prompts[0].context.shape[1], options, runs, kv, ranks)
    cache = KVCache(shape, kv, "meta")
    joint = JointCache(cache, "meta").nbytes if recipe.attention.joint else 0
    return MemoryEstimate(
        weights=weights,
        cache=passes * (cache.nbytes + joint),
        prompt=passes * prompt,
        step=step,
        host=passes * cache.storage.host_bytes,
    )


@functools.lru_cache(maxsize=8)  # by sizes alone, so that no cached result keeps tensors
def _step_bytes(
    model: WanSize,
    shape: CacheShape,
    latents: tuple[int, ...],
    text_tokens: int,
    options: AttentionOptions,
    backends: tuple[Backend, ...],
    kv: KVOptions,
    ranks: int,
) -> tuple[int, int]:
    """Bytes of one forward's activations, and of the prompt's keys and values.

    latents: of the longest pass, [B, C, frames, h, w]. backends: those whose workspace attention takes.
    """
    layers, dtype, (batch, _, frames, _, _) = 2, shape.dtype, latents  # layer 2 finds the memory that layer 1 keeps
    q_layout = FrameBlocks(shape.tokens_per_frame, options.block[0])
    everything = View(range(shape.slots), frames, q_layout, shape.layout, batch, shape.heads, "meta", shape.grid)
    everything = everything._replace(pool=shape.pool)
    call = shapes_of(options, everything, shape.head_dim, dtype, STORED.get(kv.dtype, dtype))
    workspace = max((one.workspace(call) for one in backends), default=0)
    dit = meta_wan(model.dim, model.ffn_dim, layers, model.text_dim, dtype)
    cache = KVCache(replace(shape, layers=layers), kv, "meta")
    shares = shares_of(_DryExchange(ranks), model.dim // HEAD_DIM, shape.tokens_per_frame)
    state = _DryState(cache, options, lambda q, k, v: torch.empty_like(q), shares=shares, workspace=workspace)
    state.open_chunk(frames, 0.0, "meta")
    timestep = torch.empty(batch, device="meta")
    with torch.no_grad(), AllocationPeak() as peak:
        x = torch.empty(latents, device="meta")
        text = torch.empty(batch, text_tokens, model.text_dim, dtype=dtype, device="meta")
        state.text = prompt = TextMemory(text)
        x0 = x - predict(dit, x.to(dtype), timestep, state).float()
        prompt_bytes = sum(k.nbytes + v.nbytes for k, v in prompt.keys_values)
        state.chunk.rope = None  # a chunk's first pass also makes its RoPE table
        peak.reset()
        predict(dit, x0.to(dtype), timestep, state)
    # One text serves a whole batch; its keys and values do not.
    return peak.peak - text.nbytes - prompt_bytes, text.nbytes // batch + model.layers * prompt_bytes // layers


@dataclass
class _DryExchange:
    """The first of ranks that exchange tensors without data."""

    size: int
    rank: int = 0

    def all_to_all(self, sent: Tensor, give: list[int], take: list[int]) -> Tensor:
        return sent.new_empty(sum(take))

    def agree(self, yes: bool) -> bool:
        return yes


@dataclass
class _DryState(ModelState):
    """Allocates the memory of attention to the history, `workspace` bytes and the output, without computing it."""

    workspace: int = 0

    def attend_history(self, q: Tensor, memory: LayerMemory, dense: DenseAttention | None = None) -> Tensor:
        _workspace = torch.empty(self.workspace, dtype=torch.uint8, device="meta")
        return torch.empty_like(q)


@functools.lru_cache(maxsize=16)
def decode_bytes(
    shape: tuple[int, ...], vae_dim: int, vae_dtype: torch.dtype, tiles: int = 0, *, on_host: bool = False
) -> dict[str, Any]:
    """vae, history and decode of `MemoryEstimate` for chunks of latents [B, C, frames, h, w].

    vae_dim: the width of the VAE: 24 LightVAE, 96 Wan's own.
    tiles: per side, see `TiledDecoder`; 0 decodes `FRAMES_AT_ONCE` latent frames of a picture at once.
    on_host: on the CPU, where tiles that wait take the same memory.
    """
    with torch.device("meta"):
        vae = WanVAE(vae_dim).to(vae_dtype)
    at_once = FRAMES_AT_ONCE if tiles == 0 and not on_host else 1
    decoder = TiledDecoder(lambda: StreamingDecoder(vae, at_once=at_once), tiles)
    latents = torch.empty(shape, device="meta")
    with AllocationPeak(convolutions_copy=True) as peak:
        decoder.decode(latents)
        peak.reset()
        decoder.decode(latents)  # the state that the first chunk left is replaced piece by piece
    history = decoder.cache_bytes
    decode = peak.peak - history
    if not on_host:
        history //= len(tile_spans(shape[-2], tiles)) * len(tile_spans(shape[-1], tiles))
    return {"vae": sum(tensor.nbytes for tensor in vae.parameters()), "history": history, "decode": decode}


def meta_wan(dim: int, ffn_dim: int, layers: int, text_dim: int, dtype: torch.dtype) -> Wan:
    with torch.device("meta"):
        tree = Wan(dim=dim, ffn_dim=ffn_dim, num_layers=layers, text_dim=text_dim).to(dtype)
        tree.patch_embedding.float()
    return tree.requires_grad_(False)


class AllocationPeak(TorchDispatchMode):
    """Counts the bytes of tensors made inside it, and the most that were alive at once; views cost nothing.

    convolutions_copy: take a convolution to hold its input and output once more while it runs, as oneDNN and cuDNN
    do to bring them into their own layouts.
    """

    def __init__(self, *, convolutions_copy: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._convolutions_copy = convolutions_copy
        self._sizes: dict[int, int] = {}
        self._now = self.peak = 0

    def reset(self) -> None:
        """Forget the peak so far, but not live tensors."""
        self.peak = self._now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes and storage._cdata not in given:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata)
        workspace = 0
        if self._convolutions_copy and func is torch.ops.aten.convolution.default:
            workspace = args[0].nbytes + out.nbytes
        self.peak = max(self.peak, self._now + workspace)
        return out

    def _forget(self, storage: int) -> None:
        self._now -= self._sizes.pop(storage)


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"

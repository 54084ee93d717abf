"""The causal forward pass over any Wan-layout module tree: one chunk of frames against the KV cache.

It drives the tree's own submodules by Wan's attribute names and never touches their raw weights, so quantised,
offloaded and LoRA-patched layers keep working, in ComfyUI as without it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention.blocks import FrameBlocks, tile_order
from ..attention.dispatch import AttentionOptions, BackendChoice, choose_backend, dense_attention_8bit, sparse_attention
from ..attention.selection import BlockSelection, SelectionPlan
from ..pinned import sent
from . import fused
from .cuda_graph import StepGraph
from .kv_cache import KVCache
from .kv_storage import KeysValues
from .rope import RopeTable

# The noise of given last frames as a share of a step's own. With all of it the first step, which settles the most, sees
# nothing of them; with none of it a model takes them for its past and is not led. Of what was measured with the demo
# model this leads best, from 0.6 to 0.85 nearly alike.
GIVEN_NOISE = 0.75

DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
Watch = Callable[[int, BlockSelection, BackendChoice], object]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention through torch, [B, L, H, D] in and out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@dataclass
class CausalState:
    """What one rollout remembers between forward passes.

    `dense_attention` runs dense chunks and cross-attention. `clean` is set for the pass that only commits a
    finished chunk. `text` is the prompt to follow, [B, tokens, text_dim]. `watch` is told of every sparse
    self-attention: its layer, the blocks it read and the backend. The other fields are set by `open_chunk` and filled
    by the first forward of a chunk or a prompt: `order` is that of a frame's tokens where it is not row by row, and
    `order_back` its inverse; `selections` are those of the last step by layer, `passes` counts the chunk's forwards.
    `graph` runs forwards as a CUDA graph; `steps`, how many the open chunk will have, tells it whether that pays.
    `given`: how many of the open chunk's last frames are given, and so have `GIVEN_NOISE` of a step's noise.
    """

    cache: KVCache
    attention: AttentionOptions
    dense_attention: DenseAttention = sdpa
    clean: bool = False
    frames: int = 0
    start_frame: int = 0
    plan: SelectionPlan | None = None
    text: Tensor | None = None
    cross: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rope: RopeTable | None = None
    order: Tensor | None = None
    order_back: Tensor | None = None
    selections: dict[int, BlockSelection] = field(default_factory=dict)
    passes: int = 0
    watch: Watch | None = None
    steps: int = 0
    given: int = 0
    graph: StepGraph | None = None

    def open_chunk(self, frames: int, sparsity: float, device: torch.device | str | None) -> None:
        """Begin the next `frames` latent frames, which skip the share `sparsity` of key blocks (0: dense)."""
        self.cache.open(frames)
        self._begin()
        if sparsity > 0.0 and len(self.cache.slot_frames) > frames:
            self.plan = SelectionPlan.build(
                self.cache.slot_frames,
                frames,
                self.cache.layout,
                sparsity=sparsity,
                keep_frames=self.attention.keep_frames,
                sink_frames=self.attention.sink_frames,
                near_frames=self.attention.near_frames,
                device=device,
            )

    def follow(self, text: Tensor) -> None:
        """From now on the prompt is `text`, [B, tokens, text_dim]."""
        if self.graph is not None:
            self.graph.forget()
        self.text = text
        self.cross.clear()

    def reopen_visible(self) -> None:
        """Begin a pass that recomputes every visible frame that is no sink, all of them at once and dense."""
        self.cache.reopen()
        self._begin()

    def attend_history(self, q: Tensor, kv: KeysValues) -> Tensor:
        """Dense attention of the chunk to all that is visible, [B, L, H, D] in and out."""
        if kv.scales is None:
            return self.dense_attention(q, kv.k, kv.v)
        frame, block = self.cache.layout.tokens_per_frame, self.cache.layout.block
        return dense_attention_8bit(
            q, kv.k, kv.v, kv.scales, tokens_per_frame=frame, block_k=block, backend=self.attention.backend
        )

    def select(self, layer: int, q: Tensor, q_means: Tensor | None) -> BlockSelection:
        """The key blocks that the chunk's roped queries [B, L, H, D] read in `layer`; q_means: their block means."""
        assert self.plan is not None
        selection = self.selections.get(layer)
        if selection is None:
            options, cache = self.attention, self.cache
            if q_means is None:
                q_means = FrameBlocks(cache.layout.tokens_per_frame, options.block[0]).block_means(q)
            selection = self.plan.select(
                q_means,
                cache.block_means(layer),
                cache.frame_means(layer),
                estimator=options.estimator,
                sub_means=cache.sub_means(layer) if options.estimator == "lse" else None,
            )
            if options.reuse_steps > 1:
                self.selections[layer] = selection
        return selection

    def _begin(self) -> None:
        if self.graph is not None:
            self.graph.forget()
        frames = self.cache.current_frames
        self.frames, self.start_frame = len(frames), frames[0] if frames else 0
        self.rope = self.plan = None
        self.selections.clear()
        self.passes = self.steps = self.given = 0

    def close(self) -> None:
        """Free all memory; the state is of no use afterwards."""
        if self.graph is not None:
            self.graph.free()
        self.cache.free()
        self.cross.clear()
        self.selections.clear()
        self.rope = self.plan = self.order = self.order_back = None

    @property
    def density(self) -> float:
        """The share of visible key blocks that the open chunk attends to."""
        if self.plan is None:
            return 1.0
        return self.plan.kept / (len(self.cache.slot_frames) * self.cache.layout.per_frame)


def forward(dit: Any, x: Tensor, timestep: Tensor, context: Tensor, state: CausalState) -> Tensor:
    """Predict the flow of the open chunk and store its keys and values.

    dit: a Wan 2.1 T2V module tree. x: [B, C, F, h, w] noisy (or clean) latents of the open chunk, in the compute
    dtype. timestep: [B] or per frame [B, F], on the 0…1000 scale; for given frames it is made less here. context:
    [B, tokens, text_dim] text embeddings, read by the first call of a prompt only. Returns the flow `noise − x0`,
    [B, C, F, h, w]; a clean pass (`state.clean`) stops once the last layer's keys and values are stored and returns
    zeros.

    Raises ValueError when frames or size do not fit the open chunk. Source: Wan 2.1; Self Forcing's causal form.
    """
    _, _, frames, height, width = x.shape
    if frames != state.frames:
        raise ValueError(f"x holds {frames} latent frames but the open chunk has {state.frames}; open_chunk() first")
    tokens = state.cache.layout.tokens_per_frame
    if height % 2 or width % 2 or height * width != 4 * tokens:
        raise ValueError(f"latents of {height}×{width} are not {tokens} tokens per frame of 2×2 patches")
    if state.given:
        timestep = _with_given(timestep, frames, state.given)
    if state.graph is not None:
        return state.graph(_forward, dit, x, timestep, context, state)
    return _forward(dit, x, timestep, context, state)


def _forward(dit: Any, x: Tensor, timestep: Tensor, context: Tensor, state: CausalState) -> Tensor:
    """`forward`, checked. From a chunk's second pass on all of it is work on the device: see `step_graph`."""
    batch, _, frames, height, width = x.shape
    grid = (frames, height // 2, width // 2)
    hidden = dit.patch_embedding(x.float()).to(x.dtype).flatten(2).transpose(1, 2)
    e = dit.time_embedding(_sinusoid(dit.freq_dim, timestep.flatten()).to(x.dtype))
    e = e.unflatten(0, (batch, -1))
    e0 = dit.time_projection(e).unflatten(2, (6, -1))
    if not state.cross:
        state.cross = _cross_keys_values(dit, dit.text_embedding(context))
    if state.attention.tiles and state.order is None:
        state.order = sent(tile_order(*grid[1:], state.attention.block[1]), x.device)
        state.order_back = state.order.argsort()
    if state.rope is None:
        wide = torch.promote_types(x.dtype, torch.float32)
        head_dim = state.cache.head_dim
        state.rope = RopeTable(state.start_frame, *grid, head_dim, order=state.order, dtype=wide, device=x.device)
    if state.clean or state.passes % state.attention.reuse_steps == 0:
        state.selections.clear()
    state.passes += 1
    if state.order is not None:
        hidden = _reordered(hidden, state.order)

    last = len(dit.blocks) - 1
    for index, block in enumerate(dit.blocks):
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = _modulation(block.modulation, e0)
        y = _self_attention(
            block.self_attn, fused.norm_scale_shift(block.norm1, hidden, scale_sa, shift_sa), index, state, last
        )
        if y is None:
            return torch.zeros_like(x)
        hidden = fused.gated_add(hidden, y, gate_sa)
        hidden = hidden + _cross_attention(block.cross_attn, block.norm3(hidden), *state.cross[index], state)
        y = block.ffn(fused.norm_scale_shift(block.norm2, hidden, scale_ffn, shift_ffn))
        hidden = fused.gated_add(hidden, y, gate_ffn)

    shift, scale = _modulation(dit.head.modulation, e.unsqueeze(2))
    out = dit.head.head(fused.norm_scale_shift(dit.head.norm, hidden, scale, shift))
    if state.order_back is not None:
        out = _reordered(out, state.order_back)
    return _unpatchify(out, grid)


def _self_attention(attention: Any, x: Tensor, layer: int, state: CausalState, last: int) -> Tensor | None:
    """Self-attention of the chunk over everything it may see; None where only the store was needed."""
    assert state.rope is not None
    only_store = state.clean and layer == last
    block_q = state.attention.block[0]
    q, q_means = fused.store(attention, x, layer, state.cache, state.rope, block_q, only_store=only_store)
    if q is None:
        return None
    kv = state.cache.kv(layer)
    if state.plan is None:
        return attention.o(state.attend_history(q, kv).flatten(2))
    layout, options = state.cache.layout, state.attention
    selection = state.select(layer, q, q_means)
    tail = (state.cache.block_means(layer), state.cache.value_means(layer)) if options.tail else None
    y = sparse_attention(
        q,
        kv.k,
        kv.v,
        selection=selection,
        scales=kv.scales,
        tail=tail,
        tokens_per_frame=layout.tokens_per_frame,
        block=options.block,
        backend=options.backend,
    )
    if state.watch is not None:
        choice = choose_backend(
            q,
            kv.k,
            block=options.block,
            backend=options.backend,
            tail=options.tail,
            tokens_per_frame=layout.tokens_per_frame,
        )
        state.watch(layer, selection, choice)
    return attention.o(y.flatten(2))


def _cross_keys_values(dit: Any, context: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer's cross-attention, [B, tokens, H, 128]: once per prompt."""
    pairs = []
    for block in dit.blocks:
        attention = block.cross_attn
        heads = (attention.num_heads, -1)
        k = attention.norm_k(attention.k(context)).unflatten(-1, heads)
        pairs.append((k, attention.v(context).unflatten(-1, heads)))
    return pairs


def _cross_attention(attention: Any, x: Tensor, k: Tensor, v: Tensor, state: CausalState) -> Tensor:
    """Attention of the chunk to every text slot, the padded ones included."""
    q = attention.norm_q(attention.q(x)).unflatten(-1, (attention.num_heads, -1))
    return attention.o(state.dense_attention(q, k, v).flatten(2))


def _sinusoid(dim: int, position: Tensor) -> Tensor:
    """[n] timesteps → [n, dim], cosines first. float32, as the host computes it."""
    half = dim // 2
    position = position.to(torch.promote_types(position.dtype, torch.float32))
    # On the device from the start: a copy from the host would wait, and cannot be recorded.
    frequencies = torch.pow(10000, -torch.arange(half, dtype=position.dtype, device=position.device).div(half))
    angles = torch.outer(position, frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _with_given(timestep: Tensor, frames: int, given: int) -> Tensor:
    """[B] or [B, F] timesteps → [B, F], those of the `given` last frames as small as their noise."""
    each = timestep.reshape(len(timestep), -1).expand(-1, frames)
    return torch.cat([each[:, :-given], GIVEN_NOISE * each[:, -given:]], dim=1)


def _modulation(parameter: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """(parameter + e) split over its parts: each [B, F or 1, D]."""
    return (parameter.to(device=e.device, dtype=e.dtype).unsqueeze(0) + e).unbind(2)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of every frame in another order: [B, F · tokens, D], order [tokens]."""
    return x.unflatten(1, (-1, len(order))).index_select(2, order).flatten(1, 2)


def _unpatchify(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B, f · h · w, 2 · 2 · C], channels fastest → [B, C, f, 2h, 2w]."""
    batch, (frames, height, width) = x.shape[0], grid
    x = x.view(batch, frames, height, width, 2, 2, -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, 2 * height, 2 * width)

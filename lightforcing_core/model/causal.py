"""The causal forward pass of a Wan-layout tree: one chunk against the KV cache.

It drives the tree's own submodules by Wan's attribute names and never touches their raw weights, so quantised,
offloaded and LoRA-patched layers keep working, in ComfyUI as without it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...kernels.layer_memory import LayerMemory
from .. import machine
from ..attention.backends.base import Call, DenseAttention
from ..attention.backends.dense import FastestDense, sdpa
from ..attention.blocks import FrameBlocks, tile_order
from ..attention.chunk import ChunkAttention, plan_chunk
from ..attention.dispatch import BackendChoice, attend, dense_attention_8bit
from ..attention.options import AttentionOptions
from ..attention.policies import GatedPlan, View
from ..attention.policies.echo import query_sums
from ..attention.policies.pool import importance
from ..attention.roles import Roles, group_masses
from ..attention.selection import BlockSelection
from ..parallel.shares import WHOLE, Shares
from ..pinned import to_device
from . import fused
from .kv_cache import KVCache
from .rope import RopeTable

# The noise of given last frames as a share of a step's own. At 1 the first step, which decides the most, cannot see
# them; at 0 the model takes them for its past and does not move towards them. With the demo model this value led best;
# values from 0.6 to 0.85 were nearly as good.
GIVEN_NOISE = 0.75
SLOTS = 64  # text slots are left out by so many, so that few widths are measured; torch copies masks of odd widths
CROSS_WORK = "attention of {1} queries to {4} text slots, {0}×{2} heads of {3}, {5} in use, in {6}"
ALL_SLOTS, FEW_SLOTS = "all slots", "the padding as one"

# Runs a pass as `run_pass` does, with the same arguments.
Run = Callable[..., Tensor]
# Called with the layer, the blocks it read and the backend of every sparse self-attention.
Watch = Callable[[int, BlockSelection, BackendChoice], object]


@dataclass(eq=False)
class OpenChunk:
    """State of one open chunk; a new object makes recorded passes out of date.

    positions: of its frames in time, see `KVCache.jump`.
    steps, later: the number of denoising steps left, and of chunks after this one, from which a `StepGraph` decides
    whether recording pays.
    given: the number of last frames that are given, and so get `GIVEN_NOISE` of a step's noise.
    passes: the number of passes so far. The first one makes `rope` and `layers`, the modules that later ones run.
    masses: of each layer so far, if a pass is to show the roles of heads, the importance of blocks or the direction of
    queries: `group_masses`, `importance` or `query_sums`.
    """

    frames: int = 0
    start_frame: int = 0
    positions: Sequence[int] = ()
    attention: ChunkAttention = field(default_factory=ChunkAttention)
    steps: int = 0
    later: int = 0
    given: int = 0
    passes: int = 0
    rope: RopeTable | None = None
    layers: list[SimpleNamespace] = field(default_factory=list)
    masses: list[Tensor] | None = None


@dataclass(eq=False)
class TextMemory:
    """The prompt [B, tokens, text_dim], and each layer's keys and values [B, tokens, H, D], made when first needed.

    bias: see `padding_bias`; on a CPU there is none, so that results stay the same bit for bit.
    """

    embeds: Tensor
    keys_values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    bias: Tensor | None = None


class TokenOrder(NamedTuple):
    """An order of a frame's tokens, and its inverse: int64 [tokens] each."""

    order: Tensor
    back: Tensor


@dataclass
class ModelState:
    """State of one rollout: the cache, the prompt, the open chunk.

    dense_attention: runs dense chunks and cross-attention. order: made by the first pass, if `attention` asks for one.
    guide: the index of its prompt in `Recipe.guides`.
    width: entries of each list of key blocks, if sparse chunks shall launch the same work on lists of any length.
    roles: of all heads, () as long as they are not known. changed: see `View`.
    shares: the part of it that this rank has; the cache is of its heads.
    """

    cache: KVCache
    attention: AttentionOptions
    dense_attention: DenseAttention = sdpa
    guide: int = 0
    width: int = 0
    text: TextMemory | None = None
    order: TokenOrder | None = None
    chunk: OpenChunk = field(default_factory=OpenChunk)
    roles: Roles = ()
    changed: Tensor | None = None
    shares: Shares = WHOLE

    def __post_init__(self) -> None:
        self.roles = self.roles or self.attention.roles
        self.q_layout = FrameBlocks(self.cache.layout.tokens_per_frame, self.attention.block[0])

    def open_chunk(
        self,
        frames: int,
        sparsity: float,
        device: torch.device | str | None,
        *,
        steps: int = 0,
        later: int = 0,
        given: int = 0,
    ) -> None:
        """Begin the next `frames` latent frames, skipping `sparsity` of the key blocks.

        steps, later, given: see `OpenChunk`.
        """
        self.cache.open(frames)
        shape, options = self.cache.shape, self.attention
        slots, layout = self.cache.slot_frames, self.cache.layout
        view = View(slots, frames, self.q_layout, layout, shape.batch, shape.heads, device)
        view = view._replace(grid=shape.grid, tiles=options.tiles, roles=self.shares.own_roles(self.roles))
        view = view._replace(changed=self.changed, pool=self.cache.pooled, shares=self.shares)
        attention = plan_chunk(options, view, sparsity, shape.head_dim, shape.dtype, self.cache.storage.dtype)
        if self.width:
            attention = attention.steady(shape.slots, self.width)
        start, positions = self.cache.current_frames[0], self.cache.positions
        self.chunk = OpenChunk(frames, start, positions, attention, steps, later, given)

    def reopen_visible(self) -> None:
        """Begin a dense pass that recomputes visible frames at once, see `KVCache.reopen`."""
        self.cache.reopen()
        frames = self.cache.current_frames
        self.chunk = OpenChunk(len(frames), frames[0] if frames else 0, self.cache.positions)

    @property
    def shows_roles(self) -> bool:
        """Whether the open chunk sees enough of its past for its clean pass to show the roles of heads."""
        rule, visible = self.attention.head_rule, len(self.cache.slot_frames)
        enough = 0 if rule is None else min(rule.probe_frames, self.cache.shape.slots)
        return self.chunk.frames < visible and visible >= enough

    def commit(self) -> None:
        """Keep the open chunk as history, with what its clean pass says about heads and changes."""
        rule, chunk, cache = self.attention.head_rule, self.chunk, self.cache
        if cache.shape.history and chunk.masses:
            cache.queries = chunk.masses
        cache.commit(self.shares.all_heads)
        if cache.shape.pool and chunk.masses:
            cache.importance = chunk.masses
        if rule is None:
            return
        if chunk.masses:
            self.roles = rule.decide(self.shares.all_heads(torch.stack(chunk.masses)))
        is_due = self.changed is not None or chunk.start_frame >= rule.split
        if is_due:
            keys_of = lambda layer: self.shares.all_heads(cache.keys_in_time(layer))  # noqa: E731
            self.changed = rule.changed(keys_of, cache.layout, self.roles)

    def follow(self, text: Tensor) -> None:
        """Make `text`, [B, tokens, text_dim], the prompt from now on."""
        self.text = TextMemory(text)

    def dense_for(self, module: Any) -> DenseAttention:
        """Dense attention of one attention module."""
        dense = self.dense_attention
        return dense.preferred.get(module, dense) if isinstance(dense, FastestDense) else dense

    def attend_history(self, q: Tensor, memory: LayerMemory, dense: DenseAttention | None = None) -> Tensor:
        """Dense attention of the chunk to all visible frames, [B, L, H, D]; by `dense` unless the cache is 8-bit."""
        if memory.scales is None:
            layout = self.cache.storage.layout
            return (dense or self.dense_attention)(q, layout.real(memory.keys), layout.real(memory.values))
        return dense_attention_8bit(
            q, memory.keys, memory.values, memory.scales, self.cache.layout, self.attention.backend
        )

    def close(self) -> None:
        """Free all memory; the state cannot be used afterwards."""
        self.cache.free()
        self.chunk = OpenChunk()
        self.text = self.order = None


def predict(dit: Any, x: Tensor, timestep: Tensor, state: ModelState, watch: Watch | None = None) -> Tensor:
    """Predict the flow `noise − x0` of the open chunk, and store its keys and values.

    dit: a Wan 2.1 T2V module tree.
    x: [B, C, F, h, w] noisy latents of the open chunk, in the compute dtype.
    timestep: [B] or per frame [B, F], on the 0…1000 scale; it is lowered here for given frames.
    watch: called for every sparse self-attention.

    Returns [B, C, F, h, w]. From a chunk's second call on everything here is work on the device, see `cuda_graph`.
    Raises ValueError when frames or size do not fit the open chunk. Source: Wan 2.1; Self Forcing's causal form.
    """
    chunk = state.chunk
    grid = _grid(x, state)
    if chunk.given:
        timestep = _with_given(timestep, chunk.frames, chunk.given)
    out = state.shares.all_tokens(dit.head.head(_run_layers(dit, x, timestep, grid, state, watch)))
    if state.order is not None:
        out = _reordered(out, state.order.back)
    return _unpatchify(out, grid)


def commit(dit: Any, x: Tensor, timestep: Tensor, state: ModelState) -> None:
    """Store keys and values of the open chunk's clean latents as history.

    Arguments and errors as those of `predict`. The pass ends once the last layer's keys and values are stored.
    """
    run_pass(dit, x, timestep, state, commits=True)
    state.commit()


def run_pass(
    dit: Any, x: Tensor, timestep: Tensor, state: ModelState, watch: Watch | None = None, *, commits: bool = False
) -> Tensor:
    """Run `predict`, or the pass of `commit`, which gives zeros because ComfyUI expects a flow."""
    if not commits:
        return predict(dit, x, timestep, state, watch)
    _run_layers(dit, x, timestep, _grid(x, state), state, only_store=True)
    return torch.zeros_like(x)


def prompt_modules(dit: Any) -> list[nn.Module]:
    """The modules that run once for each prompt, and not in every pass."""
    attentions = [block.cross_attn for block in dit.blocks]
    return [dit.text_embedding, *(part for one in attentions for part in (one.k, one.v, one.norm_k))]


def tables(dit: Any, x: Tensor, state: ModelState) -> list[Tensor]:
    """Tensors that a pass reads and that each chunk has of its own. Arguments as those of `predict`."""
    rope, *_ = _prepare(dit, x, _grid(x, state), state)
    plan = state.chunk.attention.plan
    return [rope.cos, rope.sin, *(plan.tables if plan else ())]


@dataclass(frozen=True)
class Pass:
    """One pass over the open chunk, for a `denoise` function to run: a step's prediction, or a commit of clean latents.

    run: `run_pass`, or a `StepGraph`. watch: see `predict`.
    shares: the noise of each frame as a share of the step's, float [F], if they differ: the flow is then scaled by it,
        so that the step's level gives each frame's x0.
    """

    state: ModelState
    commits: bool = False
    run: Run = run_pass
    watch: Watch | None = None
    shares: Tensor | None = None

    def __call__(self, dit: Any, x: Tensor, timestep: Tensor) -> Tensor:
        if self.shares is None:
            return self.run(dit, x, timestep, self.state, self.watch, commits=self.commits)
        flow = self.run(dit, x, timestep[:, None] * self.shares, self.state, self.watch)
        return flow * self.shares[:, None, None]  # in the wider dtype of the two


def _grid(x: Tensor, state: ModelState) -> tuple[int, int, int]:
    """Frames, rows and columns of the tokens of x; ValueError unless they fit the open chunk."""
    _, _, frames, height, width = x.shape
    if frames != state.chunk.frames:
        raise ValueError(f"x holds {frames} latent frames, the open chunk has {state.chunk.frames}; open_chunk() first")
    tokens = state.cache.layout.tokens_per_frame
    if height % 2 or width % 2 or height * width != 4 * tokens:
        raise ValueError(f"latents of {height}×{width} are not {tokens} tokens per frame of 2×2 patches")
    return frames, height // 2, width // 2


def _run_layers(
    dit: Any,
    x: Tensor,
    timestep: Tensor,
    grid: tuple[int, int, int],
    state: ModelState,
    watch: Watch | None = None,
    *,
    only_store: bool = False,
) -> Tensor:
    """Run all layers and the head's norm: [B, L, D] of this rank's tokens.

    only_store: end once the last layer has stored its keys and values; the result is then not meaningful.
    """
    rope, text, layers = _prepare(dit, x, grid, state)
    state.chunk.passes += 1
    hidden = dit.patch_embedding(x.float()).to(x.dtype).flatten(2).transpose(1, 2)
    e = dit.time_embedding(_sinusoid(dit.freq_dim, timestep.flatten()).to(x.dtype))
    e = e.unflatten(0, (len(x), -1))
    e0 = dit.time_projection(e).unflatten(2, (6, -1))
    if state.order is not None:
        hidden = _reordered(hidden, state.order.order)
    hidden = state.shares.own_tokens(hidden)

    # Each layer's six parts, then the head's shift and scale.
    steps = _modulations([block.modulation for block in dit.blocks], e0)
    steps += _modulations([dit.head.modulation], e.unsqueeze(2))
    _, y = fused.add_norm(layers[0].norm1, hidden, None, None, steps[1], steps[0], layers[0].projections)
    following = [(block.norm1, block.projections) for block in layers[1:]] + [(dit.head.norm, ())]
    # A layer is not a function of its own: `hidden` out here would keep its input alive until the function returned.
    for layer, (block, (next_norm, readers)) in enumerate(zip(layers, following, strict=True)):
        if only_store and layer == len(layers) - 1 and state.chunk.masses is None:
            fused.store(
                block.self_attn, y, layer, state.cache, rope, state.attention.block[0], state.shares, with_q=False
            )
            break
        gate_sa, shift_ffn, scale_ffn, gate_ffn, next_shift, next_scale = steps[6 * layer + 2 : 6 * layer + 8]
        y = _self_attention(block.self_attn, y, layer, rope, state, watch)
        hidden, y = fused.add_norm(block.norm3, hidden, y, gate_sa, readers=(block.cross_attn.q,))
        y = _cross_attention(block.cross_attn, y, *text[layer], state)
        hidden, y = fused.add_norm(block.norm2, hidden, y, None, scale_ffn, shift_ffn, (block.ffn[0],))
        y = fused.feed_forward(block.ffn, y)
        hidden, y = fused.add_norm(next_norm, hidden, y, gate_ffn, next_scale, next_shift, readers)
    return y


def _prepare(
    dit: Any, x: Tensor, grid: tuple[int, int, int], state: ModelState
) -> tuple[RopeTable, list[tuple[Tensor, Tensor]], list[SimpleNamespace]]:
    """Make the chunk's rope and layers, the prompt's keys and values, and the order of tokens."""
    chunk, text = state.chunk, state.text
    if text is None:
        raise RuntimeError("no prompt is set; call follow() first")
    if not text.keys_values:
        text.keys_values = _cross_keys_values(dit, dit.text_embedding(text.embeds))
        text.bias = padding_bias(text.embeds, x.dtype) if x.is_cuda else None
    if state.attention.tiles and state.order is None:
        tiled = to_device(tile_order(*grid[1:], state.attention.block[1]), x.device)
        state.order = TokenOrder(tiled, tiled.argsort())
    if chunk.rope is None:
        head_dim, wide = state.cache.shape.head_dim, torch.promote_types(x.dtype, torch.float32)
        order = None if state.order is None else state.order.order
        chunk.rope = rope = RopeTable(chunk.positions, *grid[1:], head_dim, order=order, dtype=wide, device=x.device)
        rope.cos, rope.sin = map(state.shares.own_tokens, (rope.cos, rope.sin))
    chunk.layers = chunk.layers or [_looked_up(block, state) for block in dit.blocks]
    return chunk.rope, text.keys_values, chunk.layers


def _looked_up(block: Any, state: ModelState) -> SimpleNamespace:
    """A layer's modules as plain attributes, because `nn.Module` searches three tables for each; and their `dense`."""

    def some(module: Any, *names: str) -> SimpleNamespace:
        return SimpleNamespace(**{name: getattr(module, name) for name in names})

    found = some(block, "norm1", "norm2", "norm3", "ffn")
    found.self_attn = some(block.self_attn, "q", "k", "v", "o", "norm_q", "norm_k")
    found.cross_attn = some(block.cross_attn, "q", "o", "norm_q")
    found.self_attn.dense, found.cross_attn.dense = map(state.dense_for, (block.self_attn, block.cross_attn))
    found.projections = found.self_attn.q, found.self_attn.k, found.self_attn.v
    return found


def _self_attention(
    attention: Any, x: Tensor, layer: int, rope: RopeTable, state: ModelState, watch: Watch | None
) -> Tensor:
    block_q = state.attention.block[0]
    q, q_means = fused.store(attention, x, layer, state.cache, rope, block_q, state.shares)
    assert q is not None
    return _output(attention, state.shares.to_tokens(attended(q, q_means, layer, state, watch)))


def attended(q: Tensor, q_means: Tensor | None, layer: int, state: ModelState, watch: Watch | None = None) -> Tensor:
    """The open chunk's attention to what its cache holds of a layer, [B, L, H, D] in and out."""
    options, chunk = state.attention, state.chunk
    plan, chosen = chunk.attention.plan, chunk.attention.choice
    dense = chunk.layers[layer].self_attn.dense if chunk.layers else state.dense_attention
    if chunk.masses is not None and options.head_rule is not None:
        groups = options.head_rule.groups(len(state.cache.slot_frames) - chunk.frames, chunk.frames)
        sizes = [frames * state.q_layout.tokens_per_frame for frames in groups]
        chunk.masses.append(group_masses(q[0], state.cache.keys_in_time(layer), sizes))
    if chunk.masses is not None and options.pool_rule is not None:
        q_means = state.q_layout.block_means(q) if q_means is None else q_means
        held = state.cache.with_pool(layer).key_means
        assert held is not None
        chunk.masses.append(importance(q_means, held, state.cache.layout))
    if chunk.masses is not None and state.cache.shape.history:
        wide = torch.promote_types(q.dtype, torch.float32)
        shape = state.cache.shape
        rope = RopeTable(chunk.positions, *shape.grid, shape.head_dim, dtype=wide, device=q.device)
        chunk.masses.append(query_sums(rope.back(slice(None)).rotate(q.to(wide))))
    memory = state.cache.visible(layer)
    if plan is None or chosen is None:
        return state.attend_history(q, memory, dense)
    selection, whole = plan.of_layer(layer), state.cache.storage.at(layer) if plan.tables else None
    if not isinstance(selection, BlockSelection):
        plan = selection
        means = whole or memory
        sub_means = means.sub_means if options.estimator == "lse" else None
        assert means.key_means is not None  # a cache that never selects blocks keeps no means
        assert means.frame_means is not None
        q_means = state.q_layout.block_means(q) if q_means is None else q_means
        if isinstance(plan, GatedPlan) and plan.rule.similarity:
            plan = plan.seeing(state.q_layout.self_similarity(q), state.cache.self_similarity(layer))
        selection = plan.select(q_means, means.key_means, means.frame_means, sub_means)
    memory = state.cache.with_pool(layer)
    call = Call(
        q,
        memory.keys,
        memory.values,
        state.q_layout,
        state.cache.storage.layout,
        selection,
        scales=memory.scales,
        tail=memory.tail if options.tail else None,
        uneven=plan.uneven,
        dense=dense,
        whole=whole and (whole, plan.tables[-1]),
    )
    y, choice = attend(call, chosen, options.backend)
    if choice is not chosen:  # another backend failed
        chunk.attention = replace(chunk.attention, choice=choice)
    if watch is not None:
        watch(layer, selection, choice)
    return y


def _cross_keys_values(dit: Any, context: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer's cross-attention, [B, tokens, H, 128] each."""
    pairs = []
    for block in dit.blocks:
        attention = block.cross_attn
        heads = (attention.num_heads, -1)
        k = attention.norm_k(attention.k(context)).unflatten(-1, heads)
        pairs.append((k, attention.v(context).unflatten(-1, heads)))
    return pairs


def _cross_attention(attention: Any, x: Tensor, k: Tensor, v: Tensor, state: ModelState) -> Tensor:
    """Attention of the chunk to every text slot, the padded ones included; few of them stand for all if that pays."""
    q = fused.rms_norm(attention.norm_q, attention.q(x)).unflatten(-1, (-1, state.cache.shape.head_dim))
    bias, dense = state.text.bias if state.text else None, cast(DenseAttention, attention.dense)
    if bias is None:
        return _output(attention, dense(q, k, v))

    def attend(name: str) -> Tensor:
        if name == ALL_SLOTS:
            return dense(q, k, v)
        few = bias.shape[1]
        return sdpa(q, k[:, :few], v[:, :few], bias)

    facts, tolerance = (*q.shape, k.shape[1], bias.shape[1], q.dtype), machine.TOLERANCE[q.dtype.itemsize > 2]
    names = ALL_SLOTS, FEW_SLOTS
    way = machine.choose(CROSS_WORK, facts, q.device, names, attend, incumbent=ALL_SLOTS, tolerance=tolerance)
    return _output(attention, attend(way))


def padding_bias(embeds: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A bias of scores with which the first text slots stand for all: [1, width] in `dtype`; None if that saves none.

    embeds: [B, tokens, text_dim]. Slots behind a prompt are equal, and so are their keys and values; n of them count
    as much as one whose score is log(n) higher. Since 16 bits do not hold log(n), three slots share n. Waits once.
    """
    tokens = embeds.shape[1]
    equal = (embeds == embeds[:, -1:]).flatten(2).all(-1).all(0)
    padded = int(equal.flip(0).cumprod(0).sum())
    width = -(-(tokens - padded + 3) // SLOTS) * SLOTS
    if width >= tokens:
        return None
    left, terms = float(tokens - width + 3), list[float]()
    for last in (False, False, True):
        least = math.log(left) - (0 if last else 0.51 * torch.finfo(dtype).eps * abs(math.log(left)))
        terms.append(float(torch.tensor(least, dtype=dtype)))  # rounded; all but the last stay below `left`
        left -= math.exp(terms[-1])
    return torch.tensor([[0.0] * (width - 3) + terms], dtype=dtype, device=embeds.device)


def _output(attention: Any, y: Tensor) -> Tensor:
    """The output projection of attention's heads, [B, L, H, D] → [B, L, D]."""
    out: Tensor = attention.o(y.flatten(2))
    return out


def _sinusoid(dim: int, position: Tensor) -> Tensor:
    """[n] timesteps → [n, dim], cosines first. float32, as ComfyUI computes it."""
    half = dim // 2
    position = position.to(torch.promote_types(position.dtype, torch.float32))
    # On the device from the start: a copy from the CPU would wait, and cannot be recorded.
    frequencies = torch.pow(10000, -torch.arange(half, dtype=position.dtype, device=position.device).div(half))
    angles = torch.outer(position, frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _with_given(timestep: Tensor, frames: int, given: int) -> Tensor:
    """[B] or [B, F] timesteps → [B, F], lowered for the `given` last frames."""
    each = timestep.reshape(len(timestep), -1).expand(-1, frames)
    return torch.cat([each[:, :-given], GIVEN_NOISE * each[:, -given:]], dim=1)


def _modulations(parameters: list[Tensor], e: Tensor) -> list[Tensor]:
    """parameter + e for all parameters [1, parts, D] at once: each part [B, F or 1, D], in order.

    e: [B, F or 1, parts or 1, D].
    """
    stacked = torch.stack([parameter.to(device=e.device, dtype=e.dtype) for parameter in parameters])
    return list((stacked.transpose(1, 2).unsqueeze(3) + e.permute(2, 0, 1, 3)).flatten(0, 1).unbind())


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of every frame in another order: [B, F · tokens, D], order [tokens]."""
    framed: Tensor = x.unflatten(1, (-1, len(order)))
    return framed.index_select(2, order).flatten(1, 2)


def _unpatchify(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B, f · h · w, 2 · 2 · C], channels fastest → [B, C, f, 2h, 2w]."""
    batch, (frames, height, width) = x.shape[0], grid
    x = x.view(batch, frames, height, width, 2, 2, -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, 2 * height, 2 * width)

"""`bench policies`: every attention policy at equal FLOPs, each as it is and with the options for untrained models.

The error is that of a layer's attention on the queries, keys and values of dense videos of the demo model, at the last
denoising step of each chunk. The time is that of a layer with random values in the last chunk of an 81-frame video.
A policy that ignores the sparsity shows what it reads; all are compared with `light_forcing` reading as many blocks.
Policies that read by roles of heads are left out, because whole runs decide the roles; `laboratory/quality` has them.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..lightforcing_core.attention.backends import REFERENCE
from ..lightforcing_core.attention.backends.dense import sdpa
from ..lightforcing_core.attention.options import AttentionOptions
from ..lightforcing_core.attention.policies import POLICIES, HeadRule, PersistentBlocks
from ..lightforcing_core.attention.selection import BlockSelection
from ..lightforcing_core.demo.captions import context_of_caption
from ..lightforcing_core.demo.model import DEFAULT_CAPTION, SHIPPED, DemoModel, load_demo_model
from ..lightforcing_core.model.causal import attended
from ..lightforcing_core.model.kv_cache import KVCache
from ..lightforcing_core.rollout.loop import rollout
from ..lightforcing_core.rollout.recipe import Recipe, few_step_sigmas
from ..lightforcing_core.rollout.runtime import Runtime, StepEvent
from .console import Put
from .layer import CHUNKS, FRAMES, HEAD_DIM, LayerAttention, published
from .settings import REAL_HEADS, REAL_LAYERS, PoliciesBench, Say
from .timing import describe, ratio, spread, take_turns

Layers = list[tuple[Tensor, Tensor, Tensor]]  # q, k and v [B, L, H, D] of each


def measure(bench: PoliciesBench, put: Put, say: Say = str) -> None:
    """Measure error, time and memory of every policy. Raises ValueError for a sparsity outside (0, 1)."""
    if not 0.0 < bench.sparsity < 1.0:
        raise ValueError(f"sparsity {bench.sparsity:g} is outside (0, 1); 0.6 skips 60 % of the key blocks")
    device, _ = bench.place.prepare()
    describe(put, device, "policies", bench)
    with torch.inference_mode():
        say("errors on videos of the demo model")
        _put_errors(bench, load_demo_model(SHIPPED, device), put)
        say("time of one layer")
        _put_times(bench, put)


def arms(backend: str, block: tuple[int, int]) -> dict[str, AttentionOptions]:
    """The options of every policy that one layer shows: as it is, and with a tail and, if it scores blocks, `lse`."""
    found = {}
    for name, policy in POLICIES.items():
        by_run = isinstance(policy.selection, HeadRule | PersistentBlocks) or policy.cache is not None
        if by_run or policy.joint:
            continue  # known in whole runs only
        found[name] = replace(published(backend, block), policy=name)
        if policy.selection is not None and policy.selection.needs_means:
            found[f"{name}, lse + tail"] = replace(found[name], estimator="lse", tail=True)
        elif policy.selection is not None:
            found[f"{name}, tail"] = replace(found[name], tail=True)
    return found


def _put_errors(bench: PoliciesBench, model: DemoModel, put: Put) -> None:
    """Put the share of key blocks that each arm reads, and its error, over that of `light_forcing` for as many."""
    grid = model.video.height // 16, model.video.width // 16
    options = arms(REFERENCE.name, (model.video.block, model.video.block))
    errors: dict[str, list[Tensor]] = defaultdict(list)  # per chunk and layer, of each video
    peers: dict[str, list[Tensor]] = defaultdict(list)
    read: dict[str, float] = defaultdict(float)
    visible = 0
    for q, k, v in (layer for chunk in _dense_chunks(bench, model) for layer in chunk):
        truth, make = sdpa(q, k, v), partial(LayerAttention, q, k, v, grid=grid)
        for name, one in options.items():
            y, kept, blocks = _attended(make(sparsity=bench.sparsity, options=one))
            # Half a block more, because a rule rounds its number of blocks down.
            equal = max(0.0, 1.0 - (kept + 0.5) / blocks)
            peer = make(sparsity=equal, options=replace(one, policy="light_forcing"))
            errors[name].append(_error(y, truth))
            peers[name].append(_error(_attended(peer)[0], truth))
            read[name] += kept
        visible += blocks
    for name in options:
        ours, theirs = (torch.stack(found[name]).mean(0).tolist() for found in (errors, peers))
        row = {"read": read[name] / visible, "error": spread(ours)}
        put("error", name, row | ({"over light_forcing": ratio(ours, theirs)} if all(theirs) else {}))


def _error(y: Tensor, truth: Tensor) -> Tensor:
    """Norm of the difference over the norm of the truth, [B, L, H, D], of each of B videos."""
    return (y - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


def _attended(layer: LayerAttention) -> tuple[Tensor, float, int]:
    """A layer's attention, the mean number of key blocks that it reads, and that of visible ones."""
    selections: list[BlockSelection] = []
    y = attended(layer.q, None, 0, layer.state, lambda _, selection, choice: selections.append(selection))
    blocks = len(layer.state.cache.slot_frames) * layer.state.cache.layout.per_frame
    return y, float(selections[0].counts.float().mean()) if selections else blocks, blocks


def _dense_chunks(bench: PoliciesBench, model: DemoModel) -> Iterator[Layers]:
    """The layers' attention at the last step of each chunk that has a past, in dense videos of one caption."""
    video, context = model.video, context_of_caption(model.table, DEFAULT_CAPTION).to(model.dit.dtype)
    recipe = Recipe(
        latent_shape=(bench.seeds, 16, video.latent_frames, video.height // 8, video.width // 8),
        sigmas=few_step_sigmas(),
        context=context.expand(bench.seeds, -1, -1),
        frames_per_chunk=video.frames_per_chunk,
    )
    calls: Layers = []
    layers: Layers = []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[1] != context.shape[1]:  # not cross-attention
            calls.append((q, k, v))
        return sdpa(q, k, v)

    def on_step(event: StepEvent) -> None:
        if event.step == event.steps - 1:
            # Copies, since k and v lie in the cache.
            layers[:] = [(q, k.clone(), v.clone()) for q, k, v in calls[-len(model.dit.blocks) :]]
        calls.clear()

    for chunk in rollout(model.dit, recipe, Runtime(dense_attention=attention, on_step=on_step)):
        if chunk.index:
            yield layers


def _put_times(bench: PoliciesBench, put: Put) -> None:
    """Put how many times as fast as dense each arm is, what it reads then, and the KV cache of the 1.3B model."""
    device, dtype = bench.place.prepare()
    generator, tokens = torch.Generator().manual_seed(0), math.prod(bench.picture.grid)
    q, k, v = (
        torch.randn(1, frames * tokens, bench.heads, HEAD_DIM, generator=generator).to(device, dtype)
        for frames in (FRAMES, CHUNKS * FRAMES, CHUNKS * FRAMES)
    )
    make = partial(LayerAttention, q, k, v, grid=bench.picture.grid, sparsity=bench.sparsity)
    layers = {name: make(options=options) for name, options in arms(bench.backend, bench.picture.block).items()}
    taken = take_turns({name: layer.arm() for name, layer in layers.items()}, bench.repeats, device, put)
    put("ms", "layer", taken)
    for name, ms in taken.items():
        state, (_, kept, blocks) = layers[name].state, _attended(layers[name])
        cache = KVCache(replace(state.cache.shape, layers=REAL_LAYERS, heads=REAL_HEADS), device="meta")
        put("layer", name, {"times as fast": ratio(taken["dense"], ms), "read": kept / blocks})
        choice = state.chunk.attention.choice
        put("layer", name, {"backend": choice.name if choice else "dense", "KV GB": cache.nbytes / 1e9})

"""Looks at a run's chunks before and after it, so that nothing is measured inside a chunk."""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from math import inf
from typing import Any

import torch
from torch import Tensor

from .. import machine
from ..attention.backends.base import Call, DenseAttention
from ..attention.blocks import FrameBlocks
from ..attention.dispatch import BackendChoice, choose
from ..fast_path import one_line, raise_if_fatal
from ..model.causal import ModelState, Watch, attended, predict
from ..model.kv_cache import KVCache
from ..model.kv_storage import CacheShape, KVOptions
from .cost import recipe_costs
from .recipe import Recipe

DENSE = "sparse or dense attention, {} frames that see {} and are to read {:.0%}"  # the choice for each chunk
ONE_WAY = ("cpu",)  # devices on which dense attention has one way, which may take minutes

_log = logging.getLogger(__name__)
_looked: set[Hashable] = set()  # chunks that this process has looked at


def run_first_layer(
    dit: Any, x: Tensor, timestep: Tensor, state: ModelState, watch: Watch | None = None, *, commits: bool = False
) -> Tensor:
    """Run the model's first layer alone, in place of `run_pass`; the result is not used."""
    predict(_FirstLayer(dit), x, timestep, state)
    return torch.zeros_like(x)


class _FirstLayer:
    """A model tree with its first layer only."""

    def __init__(self, dit: Any) -> None:
        self._dit, self.blocks = dit, dit.blocks[:1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dit, name)


class Looks:
    """The chunks of a run as `machine` sees them: caches of one layer with random frames.

    shape: of the run's KV cache. kv: how it is kept.
    """

    def __init__(
        self, recipe: Recipe, shape: CacheShape, kv: KVOptions, device: torch.device, dense_attention: DenseAttention
    ) -> None:
        self.recipe, self.shape, self.kv = recipe, replace(shape, layers=1, anchors=0), replace(kv, host=False)
        self.device, self.dense_attention = device, dense_attention
        self._generator = torch.Generator(device).manual_seed(0)
        costs = enumerate(recipe_costs(recipe), start=recipe.first_index)
        kinds = {index: (cost.frames, cost.kv_frames, round(cost.density, 2)) for index, cost in costs}
        if recipe.attention.joint:  # all passes but the first few and the clean ones
            kinds, self.kv = {recipe.first_index: (recipe.pass_frames, shape.slots, 1.0)}, KVOptions()
        # The chunk that sees most comes first.
        self._kinds = dict(sorted(kinds.items(), key=lambda one: -one[1][0] * one[1][1]))

    @torch.no_grad()
    def dense_where_faster(self) -> Recipe:
        """The recipe with a sparsity of 0 for each chunk whose dense attention was measured to be faster.

        A saved run holds this recipe, so that it continues in the same way whatever is measured later.
        """
        recipe = self.recipe
        by_role = recipe.attention.head_rule is not None  # its cache holds too little for a dense chunk
        if machine.is_off() or recipe.attention.backend != "auto" or not recipe.is_sparse or by_role:
            return recipe
        growth = [recipe.sparsity(index) for index in range(max(self._kinds) + 2)]  # the last is for longer videos
        for index in self._kinds:
            if growth[index] and self._is_dense_faster(index):
                growth[index] = 0.0
        return replace(recipe, growth=growth)

    def _is_dense_faster(self, index: int) -> bool:
        shape, options = self.shape, self.recipe.attention.to_saved().values()
        sizes = shape.batch, shape.tokens_per_frame, shape.heads, shape.head_dim, str(shape.dtype), self.kv.dtype
        with ExitStack() as stack:

            @cache
            def opened() -> tuple[ModelState, Tensor]:
                state, q = stack.enter_context(self._open(index))
                _choose_backend(state, q)
                if self.device.type not in ONE_WAY:
                    state.attend_history(q, state.cache.visible(0))
                return state, q

            def run(name: str) -> Tensor:
                state, q = opened()
                if name == "dense":
                    return state.attend_history(q, state.cache.visible(0))
                return attended(q, None, 0, state)

            facts, names = (*self._kinds[index], *sizes, *options), ("sparse", "dense")
            return machine.choose(DENSE, facts, self.device, names, run, incumbent="sparse", tolerance=inf) == "dense"

    def look(self, run_layer: Callable[[ModelState, int], object], *, rest: bool = False) -> None:
        """Choose the ways to run the chunk that sees most, or those of the rest while there is time.

        run_layer: runs the model's first layer, given a state and a chunk's index. A process looks once at a chunk.
        """
        kinds = list(self._kinds.items())
        for index, kind in kinds[1:] if rest else kinds[:1]:
            seen = self.device, self.shape, self.kv, self.recipe.attention, kind
            if seen in _looked:
                continue
            if rest and not machine.has_time():
                return
            _looked.add(seen)
            try:
                with torch.no_grad(), self._open(index) as (state, q):
                    run_layer(state, index)
                    _choose_backend(state, q)
            except Exception as error:
                with suppress(torch.OutOfMemoryError):
                    raise_if_fatal(error)
                _log.warning("[Light Forcing] chunk %d is not measured (%s)", index, one_line(error))

    @contextmanager
    def _open(self, index: int) -> Iterator[tuple[ModelState, Tensor]]:
        """A state in which chunk `index` is open, and queries."""
        *before, length = self.recipe.chunk_lengths()[: index + 1]
        if self.recipe.attention.joint:
            length = self.recipe.pass_frames
            before = [self.shape.slots - length] if self.shape.slots > length else []
        state = ModelState(KVCache(self.shape, self.kv, self.device), self.recipe.attention, self.dense_attention)
        try:
            for frames in before:
                state.cache.open(frames)
                self._store(state, frames)
                state.cache.commit()
            state.open_chunk(length, self.recipe.sparsity(index), self.device, steps=1)
            self._store(state, length)
            yield state, self._random(length)
        finally:
            state.close()

    def _store(self, state: ModelState, frames: int) -> None:
        """Store random keys and values of some frames.

        Keys of every second head have channels far from zero, as those of trained models. They change no attention, but
        they show the error of one that rounds keys to a few bits.
        """
        keys, values = self._random(frames), self._random(frames)
        keys[:, :, ::2, ::16] += 32.0
        state.cache.store(0, keys, values)

    def _random(self, frames: int) -> Tensor:
        """Queries, keys or values of some frames, [B, L, H, D]."""
        shape = self.shape
        return self.random(shape.batch, frames * shape.tokens_per_frame, shape.heads, shape.head_dim)

    def random(self, *size: int) -> Tensor:
        """Normal numbers in the cache's dtype, by a generator of its own."""
        return torch.randn(size, generator=self._generator, dtype=self.shape.dtype, device=self.device)


def _choose_backend(state: ModelState, q: Tensor) -> None:
    """Choose the backend of the open chunk's attention."""
    if state.attention.backend != "auto" or state.chunk.attention.plan is None:
        return
    options, memory, layout = state.attention, state.cache.with_pool(0), state.cache.storage.layout
    q_layout, tail = FrameBlocks(layout.tokens_per_frame, options.block[0]), memory.tail if options.tail else None

    def by(name: str) -> Tensor:
        chosen = replace(state.chunk.attention, choice=BackendChoice(name, "it is measured"))
        chunk = replace(state.chunk, attention=chosen)
        return attended(q, None, 0, replace(state, attention=replace(options, backend=name), chunk=chunk))

    choose(Call(q, memory.keys, memory.keys, q_layout, layout, tail=tail), run=by)

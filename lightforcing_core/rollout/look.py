"""Looks at a run's chunks before and after it, so that nothing is measured inside a chunk."""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from math import inf
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from .. import machine
from ..attention.backends.base import Call
from ..attention.blocks import FrameBlocks
from ..attention.dispatch import BackendChoice, choose
from ..fast_path import one_line, raise_if_fatal
from ..model.causal import ModelState, Pass, attended, predict
from ..model.kv_cache import KVCache
from ..model.kv_storage import CacheShape, KVOptions
from .cost import recipe_costs
from .recipe import Recipe

DENSE = "sparse or dense"  # the choice for each chunk

_log = logging.getLogger(__name__)
_looked: set[Hashable] = set()  # chunks that this process has looked at


class Rehearsal(Pass):
    """A pass of the model's first layer alone, whose result is not used."""

    def __call__(self, dit: Any, x: Tensor, timestep: Tensor) -> Tensor:
        predict(_FirstLayer(dit), x, timestep, self.state)
        return torch.zeros_like(x)


class _FirstLayer:
    """A model tree with its first layer only."""

    def __init__(self, dit: Any) -> None:
        self._dit, self.blocks = dit, dit.blocks[:1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dit, name)


class Looks:
    """The chunks of a run as `machine` sees them: caches of one layer with random frames.

    shape: of the run's KV cache. kv: how it is kept. state: makes a state from a cache.
    """

    def __init__(
        self, recipe: Recipe, shape: CacheShape, kv: KVOptions, device: torch.device, state: Callable[..., ModelState]
    ) -> None:
        self.recipe, self.shape, self.kv = recipe, replace(shape, layers=1), replace(kv, host=False)
        self.device, self._state, self._generator = device, state, torch.Generator(device).manual_seed(0)
        costs = enumerate(recipe_costs(recipe), start=recipe.first_index)
        kinds = {index: (cost.frames, cost.kv_frames, round(cost.density, 2)) for index, cost in costs}
        # The chunk that sees most comes first.
        self._kinds = dict(sorted(kinds.items(), key=lambda one: -one[1][0] * one[1][1]))

    @torch.no_grad()
    def dense_where_faster(self) -> Recipe:
        """The recipe with a sparsity of 0 for each chunk whose dense attention was measured to be faster.

        A saved run holds this recipe, so that it continues in the same way whatever is measured later.
        """
        recipe, shape = self.recipe, self.shape
        if machine.is_off() or recipe.attention.backend != "auto" or not recipe.is_sparse:
            return recipe
        self.look()
        growth = [recipe.sparsity(index) for index in range(max(self._kinds) + 2)]  # the last is for longer videos
        sizes = shape.batch, shape.tokens_per_frame, shape.heads, shape.head_dim, str(shape.dtype), self.kv.dtype
        for index, kind in self._kinds.items():
            if growth[index]:
                key = (*kind, *sizes, *recipe.attention.to_saved().values())
                with self._attention(index) as ways:
                    name = machine.choose(DENSE, key, self.device, ways, incumbent="sparse", tolerance=inf)
                growth[index] *= name == "sparse"
        return replace(recipe, growth=growth)

    def look(self, run_layer: Callable[[ModelState, int], object] | None = None, *, rest: bool = False) -> None:
        """Choose the ways to run the chunk that sees most, or those of the rest while there is time.

        run_layer: runs the model's first layer, given a state and a chunk's index; without it only attention runs.
        A process looks once at a chunk.
        """
        begun, kinds = monotonic(), list(self._kinds.items())
        for index, kind in kinds[1:] if rest else kinds[:1]:
            seen = self.device, self.shape, self.kv, self.recipe.attention, kind, run_layer is None
            if machine.is_off() or seen in _looked:
                continue
            if rest and monotonic() - begun > machine.SECONDS:
                return
            _looked.add(seen)
            try:
                with torch.no_grad(), self._open(index) as state:
                    _choose_backend(state, self._random(state.chunk.frames))
                    if run_layer is not None:
                        run_layer(state, index)
            except Exception as error:
                with suppress(torch.OutOfMemoryError):
                    raise_if_fatal(error)
                _log.warning("[Light Forcing] chunk %d is not measured (%s)", index, one_line(error))

    @contextmanager
    def _attention(self, index: int) -> Iterator[dict[str, machine.Thunk]]:
        """Sparse and dense attention of a chunk; its cache is made when one of them runs."""
        with ExitStack() as stack:

            @cache
            def chunk() -> tuple[ModelState, Tensor]:
                state = stack.enter_context(self._open(index))
                return state, self._random(state.chunk.frames)

            def sparse() -> Tensor:
                state, q = chunk()
                return attended(q, None, 0, state)

            def dense() -> Tensor:
                state, q = chunk()
                return state.attend_history(q, state.cache.visible(0))

            yield {"sparse": sparse, "dense": dense}

    @contextmanager
    def _open(self, index: int) -> Iterator[ModelState]:
        """A state in which chunk `index` is open."""
        *before, length = self.recipe.chunk_lengths()[: index + 1]
        state = self._state(KVCache(self.shape, self.kv, self.device))
        try:
            for frames in before:
                state.cache.open(frames)
                state.cache.store(0, self._random(frames), self._random(frames))
                state.cache.commit()
            state.open_chunk(length, self.recipe.sparsity(index), self.device, steps=1)
            state.cache.store(0, self._random(length), self._random(length))
            yield state
        finally:
            state.close()

    def random(self, *size: int) -> Tensor:
        """Normal numbers in the cache's dtype, by a generator of its own."""
        return torch.randn(size, generator=self._generator, dtype=self.shape.dtype, device=self.device)

    def _random(self, frames: int) -> Tensor:
        """Queries, keys or values of some frames, [B, L, H, D]."""
        shape = self.shape
        return self.random(shape.batch, frames * shape.tokens_per_frame, shape.heads, shape.head_dim)


def _choose_backend(state: ModelState, q: Tensor) -> None:
    """Choose launches and the backend of the open chunk's attention."""
    attended(q, None, 0, state)  # by itself, because inside a candidate nothing is measured
    if state.attention.backend != "auto" or state.chunk.attention.plan is None:
        return
    options, memory, layout = state.attention, state.cache.visible(0), state.cache.shape.memory_layout
    q_layout, tail = FrameBlocks(layout.tokens_per_frame, options.block[0]), memory.tail if options.tail else None

    def way(name: str) -> machine.Thunk:
        chosen = replace(state.chunk.attention, choice=BackendChoice(name, "it is measured"))
        one = replace(state, attention=replace(options, backend=name), chunk=replace(state.chunk, attention=chosen))
        return partial(attended, q, None, 0, one)

    choose(Call(q, memory.keys, memory.keys, q_layout, layout, tail=tail), ways=way)

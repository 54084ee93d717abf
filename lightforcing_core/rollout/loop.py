"""The autoregressive rollout: chunk after chunk, a few denoising steps each, then a clean pass that commits it.

Closing the generator cancels; chunks that were yielded before an error stay valid.
"""

import logging
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .. import fast_path, machine
from ..attention.chunk import ChunkAttention
from ..model.causal import GIVEN_NOISE, ModelState, Pass, Run, run_pass
from ..model.cuda_graph import StepGraph, why_no_graph
from ..model.joint_cache import JointCache
from ..model.kv_cache import KVCache
from ..model.wan import HEAD_DIM
from ..parallel.shares import shares_of
from ..pinned import Weights, indexed, to_device
from ..refusal import NotFinite, Refusal, check_finite, is_finite
from .cost import recipe_costs
from .look import Looks, run_first_layer
from .recipe import Recipe
from .record import RunRecorder
from .runtime import Chunk, Runtime, StepEvent

# Key blocks of a cache up to which scoring the unused ones too costs less than recording anew.
MOST_BLOCKS = 2048

_log = logging.getLogger(__name__)


def rollout(
    dit: Any,
    recipe: Recipe,
    runtime: Runtime = Runtime(),  # noqa: B008 (frozen)
    finished: Sequence[Tensor | Chunk] = (),
    begun: Tensor | None = None,
) -> Generator[Chunk, None, None]:
    """Generate the chunks of a video that are not `finished` yet.

    dit: a Wan 2.1 T2V module tree, from `wan_from_state_dict` or ComfyUI's.
    finished: the chunks that an earlier run of this recipe made, from the first on; they are not yielded again.
    begun: what came with the last of them, see `Chunk`; only needed if that is a tensor.

    Latents are in the model's normalised space. The KV cache exists only during iteration. Raises Refusal, before
    anything runs, for a recipe that does not match the model. Source: Self Forcing's few-step rollout.
    """
    if finished and isinstance(finished[-1], Chunk):
        begun = finished[-1].begun
    return _Loop(dit, recipe, runtime, finished, begun).chunks()


class _Loop:
    """One run. Arguments as in `rollout`."""

    def __init__(
        self, dit: Any, recipe: Recipe, runtime: Runtime, finished: Sequence[Tensor | Chunk], begun: Tensor | None
    ) -> None:
        _check_model(dit, recipe)
        made = [one.latents if isinstance(one, Chunk) else one for one in finished]
        recipe.check_finished(made, begun)
        self.dit, self.recipe, self.runtime = dit, recipe, runtime
        self.recorder = runtime.recorder or RunRecorder(reads_blocks=False)
        self.shape, self.lengths = recipe.latent_shape, recipe.chunk_lengths()
        self.starts = [0, *accumulate(self.lengths)]
        self.first_index = recipe.first_index + len(made)  # the first chunk that is generated
        if self.first_index == len(self.lengths):
            problem = f"already holds all {recipe.frames} latent frames of the video"
            raise Refusal("finished", problem, "ask for a longer video")
        self.read: float | None = None  # the share of key blocks that the last chunk read, if recorded
        self.begun = begun
        self.done, self.total = 0, sum(map(self._steps_of, range(self.first_index, len(self.lengths))))
        self.known = recipe.latents_with(made)
        if self.known is not None:
            check_finite("finished", self.known, "start a new video")
        if begun is not None:
            check_finite("begun", begun, "start a new video")
        self.noise = runtime.noise or recipe.noise()
        self.dtype = runtime.dtype or dit.dtype
        self.device = torch.device(runtime.device or recipe.prompts[0].context.device)
        layers, heads = len(dit.blocks), dit.dim // HEAD_DIM
        self.shares = shares_of(runtime.exchange, heads, self.shape[3] * self.shape[4] // 4)
        heads = self.shares.heads_of(heads)
        self.cache = recipe.cache_shape(layers=layers, heads=heads, head_dim=HEAD_DIM, dtype=self.dtype)
        self.weights = runtime.weights or Weights(dit, indexed(self.device))
        self.why_no_graphs = None
        if runtime.cuda_graph != "off":
            joint = f"{recipe.attention.policy} runs each pass over other frames" if recipe.attention.joint else None
            self.why_no_graphs = joint or why_no_graph(self.weights, kv_in_cpu_memory=runtime.kv.host)
            if self.shares.size > 1 and runtime.cuda_graph == "auto":
                self.why_no_graphs = "several ranks do not measure whether they are faster; ask for them"
        if self.why_no_graphs and runtime.cuda_graph == "on":
            raise Refusal("cuda_graph", f"'on' cannot run: {self.why_no_graphs}", "use 'auto' or 'off'")

    def chunks(self) -> Generator[Chunk, None, None]:
        fast_path.begin_run()
        states: list[ModelState] = []
        joint: list[ModelState] = []  # for chunks that are denoised at once
        past: list[Tensor] = []  # clean chunks as far back as any of them is visible, which a pin does not bound
        self.recorder.start(self.dit, self.shape, self.device, self.shares)
        note, wanted = partial(self.recorder.fact, "CUDA graphs"), self.runtime.cuda_graph
        graph = StepGraph(self.weights, note, wanted, self.why_no_graphs, self.shares.agree)
        try:
            for guide in range(len(self.recipe.guides)):
                cache = KVCache(self.cache, self.runtime.kv, self.device)
                dense, attention = self.runtime.dense_attention, self.recipe.attention
                states.append(ModelState(cache, attention, dense, guide, shares=self.shares))
                states[-1].width = 0 if graph.why_off else self._list_width()
                if self.recipe.attention.joint:
                    joint.append(replace(states[-1], cache=JointCache(cache, self.device)))
            self._look(graph)
            for index, length in enumerate(self.lengths):
                is_given = index < self.first_index
                if self.runtime.direct is not None and not is_given:
                    self.recipe = self.runtime.direct(self.recipe, index)
                self._follow_prompts(states, index, past)
                if is_given and not self._is_replayed(index) and not self._lacks_roles(states[0]):
                    for state in states:
                        state.cache.skip(length)
                    past.append(self._given(index))
                    continue
                self._open_chunk(states, index)
                if is_given:
                    latents = self._given(index)
                else:
                    with graph.held():
                        if joint:
                            latents = self._denoise_at_once(joint, states, index)
                        else:
                            latents = self._denoise_chunk(states, graph, index)
                    begun = () if self.begun is None else (self.begun,)
                    if not all(map(is_finite, (latents, *begun))):  # waits for the device, once per chunk
                        problem = f"of the video holds NaN or infinity; the model computes in {self.dtype}"
                        remedy = "use another dtype of its weights, or its LoRA at a lower strength or not at all"
                        raise NotFinite(f"chunk {index}", problem, remedy)
                    if states[0].chunk.attention.by_keys:
                        self.read = self.recorder.share_read()
                    self.recorder.lap(index, "denoise")
                    yield Chunk(index, self.starts[index], latents, self.begun)
                    self.recorder.lap(index, "output")
                if index < len(self.lengths) - 1:
                    with graph.held():
                        for state in states:
                            state.roles = states[0].roles  # decided by the first guide for all
                            shape = state.cache.shape
                            shows = shape.pool or shape.history or (self._lacks_roles(state) and state.shows_roles)
                            state.chunk.masses = [] if shows else None
                            self._clean_pass(state, latents, run_pass if shows else graph)
                            if (cut := self.recipe.guides[0].cut_at(index)) and cut.pin:
                                state.cache.pin(cut.pin)
                    self.recorder.lap(index, "replay" if is_given else "clean pass")
                far = len(self.lengths) if any(cut.pin for cut in self.recipe.cuts) else self.cache.slots
                past = [*past, latents][-far:]
            graph.finish()
            if (rule := self.recipe.attention.head_rule) and states[0].roles:
                self.recorder.fact("roles of heads", rule.described(states[0].roles))
            if slots := states[0].cache.pooled:
                kept = slots * self.cache.layout.per_frame
                self.recorder.fact("persistent blocks", f"{kept} of each head, all read in chunks that skip blocks")
            if self.cache.history:
                tokens = f"{max(self.lengths) * self.cache.tokens_per_frame} tokens in each layer"
                self.recorder.fact("compressed memory", f"{tokens}, of the last {self.cache.history} latent frames")
            try:
                self._look(graph, rest=True)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # ComfyUI's cancel is no Exception; the video is complete
                _log.warning(
                    "[Light Forcing] measuring after the last chunk ended early: %s", fast_path.one_line(error)
                )
        finally:
            graph.free()
            # A traceback or a hook of ComfyUI may still hold the states, so their memory is freed explicitly.
            for state in (*joint, *states):
                state.close()

    def _look(self, graph: StepGraph, *, rest: bool = False) -> None:
        """Measure ways to run the chunk that sees most, or the rest, as far as they are not known."""
        measuring = self.runtime.measuring or (None if self.runtime.denoise else machine.measuring)
        if measuring is None or machine.is_off() or self.shares.size > 1:  # ranks measure differently
            return
        looks = Looks(self.recipe, self.cache, self.runtime.kv, self.device, self.runtime.dense_attention)

        def run_layer(state: ModelState, index: int) -> None:
            batch, channels, _, height, width = self.shape
            self._follow(state, index)
            x = looks.random(batch, channels, state.chunk.frames, height, width).float()
            self._x0(x, 0.5, [Pass(state, commits=True, run=run_first_layer)])

        with measuring():
            if rest:
                graph.measure()
            looks.look(run_layer, rest=rest)

    def _list_width(self) -> int:
        """The most key blocks that a query block reads in any chunk; 0 if lists of one width for all cost more."""
        costs, per_frame = recipe_costs(self.recipe), self.cache.layout.per_frame
        kept = [round(one.density * one.kv_frames * per_frame) for one in costs if one.density < 1.0]
        return max(kept, default=0) if self.cache.slots * per_frame <= MOST_BLOCKS else 0

    def _open_chunk(self, states: list[ModelState], index: int) -> None:
        end = self._end_of(index)
        steps, given = len(self.recipe.levels(index)) - 1, 0 if end is None else end.shape[2]
        sparsity, later = self.recipe.sparsity(index), len(self.lengths) - 1 - index
        for state in states:
            state.open_chunk(self.lengths[index], sparsity, self.device, steps=steps, later=later, given=given)

    def _is_replayed(self, index: int) -> bool:
        """Whether an initial chunk is fed through the model: all are, or those that later chunks may see."""
        given, cache = self.starts[self.first_index], self.cache
        still_visible = self.starts[index + 1] > given - (cache.slots - cache.sink_frames)
        # After a hard switch the frames that come back are some in the middle, and so are those that a cut pins.
        switched = cache.rolling is not None and any(one.switch == "hard" for one in self.recipe.prompts[1:])
        switched |= any(one.pin for one in self.recipe.cuts)
        # Everything has changed the sinks, the pool or the tokens chosen.
        switched |= cache.averages or cache.pool > 0 or cache.history > 0
        return self.runtime.replay == "all" or self.starts[index] < cache.first_frames or still_visible or switched

    def _lacks_roles(self, state: ModelState) -> bool:
        """Whether a clean pass is still to decide the roles of heads, from the same chunk however much is replayed."""
        return self.recipe.is_sparse and self.recipe.attention.head_rule is not None and not state.roles

    def _given(self, index: int) -> Tensor:
        assert self.known is not None
        return self._for_each_video(self.known[:, :, self.starts[index] : self.starts[index + 1]])

    def _end_of(self, index: int) -> Tensor | None:
        """The given latents at the end of the chunk, [B, C, frames, h, w], if any."""
        last = self.recipe.last_latents
        return None if last is None or index < len(self.lengths) - 1 else self._for_each_video(last)

    def _for_each_video(self, given: Tensor) -> Tensor:
        return to_device(given.float(), self.device).expand(self.shape[0], -1, -1, -1, -1)

    @torch.no_grad()
    def _follow_prompts(self, states: list[ModelState], index: int, past: list[Tensor]) -> None:
        """Give each cache its text when it changes; a hard switch recomputes the visible past with the new text."""
        cut = self.recipe.guides[0].cut_at(index)
        if cut:
            self.recorder.note(f"the cut at chunk {index} moves it {cut.jump} latent frames ahead")
        for state in states:
            if cut:
                state.cache.jump(cut.jump)
            change = self.recipe.guides[state.guide].changes_at(index)
            if index == 0 or change:
                self._follow(state, index)
            if change == "hard":
                state.reopen_visible()
                if frames := state.chunk.frames:
                    known = torch.cat(past, dim=2)
                    first = self.starts[index] - known.shape[2]
                    self._clean_pass(state, known[:, :, [frame - first for frame in state.cache.current_frames]])
                    self.recorder.note(f"the hard prompt switch at chunk {index} read {frames} frames again")
                    self.recorder.lap(index, "recompute")

    def _follow(self, state: ModelState, index: int) -> None:
        """Give a cache the text of chunk `index`."""
        text = to_device(self.recipe.guides[state.guide].text(index).to(self.dtype), self.device)
        state.follow(text.expand(self.shape[0], -1, -1))

    @torch.no_grad()
    def _denoise_chunk(self, states: list[ModelState], run: Run, index: int) -> Tensor:
        """A finished chunk from noise."""
        levels = self.recipe.levels(index)
        self.recorder.open(index, self.recipe, states[0])
        end = self._end_of(index)
        noise = self._draw(index, 0)
        x = levels[0] * noise if levels[0] < 1.0 else noise
        for step, (sigma, following) in enumerate(pairwise(levels)):
            watch = self.recorder.watch if following == 0.0 else None
            if end is not None:
                less = GIVEN_NOISE * sigma
                x = _with_end(x, (1.0 - less) * end + less * noise[:, :, -end.shape[2] :])
            passes = [Pass(state, run=run, watch=None if state.guide else watch) for state in states]
            x0 = self._x0(x, sigma, passes)
            if end is not None:
                x0 = _with_end(x0, end)
            self._report(states[0].chunk.attention, index, step, x, x0)
            if following > 0.0:
                noise = self._draw(index, step + 1)
                x = (1.0 - following) * x0 + following * noise
        self.recorder.close()
        return x0

    @torch.no_grad()
    def _denoise_at_once(self, joint: list[ModelState], states: list[ModelState], index: int) -> Tensor:
        """A finished chunk; those behind it, each one level of noise higher, wait in `begun` for the next pass.

        Source: Rolling Forcing, arXiv 2509.25161. Its clean passes of unfinished chunks are left out: none reads them.
        """
        levels, passes = self.recipe.levels(index), self._steps_of(index)
        steps, chunks = len(levels) - 1, list[Tensor]()
        if self.begun is not None:
            begun = to_device(self.begun.float(), self.device)
            chunks += begun.split(self.lengths[index : index + steps - 1], dim=2)
        for number in range(passes):
            age = steps - passes + number  # steps that the first chunk is ahead of one that begins now
            if index + age < len(self.lengths):
                chunks.append(levels[0] * self._draw(index + age, 0))
            x, lengths = torch.cat(chunks, dim=2), [chunk.shape[2] for chunk in chunks]
            highest = levels[age + 1 - len(chunks)]
            shares = [levels[age - place] / highest for place, many in enumerate(lengths) for _ in range(many)]
            for state, behind in zip(joint, states, strict=True):
                state.text = behind.text
                state.open_chunk(x.shape[2], self.recipe.sparsity(index), self.device)
            if number == passes - 1:
                self.recorder.open(index, self.recipe, joint[0])
            on_device = to_device(torch.tensor(shares), self.device)
            first, *others = self._x0(x, highest, [Pass(state, shares=on_device) for state in joint]).split(lengths, 2)
            self._report(joint[0].chunk.attention, index, number, chunks[0], first)
            chunks = []
            for place, x0 in enumerate([first, *others]):
                following = levels[age - place + 1]
                if following > 0.0:
                    x0 = (1.0 - following) * x0 + following * self._draw(index + place, age - place + 1)
                chunks.append(x0)
        self.begun = torch.cat(chunks[1:], dim=2) if chunks[1:] else None
        return chunks[0]

    def _steps_of(self, index: int) -> int:
        """The passes that chunk `index` waits for, but the clean one."""
        steps = len(self.recipe.levels(index)) - 1
        return 1 if self.recipe.attention.joint and (index > self.first_index or self.begun is not None) else steps

    def _draw(self, index: int, number: int) -> Tensor:
        """Noise number `number` of a chunk."""
        batch, channels, _, height, width = self.shape
        shape = (batch, channels, self.lengths[index], height, width)
        drawn = self.noise(index, number, shape)
        if drawn.shape != shape:
            problem = f"({index}, {number}, …) has shape {list(drawn.shape)}"
            raise Refusal("noise", problem, f"return one of {list(shape)}")
        return to_device(drawn.float(), self.device)

    def _report(self, attention: ChunkAttention, index: int, step: int, x: Tensor, x0: Tensor) -> None:
        """Count a step of a chunk and report it."""
        self.done += 1
        if self.runtime.on_step is None:
            return
        event = StepEvent(
            chunk=index - self.first_index,
            chunks=len(self.lengths) - self.first_index,
            index=index,
            start_frame=self.starts[index],
            step=step,
            steps=self._steps_of(index),
            done=self.done,
            total=self.total,
            no_backend=attention.no_backend,
            x=x,
            x0=x0,
            density=self.read if attention.by_keys else attention.density,
        )
        self.runtime.on_step(event)

    @torch.no_grad()
    def _clean_pass(self, state: ModelState, latents: Tensor, run: Run = run_pass) -> None:
        """Commit clean latents as history."""
        self._x0(latents, self.recipe.noise_options.context_noise / 1000.0, [Pass(state, commits=True, run=run)])
        state.commit()

    def _x0(self, x: Tensor, sigma: float, passes: Sequence[Pass]) -> Tensor:
        """x0 from the prompt's prediction and, with guidance, the negative one's."""
        if self.runtime.denoise is not None:
            return self.runtime.denoise(x, sigma, passes)
        timestep = torch.full((x.shape[0],), sigma * 1000.0, device=self.device)
        x0, *others = (x - sigma * one(self.dit, x.to(self.dtype), timestep).float() for one in passes)
        for unguided in others:
            x0 = unguided + self.recipe.guidance.cfg * (x0 - unguided)
        return x0


def _check_model(dit: Any, recipe: Recipe) -> None:
    """Raise Refusal unless the model takes the recipe's latents and texts."""
    channels, wanted = recipe.latent_shape[1], dit.patch_embedding.in_channels
    if channels != wanted:
        raise Refusal("latent_shape", f"has {channels} channels", f"the model takes {wanted}")
    wanted = dit.text_embedding[0].in_features
    for name, guide in zip(("context", "negative"), recipe.guides, strict=False):
        for width in (prompt.context.shape[2] for prompt in guide.prompts):
            if width != wanted:
                raise Refusal(name, f"is {width} wide and the model takes {wanted}", "use the model's text encoder")
    roles, sizes = recipe.attention.roles, (len(dit.blocks), dit.dim // HEAD_DIM)
    if roles and (listed := (len(roles), len(roles[0]))) != sizes:
        problem = f"are of {listed[0]} layers and {listed[1]} heads, and the model has {sizes[0]} and {sizes[1]}"
        raise Refusal("roles", problem, "use this model's, or none, so that the run decides them")


def _with_end(x: Tensor, end: Tensor) -> Tensor:
    """x [B, C, frames, h, w] with its last frames replaced by `end`."""
    return torch.cat([x[:, :, : -end.shape[2]], end], dim=2)

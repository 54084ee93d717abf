"""The recipe: everything that determines a video, checked once when it is created."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..attention.options import AttentionOptions
from ..attention.policies.pool import POOL_WINDOW
from ..attention.policies.rolling import WINDOW
from ..families import SinkRope
from ..model.kv_storage import CacheShape
from ..refusal import Refusal, check_finite, check_size
from .schedule import check_sparsity, check_window, chunk_lengths, opening_chunk, video_frames_of
from .timeline import Prompt, Timeline, check_text

Noise = Callable[[int, int, tuple[int, ...]], Tensor]


def few_step_sigmas(steps: Sequence[int] = (1000, 750, 500, 250), shift: float = 5.0) -> list[float]:
    """Noise levels of a few-step list, warped by the flow shift and closed with 0.

    `σ = shift · s / (1 + (shift − 1) · s)`, s = step / 1000; the Self Forcing list gives 1, 0.9375, 0.8333, 0.625, 0.
    """
    fractions = [step / 1000.0 for step in steps]
    return [shift * s / (1.0 + (shift - 1.0) * s) for s in fractions] + [0.0]


def seeded_noise(seed: int, chunk_seeds: Mapping[int, int] | None = None) -> Noise:
    """Standard normal noise that depends only on (seed, chunk index, draw), drawn on the CPU in float32.

    `chunk_seeds` gives single chunks a seed of their own.
    """

    def draw(chunk_index: int, draw_index: int, shape: tuple[int, ...]) -> Tensor:
        key = f"{(chunk_seeds or {}).get(chunk_index, seed)}/{chunk_index}/{draw_index}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator)

    return draw


@dataclass(frozen=True, eq=False)
class Guidance:
    """Classifier-free guidance, for models that are not distilled; it doubles time and KV cache.

    cfg: strength of the prompt over the negative one; 1 runs the prompt alone.
    negative: the negative prompt, [B or 1, tokens, text_dim].
    """

    cfg: float = 1.0
    negative: Tensor | None = None

    def __post_init__(self) -> None:
        check_guidance(self.cfg, self.negative)
        if self.negative is not None:
            check_text("negative", self.negative)


def check_guidance(cfg: float, negative: object | None) -> None:
    """Refusal if `cfg` needs a negative prompt and there is none."""
    if cfg != 1.0 and negative is None:
        raise Refusal("cfg", f"{cfg:g} needs a negative prompt", "give one, or set cfg to 1")


@dataclass(frozen=True)
class NoiseOptions:
    """Noise of single chunks and of the past, beyond a recipe's `sigmas` and `seed`.

    first_sigmas: noise levels of the chunk that opens the video, see `opening_chunk`, if it has its own.
    chunk_seeds: chunk index → seed of its own.
    context_noise: the timestep, 0…1000, at which finished chunks are committed.
    """

    first_sigmas: Sequence[float] | None = None
    chunk_seeds: Mapping[int, int] = field(default_factory=dict)
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.first_sigmas is not None:
            object.__setattr__(self, "first_sigmas", _levels("first_sigmas", self.first_sigmas))
        object.__setattr__(self, "chunk_seeds", dict(self.chunk_seeds))
        if not 0.0 <= self.context_noise <= 1000.0:
            raise Refusal("context_noise", f"{self.context_noise} is not a timestep", "use 0 to 1000")


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything that determines a video but the weights. Raises Refusal if invalid.

    latent_shape: (B, C, frames, height, width) of the whole video, given latents included; an eighth of its pixels.
    frames_per_chunk, window, sink_frames: in latent frames.
    sigmas: falling noise levels in (0, 1], closed by 0.
    context: the text, [B or 1, tokens, text_dim], or the prompts of a timeline.
    growth: one sparsity in [0, 1) per chunk, the last one for all later chunks; None is dense.
    window: visible latent frames, sinks and the current chunk included; None sees everything, or a policy's own.
    sink_frames: the first ones, which stay visible.
    seed: of the noise, which depends on seed, chunk and draw alone.
    initial_latents: [B or 1, C, frames, height, width], clean, with which the video starts. If `frames_per_chunk`
        does not divide them the first chunk takes the rest: one image and chunks of three give 1, 3, 3, …
        Chunk indices, and with them growth, prompts and noise, count from the start of the video.
    sink_rope: the position of sinks once the window has moved on, and whether they change, see `Family`.
    last_latents: [B or 1, C, frames, height, width], clean, with which the video ends; fewer than the last chunk
        holds, so that some frames are left to lead to them. In that chunk's steps they carry `GIVEN_NOISE` of the
        others' noise, with a timestep to match; earlier chunks do not see them.
    """

    latent_shape: Sequence[int]
    frames_per_chunk: int
    sigmas: Sequence[float]
    context: Tensor | Sequence[Prompt]
    growth: Sequence[float] | None = None
    window: int | None = None
    sink_frames: int = 0
    seed: int = 0
    initial_latents: Tensor | None = None
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    sink_rope: SinkRope = "fixed"
    last_latents: Tensor | None = None
    guidance: Guidance = field(default_factory=Guidance)
    noise_options: NoiseOptions = field(default_factory=NoiseOptions)

    def __post_init__(self) -> None:
        # Lists become tuples, since a caller may change a list later.
        shape = _shape(self.latent_shape)
        object.__setattr__(self, "latent_shape", shape)
        object.__setattr__(self, "sigmas", _levels("sigmas", self.sigmas))
        if self.growth is not None:
            object.__setattr__(self, "growth", tuple(map(float, self.growth)))
            if not self.growth:
                raise Refusal("growth", "is empty", "give at least one sparsity, or None for dense")
            for chunk, sparsity in enumerate(self.growth):
                check_sparsity("growth", sparsity, chunk)
        if not isinstance(self.context, Tensor):
            object.__setattr__(self, "context", tuple(self.context))
        for name, guide in zip(("context", "negative"), self.guides, strict=False):
            for prompt in guide.prompts:
                _check_batch(name, prompt.context, shape[0])
        for name in ("initial_latents", "last_latents"):
            if getattr(self, name) is not None:
                check_given(name, getattr(self, name), shape)
        if self.initial_frames >= self.frames:
            problem = f"already fills {self.initial_frames} of the video's {self.frames} latent frames"
            raise Refusal("initial_latents", problem, "make the video longer")
        check_window(self.window, self.sink_frames, self.sink_rope, max(self.chunk_lengths()))
        if self.attention.pool_rule is not None:
            longest, window = max(self.chunk_lengths()), POOL_WINDOW if self.window is None else self.window
            object.__setattr__(self, "window", window)
            if window <= longest < self.frames:
                problem = f"{window} shows a chunk of {longest} nothing of its past to choose from"
                raise Refusal("window", problem, f"use {2 * longest} latent frames or more")
        if (rule := self.attention.cache_rule) is not None:
            window = WINDOW if self.window is None else self.window
            object.__setattr__(self, "window", window)
            rule.fitted(window, max(self.chunk_lengths()))
            if self.sink_frames:
                problem = f"{self.sink_frames} would stay visible, and {self.attention.policy} brings first frames back"
                raise Refusal("sink_frames", problem, "use 0")
            if rule.memory:
                self._check_memory()
        if self.attention.joint:
            self._check_joint()
        if self.sink_rope.startswith("average") and (self.window or self.frames) < self.frames:
            self._check_average()
        if self.last_latents is not None:
            self._check_end(self.last_latents.shape[2])
        for cut in self.cuts:
            self._check_cut(cut)

    def _check_average(self) -> None:
        """Refusal unless whole chunks leave the window for as many sinks."""
        if self.sink_frames != self.frames_per_chunk:
            problem = (
                f"{self.sink_rope!r} averages chunks of {self.frames_per_chunk} into {self.sink_frames} sink frames"
            )
            raise Refusal("sink_rope", problem, f"use {self.frames_per_chunk} sink_frames, or 'follow'")
        if self.window and self.window % self.frames_per_chunk:
            problem = f"{self.window} lets parts of chunks leave, and {self.sink_rope!r} averages whole ones"
            raise Refusal("window", problem, f"use a multiple of {self.frames_per_chunk}, or sink_rope 'follow'")
        if self.attention.head_rule is not None or self.attention.joint:
            problem = f"{self.sink_rope!r} changes sinks, and {self.attention.policy} keeps frames of its own"
            raise Refusal("sink_rope", problem, "use 'follow', or another policy")

    def _check_memory(self) -> None:
        """Refusal of what would change frames whose tokens are kept, or their order."""
        policy = self.attention.policy
        if any(one.switch == "hard" for one in self.prompts[1:]):
            problem = f"'hard' would read frames again whose tokens {policy} keeps"
            raise Refusal("switch", problem, "use 'soft' or 'blend', or another policy")
        if self.attention.tiles:
            raise Refusal("tiles", f"would mix the rows in which {policy} puts tokens", "leave it off")

    def _check_joint(self) -> None:
        """Refusal of what chunks that are denoised at once cannot have; a window of None becomes the trained one."""
        policy, steps = self.attention.policy, len(self.sigmas) - 1
        if len(self.prompts) > 1:
            problem = f"changes, and {policy} denoises {steps} chunks at once under one text"
            raise Refusal("context", problem, "use one prompt, or another policy")
        if self.last_latents is not None:
            problem = f"cannot be met by {policy}, whose last chunks are denoised at once"
            raise Refusal("last_latents", problem, "leave it out, or use another policy")
        if self.noise_options.first_sigmas is not None:
            problem = f"give one chunk other steps than those that {policy} denoises it with"
            raise Refusal("first_sigmas", problem, "leave them out, or use another policy")
        window, least = WINDOW if self.window is None else self.window, self.sink_frames + self.pass_frames
        object.__setattr__(self, "window", window)
        if window < min(least, self.frames):
            at_once = f"{self.pass_frames} frames that {policy} denoises at once in {steps} steps"
            problem = f"{window} cannot hold {self.sink_frames} sink frames and {at_once}"
            raise Refusal("window", problem, f"use at least {least} latent frames, or fewer steps")

    def _check_cut(self, cut: Prompt) -> None:
        """Refusal unless sinks end before a cut, its pinned frames fit the window, and the policy allows both."""
        start, policy = [0, *accumulate(self.chunk_lengths())][cut.start_chunk], self.attention.policy
        if self.attention.cache_rule is not None or self.attention.pool_rule is not None:
            problem = f"'cut' cannot end a scene that {policy} brings back"
            raise Refusal("switch", problem, "use another policy, or 'hard'")
        if start < self.sink_frames:
            problem = f"'cut' at chunk {cut.start_chunk} is inside the first {self.sink_frames} frames, the sinks"
            raise Refusal("switch", problem, "cut later, or use fewer sink_frames")
        if cut.pin and self.attention.head_rule is not None:
            raise Refusal("pin", f"{cut.pin} would take the place of frames that {policy} reads", "use pin 0")
        check_window(self.window, self.sink_frames + cut.pin, self.sink_rope, max(self.chunk_lengths()))

    def _check_end(self, count: int) -> None:
        """Refusal unless the last chunk has more latent frames than the `count` given ones at its end."""
        per_chunk, last_chunk = self.frames_per_chunk, self.chunk_lengths()[-1]
        if per_chunk == 1:
            problem = "cannot be met by a frame-wise model, which finishes each frame before it sees the next"
            raise Refusal("last_latents", problem, "use a chunk-wise checkpoint")
        if count >= per_chunk:
            problem = f"holds {count} latent frames, and a chunk of {per_chunk} can end with at most {per_chunk - 1}"
            raise Refusal("last_latents", problem, f"give one image, or the last {4 * per_chunk - 4} frames of a video")
        if count >= last_chunk:
            whole = self.frames + per_chunk - last_chunk
            video = f"a video of {video_frames_of(self.frames)} frames ends with a chunk of {last_chunk}"
            problem = f"of {count} latent frames leaves nothing to lead to it: {video}"
            remedy = f"make the video {video_frames_of(whole)} frames long ({whole} latent)"
            raise Refusal("last_latents", problem, remedy)

    @property
    def frames(self) -> int:
        """Latent frames of the whole video."""
        return self.latent_shape[2]

    @property
    def initial_frames(self) -> int:
        """Latent frames that the video starts with."""
        return 0 if self.initial_latents is None else self.initial_latents.shape[2]

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of the timeline; a single text holds throughout."""
        return (Prompt(self.context),) if isinstance(self.context, Tensor) else tuple(self.context)

    def with_prompt(self, prompt: Prompt) -> "Recipe":
        """The recipe with one more prompt, in place of the one that starts at the same chunk, if any."""
        others = [one for one in self.prompts if one.start_chunk != prompt.start_chunk]
        return replace(self, context=(*others, prompt))

    @cached_property
    def guides(self) -> tuple[Timeline, ...]:
        """The prompts and, with guidance, the negative prompt; the model keeps a KV cache for each."""
        prompts, guidance = Timeline(self.prompts), self.guidance
        if guidance.negative is None or guidance.cfg == 1.0:
            return (prompts,)
        return prompts, Timeline([Prompt(guidance.negative)])

    @property
    def cuts(self) -> list[Prompt]:
        """The prompts that begin with a cut in this video."""
        return [one for one in self.prompts if one.switch == "cut" and 0 < one.start_chunk < len(self.chunk_lengths())]

    def chunk_lengths(self) -> list[int]:
        """Latent frames of every chunk of the video."""
        return chunk_lengths(self.frames, self.frames_per_chunk, self.initial_frames)

    @property
    def pass_frames(self) -> int:
        """The most latent frames that one pass computes."""
        lengths, steps = self.chunk_lengths()[self.first_index :], len(self.sigmas) - 1
        joint = sum(sorted(lengths)[-steps:]) if self.attention.joint else 0
        return max(joint, *self.chunk_lengths())

    @property
    def first_index(self) -> int:
        """The index in the video of the first chunk that is generated."""
        return [0, *accumulate(self.chunk_lengths())].index(self.initial_frames)

    def sparsity(self, index: int) -> float:
        """The share of visible key blocks that chunk `index` skips."""
        return self.growth[min(index, len(self.growth) - 1)] if self.growth is not None else 0.0

    @property
    def is_sparse(self) -> bool:
        """Whether any chunk skips anything."""
        return any(self.sparsity(index) > 0.0 for index in range(len(self.chunk_lengths())))

    def levels(self, index: int) -> Sequence[float]:
        """The noise levels of chunk `index`."""
        opens = index == opening_chunk(self.frames_per_chunk, self.initial_frames)
        return self.noise_options.first_sigmas or self.sigmas if opens else self.sigmas

    @property
    def ring(self) -> tuple[int, int]:
        """The latent frames that a KV cache holds, and how many of them are sinks."""
        slots, sinks = min(self.window or self.frames, self.frames), self.sink_frames
        rule, longest = self.attention.head_rule, max(self.chunk_lengths())
        # Not `is_sparse`, which may differ in a longer video of the same growth.
        if rule is not None and any(self.growth or ()):
            sinks = max(sinks, min(rule.sinks, slots - longest))
            slots = min(slots, sinks + int(rule.near) + longest)
        return slots, min(sinks, slots - 1)

    def pool_slots(self, index: int) -> int:
        """The slots of the pool that chunk `index` finds in use; a hard switch empties it."""
        rule, ends, slots = self.attention.pool_rule, [0, *accumulate(self.chunk_lengths())], self.ring[0]
        if rule is None or not self.is_sparse:
            return 0
        switches = [one.start_chunk for one in self.prompts[1:] if one.switch == "hard" and one.start_chunk <= index]
        gone, before = (max(0, end - slots) for end in (ends[index + 1], ends[max(switches, default=0)]))
        return min(int(rule.persistent), gone - before)

    def cache_shape(self, *, layers: int, heads: int, head_dim: int, dtype: torch.dtype) -> CacheShape:
        """The KV cache that a model of these sizes needs for one prompt."""
        batch, _, frames, height, width = self.latent_shape
        slots, sinks = self.ring
        pool = self.attention.pool_rule
        rule = self.attention.cache_rule if slots < frames else None  # nothing comes back if the window never moves
        return CacheShape(
            layers=layers,
            batch=batch,
            slots=slots,
            grid=(height // 2, width // 2),
            heads=heads,
            head_dim=head_dim,
            block_k=self.attention.block[1],
            sink_frames=0 if self.attention.joint else sinks,
            sink_rope=self.sink_rope if slots < frames else "fixed",  # nothing to follow if the window never moves
            anchors=sinks if self.attention.joint else 0,
            pool=int(pool.persistent) if pool and slots < frames and self.is_sparse else 0,
            rolling=rule and rule.fitted(slots, max(self.chunk_lengths())),
            pools=self.attention.pools(sparse=self.is_sparse),
            dtype=dtype,
        )

    def noise(self) -> Noise:
        """The noise of this video; draw 0 starts a chunk, draw s ≥ 1 follows step s."""
        return seeded_noise(self.seed, self.noise_options.chunk_seeds)

    def check_finished(self, finished: Sequence[Tensor], begun: Tensor | None = None) -> None:
        """Refusal unless these latents are the video's first generated chunks, and `begun` what `Chunk` says."""
        batch, channels, _, *size = self.latent_shape
        lengths = self.chunk_lengths()[self.first_index :]
        if len(finished) > len(lengths):
            problem = f"holds {len(finished)} chunks of a video that has {len(lengths)}"
            raise Refusal("finished", problem, "pass the chunks of this video only")
        for number, (latents, frames) in enumerate(zip(finished, lengths, strict=False), start=self.first_index):
            shape, expected = list(latents.shape), [batch, channels, frames, *size]
            if shape != expected:
                raise Refusal("finished", f"holds chunk {number} of shape {shape}", f"pass one of {expected}")
        more = len(self.sigmas) - 2 if self.attention.joint and finished else 0
        frames = sum(lengths[len(finished) : len(finished) + more])
        given = None if begun is None else list(begun.shape)
        wanted = [batch, channels, frames, *size] if frames else None
        if given != wanted:
            problem = f"has shape {given}, and the chunks begun behind the finished ones have {wanted}"
            raise Refusal("begun", problem, "pass what came with the last finished chunk")

    def latents_with(self, finished: Sequence[Tensor]) -> Tensor | None:
        """Initial latents, then finished ones, [B or 1, C, frames, height, width]."""
        if not finished:
            return self.initial_latents
        given = self.initial_latents
        start = [] if given is None else [given.to(finished[0]).expand(self.latent_shape[0], -1, -1, -1, -1)]
        return torch.cat([*start, *finished], dim=2)


def _shape(latent_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(map(int, latent_shape))
    if len(shape) != 5 or min(shape) < 1:
        problem = f"{shape} is not five positive numbers"
        raise Refusal("latent_shape", problem, "use (batch, channels, frames, height, width)")
    check_size(8 * shape[3], 8 * shape[4])
    return shape


def _levels(name: str, sigmas: Sequence[float]) -> tuple[float, ...]:
    levels, remedy = tuple(map(float, sigmas)), f"use a list like {few_step_sigmas()}"
    if len(levels) < 2 or levels[-1] != 0.0 or not all(a > b for a, b in pairwise(levels)):
        raise Refusal(name, f"{list(levels)} does not fall from step to step to 0", remedy)
    if not 0.0 < levels[0] <= 1.0:
        raise Refusal(name, f"starts at {levels[0]}, outside (0, 1]", remedy)
    return levels


def _check_batch(name: str, x: Tensor, batch: int) -> None:
    if x.shape[0] not in (1, batch):
        fitting = "1" if batch == 1 else f"1 or {batch}"
        raise Refusal(name, f"is a batch of {x.shape[0]} and the video one of {batch}", f"use a batch of {fitting}")


def check_given(name: str, given: Tensor, shape: Sequence[int]) -> None:
    """Refusal unless given latents fit a video of latents `shape` and are finite."""
    _, channels, _, height, width = shape
    if given.ndim != 5 or given.shape[1] != channels or not given.shape[2]:
        expected = f"pass [batch, {channels}, frames, height, width], as the Wan 2.1 VAE encodes them"
        raise Refusal(name, f"has shape {list(given.shape)}", expected)
    if tuple(given.shape[3:]) != (height, width):
        sizes = f"{8 * given.shape[4]}×{8 * given.shape[3]} and the video {8 * width}×{8 * height}"
        raise Refusal(name, f"is {sizes}", "resize its frames to the video's size before encoding them")
    _check_batch(name, given, shape[0])
    check_finite(name, given, "encode the frames again")

"""How one video falls into chunks, what each chunk may see, and how sparse it may be: a recipe to hand around."""

from dataclasses import dataclass, replace

from ..families import Family, SinkRope
from .growth import chunk_lengths, chunk_sparsities, first_chunk_length


def latent_frames_of(video_frames: int) -> int:
    """Latent frames of a video of 1 + 4·k frames; ValueError for another length."""
    if video_frames < 1 or (video_frames - 1) % 4:
        below = max(1, 1 + (video_frames - 1) // 4 * 4)
        raise ValueError(f"length {video_frames} is not 1 + 4·k video frames; use {below} or {below + 4}")
    return (video_frames - 1) // 4 + 1


def video_frames_of(latent_frames: int) -> int:
    """Video frames that `latent_frames` latent frames decode to: 1 for the first, 4 for each later one."""
    return 4 * latent_frames - 3


def latent_frame_at(video_frame: int) -> int:
    """The latent frame that video frame `video_frame`, counted from 0, is decoded from."""
    return (video_frame + 3) // 4


@dataclass(frozen=True)
class Schedule:
    """The recipe for one video of `latent_frames`; `target` None is dense throughout.

    `window` (None: everything) counts latent frames, sinks and the current chunk included. `curve` is one of
    `growth.CURVES`; `base` and `dense_chunks` as in `growth.chunk_sparsities`. `overrides` are (chunk index, sparsity)
    pairs that replace the curve's values, whose target then holds without them. `title` says where it comes from.
    Construction raises ValueError for a recipe that cannot be met.
    """

    latent_frames: int
    frames_per_chunk: int = 3
    window: int | None = None
    sink_frames: int = 0
    sink_rope: SinkRope = "fixed"
    target: float | None = None
    base: float | None = None
    curve: str = "inverse_sqrt"
    dense_chunks: int = 1
    title: str = "custom"
    overrides: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        longest = max(self.chunk_lengths())
        if self.sink_frames < 0:
            raise ValueError(f"sink_frames {self.sink_frames} is negative; use 0 or more")
        if self.window is not None and self.window < self.sink_frames + longest:
            raise ValueError(
                f"window {self.window} cannot hold {self.sink_frames} sink frames and a chunk of {longest}; "
                f"use at least {self.sink_frames + longest} latent frames"
            )
        self.sparsities()

    @classmethod
    def of_family(cls, family: Family, latent_frames: int) -> "Schedule":
        """The defaults of a checkpoint family."""
        return cls(
            latent_frames,
            family.frames_per_chunk,
            family.window,
            family.sink_frames,
            family.sink_rope,
            family.target,
            family.base,
            title=family.title,
        )

    def dense(self) -> "Schedule":
        """The same chunks and window with nothing skipped."""
        return replace(self, target=None, base=None, overrides=(), title=f"{self.title}, dense")

    def chunk_lengths(self, initial_frames: int = 0) -> list[int]:
        """Latent frames of every chunk; `initial_frames` given latents that do not fill chunks shorten the first."""
        return chunk_lengths(
            self.latent_frames, self.frames_per_chunk, first_chunk_length(self.frames_per_chunk, initial_frames)
        )

    def sparsities(self, initial_frames: int = 0) -> list[float] | None:
        """One sparsity in [0, 1) per chunk, or None for dense."""
        if self.target is None and not self.overrides:
            return None
        values = [0.0] * len(self.chunk_lengths(initial_frames))
        if self.target is not None:
            values = chunk_sparsities(
                self.latent_frames,
                self.frames_per_chunk,
                target=self.target,
                base=self.base,
                window=self.window,
                dense_chunks=self.dense_chunks,
                curve=self.curve,
                first_chunk=first_chunk_length(self.frames_per_chunk, initial_frames),
            )
        for chunk, sparsity in self.overrides:
            if not 0 <= chunk < len(values):
                raise ValueError(f"sparsity is given for chunk {chunk}; this video has chunks 0 to {len(values) - 1}")
            if not 0.0 <= sparsity < 1.0:
                raise ValueError(f"sparsity {sparsity} of chunk {chunk} is outside [0, 1); 0 is dense")
            values[chunk] = sparsity
        return values

    def visible_frames(self) -> int:
        """Latent frames that the KV cache must hold."""
        return self.latent_frames if self.window is None else min(self.window, self.latent_frames)

"""A run that survives a restart: its finished chunks and all that steers it, as one safetensors file.

Fed back to `rollout`, a state continues the video as if it had never stopped, bit for bit on the same machine.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..attention.dispatch import AttentionOptions
from ..attention.quantised import KVDtype
from ..families import SinkRope
from ..files.tensors import write_tensors
from ..model.kv_storage import KVOptions
from .growth import chunk_lengths, first_chunk_length
from .rollout import Chunk, Replay, check_last_latents, seeded_noise
from .timeline import Prompt, Timeline

FORMAT = "light_forcing_run_state"
VERSION = 2  # 1 knows no given end; a state without one is still written as 1
TENSORS = ("given", "last_latents", "negative")  # the fields that are one tensor or None


class StateError(ValueError):
    """A saved run cannot be used; the message names it, what is wrong with it and the way out."""


@dataclass(frozen=True, eq=False)
class RunState:
    """What a run has made so far and what it was asked for; the fields are `rollout`'s arguments of the same name.

    model: what identifies the model, a text of the caller's making (sizes, family, a hash of some weights).
    latent_shape: (B, C, frames, h, w) of the whole video. prompts: the timeline. chunk_seeds: chunk index → seed of
    its own. kv_dtype: how the KV cache keeps keys and values. given: the initial latents [B or 1, C, frames, h, w]
    that the video started from. finished: the chunks generated since, [B, C, frames, h, w] each, in the model's
    normalised space, on the CPU.

    A run with a `noise` function of its own cannot be told by a state. Raises ValueError for parts that do not fit
    together.
    """

    model: str
    latent_shape: tuple[int, int, int, int, int]
    frames_per_chunk: int
    sigmas: tuple[float, ...]
    prompts: tuple[Prompt, ...]
    first_sigmas: tuple[float, ...] | None = None
    growth: tuple[float, ...] | None = None
    window: int | None = None
    sink_frames: int = 0
    sink_rope: SinkRope = "fixed"
    seed: int = 0
    chunk_seeds: Mapping[int, int] = field(default_factory=dict)
    context_noise: float = 0.0
    cfg: float = 1.0
    negative: Tensor | None = None
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    kv_dtype: KVDtype = "same"
    given: Tensor | None = None
    last_latents: Tensor | None = None
    finished: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        Timeline(self.prompts)
        batch, channels, _, *size = self.latent_shape
        if self.given is not None:
            shape = tuple(self.given.shape)
            if len(shape) != 5 or shape[0] not in (1, batch) or (shape[1], *shape[3:]) != (channels, *size):
                raise ValueError(f"the given latents have shape {shape}, which does not fit a video of {self._shape()}")
            if shape[2] >= self.latent_shape[2]:
                raise ValueError(f"the given latents already fill {shape[2]} of {self.latent_shape[2]} latent frames")
        planned = self.chunk_lengths()
        if self.last_latents is not None:
            check_last_latents(self.last_latents, self.latent_shape, self.frames_per_chunk, planned[-1])
        lengths = planned[self.first_index :]
        if len(self.finished) > len(lengths):
            raise ValueError(f"{len(self.finished)} chunks are finished; a video of {self._shape()} has {len(lengths)}")
        for number, (latents, frames) in enumerate(zip(self.finished, lengths, strict=False), start=self.first_index):
            shape, expected = tuple(latents.shape), (batch, channels, frames, *size)
            if shape != expected:
                raise ValueError(f"chunk {number} has shape {shape}; expected {expected}")

    @property
    def given_frames(self) -> int:
        """Latent frames that the video started from."""
        return 0 if self.given is None else self.given.shape[2]

    @property
    def finished_frames(self) -> int:
        """Latent frames there are, given ones included."""
        return self.given_frames + sum(chunk.shape[2] for chunk in self.finished)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to generate."""
        return self.finished_frames == self.latent_shape[2]

    @property
    def first_index(self) -> int:
        """The index in the video of the first generated chunk."""
        lengths = self.chunk_lengths()
        return next(index for index in range(len(lengths)) if sum(lengths[:index]) >= self.given_frames)

    @property
    def latents(self) -> Tensor | None:
        """All latents there are, [B, C, frames, h, w], given ones first; None before the first."""
        given = [] if self.given is None else [self.given.float().expand(self.latent_shape[0], -1, -1, -1, -1)]
        parts = [*given, *self.finished]
        return torch.cat(parts, dim=2) if parts else None

    def chunk_lengths(self) -> list[int]:
        """Latent frames of every chunk of the video."""
        return chunk_lengths(
            self.latent_shape[2], self.frames_per_chunk, first_chunk_length(self.frames_per_chunk, self.given_frames)
        )

    def extended_by(self, chunk: Chunk) -> "RunState":
        """The state after one more chunk, which must be the next one; StateError for another."""
        index, start = self.first_index + len(self.finished), self.finished_frames
        if (chunk.index, chunk.start_frame) != (index, start) or self.is_complete:
            raise StateError(
                f"chunk {chunk.index} starts at latent frame {chunk.start_frame}, the state ends before "
                f"{'the end of the video' if self.is_complete else f'chunk {index} at {start}'}; add chunks in order"
            )
        latents = chunk.latents.detach().to("cpu", torch.float32, copy=True)
        return replace(self, finished=(*self.finished, latents))

    def lengthened(self, latent_frames: int) -> "RunState":
        """The same run for a longer video, which continues as if it had been asked for this length at once.

        A short last chunk, there because the former length was no multiple of the chunk size, would not be short in
        the longer video: it is left out and made again at full length. So is one that led to given last latents,
        which the longer video ends with instead. `growth` stays; its last value holds on.
        """
        batch, channels, frames, height, width = self.latent_shape
        if latent_frames <= frames:
            raise StateError(f"the video already has {frames} latent frames; {latent_frames} would not lengthen it")
        longer = replace(self, latent_shape=(batch, channels, latent_frames, height, width), finished=())
        planned = longer.chunk_lengths()[self.first_index :]
        if self.last_latents is not None:
            planned = planned[: len(self.chunk_lengths()) - 1 - self.first_index]
        whole = [chunk for chunk, length in zip(self.finished, planned, strict=False) if chunk.shape[2] == length]
        return replace(longer, finished=tuple(whole))

    def check_model(self, model: str) -> None:
        """StateError, naming both, unless the state was made by this model."""
        if model != self.model:
            raise StateError(
                f"this state was made by the model {self.model}, the loaded model is {model}; "
                f"load the former to continue, or start a new video"
            )

    def _shape(self) -> str:
        batch, channels, frames, height, width = self.latent_shape
        return f"{batch}×{channels}×{frames} latent frames×{height}×{width}"


def resume_arguments(state: RunState, *, replay: Replay = "all") -> dict[str, Any]:
    """Keyword arguments with which `rollout(dit, **arguments)` yields the chunks that are missing.

    replay "all" continues exactly; "window" feeds only the frames that are still visible, which costs no more for a
    long video than for a short one and is close but not equal. StateError when nothing is missing.
    """
    if state.is_complete:
        raise StateError(
            f"all {state.latent_shape[2]} latent frames of this video are finished; "
            f"ask for a longer video (`lengthened`) to go on"
        )
    same = [
        "latent_shape",
        "frames_per_chunk",
        "sigmas",
        "first_sigmas",
        "growth",
        "window",
        "sink_frames",
        "sink_rope",
    ]
    same += ["context_noise", "cfg", "negative", "attention", "last_latents"]
    return {
        **{name: getattr(state, name) for name in same},
        "context": list(state.prompts),
        "kv": KVOptions(state.kv_dtype),
        "noise": seeded_noise(state.seed, state.chunk_seeds),
        "initial_latents": state.latents,
        "replay": replay,
    }


def save_run_state(state: RunState, path: str | Path) -> Path:
    """Write the state whole or not at all; a former file stays until the new one is complete.

    Raises OutputError when the folder cannot take the file or the disk is full.
    """
    tensors, facts = _packed(state)
    facts["checksums"] = {name: _checksum(tensor) for name, tensor in tensors.items()}
    version = 1 if state.last_latents is None else VERSION
    return write_tensors(path, tensors, {"format": FORMAT, "version": str(version), "state": json.dumps(facts)})


def load_run_state(path: str | Path) -> RunState:
    """Read a state back, its tensors on the CPU.

    Raises StateError for a file that is missing, damaged, of another kind, or from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise StateError(f"{path}: no such file; run states are .safetensors files written by save_run_state")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata)
            # Copies, since tensors lie in the file at any address, and how a matrix product rounds can depend on it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise StateError(_why_unreadable(path, error)) from error
    try:
        facts = json.loads(metadata["state"])
        sums: dict[str, int] = facts.pop("checksums")
        if missing := sums.keys() - tensors.keys():
            raise StateError(f"{path}: {', '.join(sorted(missing))} is missing; use an older copy of the state")
        for name, expected in sums.items():
            if _checksum(tensors[name]) != expected:
                raise StateError(f"{path}: {name} is damaged (wrong checksum); use an older copy of the state")
        return _unpacked(tensors, facts)
    except StateError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"{path}: its header is damaged ({error}); use an older copy of the state") from error


def _packed(state: RunState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by name, and everything else as plain JSON values."""
    tensors = {f"chunk.{i:05d}": chunk.detach().cpu().contiguous() for i, chunk in enumerate(state.finished)}
    shared = {f"prompt.{i}": prompt.context for i, prompt in enumerate(state.prompts)}
    shared |= {name: t for name in TENSORS if (t := getattr(state, name)) is not None}
    for name, tensor in shared.items():  # safetensors refuses tensors that share memory, like a prompt that returns
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    apart = {*TENSORS, "finished", "prompts", "attention"}
    facts = {name: value for name, value in vars(state).items() if name not in apart}
    facts["chunk_seeds"] = list(state.chunk_seeds.items())
    facts["attention"] = asdict(state.attention)
    facts["prompts"] = [
        {"start_chunk": prompt.start_chunk, "switch": prompt.switch, "blend_chunks": prompt.blend_chunks}
        for prompt in state.prompts
    ]
    facts["finished"] = len(state.finished)
    return tensors, facts


def _unpacked(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> RunState:
    """The reverse of `_packed`; KeyError, TypeError or ValueError for what is not a state."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    plain["chunk_seeds"] = dict(facts["chunk_seeds"])
    plain["attention"] = AttentionOptions(**{**facts["attention"], "block": tuple(facts["attention"]["block"])})
    plain["prompts"] = tuple(Prompt(tensors[f"prompt.{i}"], **one) for i, one in enumerate(facts["prompts"]))
    plain["finished"] = tuple(tensors[f"chunk.{i:05d}"] for i in range(facts["finished"]))
    plain |= {name: tensors.get(name) for name in TENSORS}
    return RunState(**plain)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0


def _check_kind(path: Path, metadata: Mapping[str, str]) -> None:
    """StateError unless the header is that of a state which this version can read."""
    kind = metadata.get("format")
    if kind != FORMAT:
        found = f"it says {kind!r}" if kind else "it is some other safetensors file"
        raise StateError(f"{path}: holds no run state ({found}); choose a file that save_run_state wrote")
    version = metadata.get("version", "")
    if not version.isdecimal():
        raise StateError(f"{path}: its header is damaged (version {version!r}); use an older copy of the state")
    if int(version) > VERSION:
        raise StateError(
            f"{path}: is a state of version {version}, this one reads up to {VERSION}; update Light Forcing"
        )


def _why_unreadable(path: Path, error: Exception) -> str:
    """What a file is that safetensors refuses."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        return f"{path}: is empty; use an older copy of the state"
    if start[8:] == b"{":
        return f"{path}: is damaged or cut short ({error}); use an older copy of the state"
    return f"{path}: is no safetensors file ({error}); choose a file that save_run_state wrote"

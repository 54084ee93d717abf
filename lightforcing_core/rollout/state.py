"""A run that survives a restart, bit for bit on one machine: its recipe and finished chunks as a safetensors file."""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.options import AttentionOptions
from ..attention.quantised import KVDtype
from ..files.json import read_json
from ..files.tensors import read_tensors, write_tensors
from ..model.kv_storage import KVOptions
from ..refusal import Refusal, check_choice
from .recipe import Guidance, NoiseOptions, Recipe
from .runtime import Chunk
from .timeline import Prompt

FORMAT = "light_forcing_run_state"
# Version 1 has no given end and no key_mean, version 2 no cuts and averaged sinks; saved as the lowest that has all.
VERSION = 3
MOST_FRAMES = 1_000_000  # latent frames of a saved video
# The fields of a prompt and of a recipe that are saved as they are.
PROMPT_FACTS = ("start_chunk", "switch", "blend_chunks", "jump", "pin")  # the last two of a cut only
RECIPE_FACTS = ("latent_shape", "frames_per_chunk", "sigmas", "growth", "window", "sink_frames", "sink_rope", "seed")


class StateError(ValueError):
    """A saved run that cannot be used; the message names the file, the problem and the remedy."""


@dataclass(frozen=True, eq=False)
class RunState:
    """A run: its recipe, and the part of the video that is finished.

    recipe: everything that determines the video. A run with its own `noise` function cannot be saved.
    model: text that identifies the model; the caller chooses it (sizes, family, a hash of some weights).
    kv_dtype, key_mean: how the run's KV cache keeps keys and values, see `KVOptions`.
    finished: the chunks generated so far, [B, C, frames, h, w] each, in the model's normalised space, on the CPU.
    begun: of the last one, see `Chunk`.

    Raises Refusal for chunks that are not this recipe's. `rollout(dit, state.recipe, runtime, state.finished,
    state.begun)` with `Runtime(kv=state.kv)` yields the chunks that are missing.
    """

    recipe: Recipe
    model: str
    kv_dtype: KVDtype = "same"
    finished: tuple[Tensor, ...] = ()
    key_mean: bool = True
    begun: Tensor | None = None

    def __post_init__(self) -> None:
        self.recipe.check_finished(self.finished, self.begun)

    @property
    def kv(self) -> KVOptions:
        return KVOptions(self.kv_dtype, key_mean=self.key_mean)

    @property
    def finished_frames(self) -> int:
        """Latent frames of the video so far, initial ones included."""
        return self.recipe.initial_frames + sum(chunk.shape[2] for chunk in self.finished)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to generate."""
        return self.finished_frames == self.recipe.frames

    @property
    def latents(self) -> Tensor | None:
        """The latents so far, [B, C, frames, h, w], initial ones first; None if there are none."""
        latents = self.recipe.latents_with(self.finished)
        return None if latents is None else latents.float().expand(self.recipe.latent_shape[0], -1, -1, -1, -1)

    def extended_by(self, chunk: Chunk) -> "RunState":
        """The state after one more chunk, which must be the next one; StateError for another."""
        index, start = self.recipe.first_index + len(self.finished), self.finished_frames
        if (chunk.index, chunk.start_frame) != (index, start) or self.is_complete:
            place = "the end of the video" if self.is_complete else f"chunk {index} at {start}"
            problem = f"chunk {chunk.index} starts at latent frame {chunk.start_frame}, the state ends before {place}"
            raise StateError(f"{problem}; add chunks in order")
        latents = chunk.latents.detach().to("cpu", torch.float32, copy=True)
        begun = None if chunk.begun is None else chunk.begun.detach().to("cpu", torch.float32, copy=True)
        return replace(self, finished=(*self.finished, latents), begun=begun)

    def lengthened(self, latent_frames: int) -> "RunState":
        """The same run for a longer video, equal to a run of the same growth that had this length from the start.

        A short last chunk would be longer in the longer video, so it is dropped and generated again. The same applies
        to a last chunk with given last latents, because now the longer video ends with them. `growth` stays: that
        of a family's schedule suits any length, another one's last value applies to the added chunks. StateError if
        chunks that are denoised at once have ended with the shorter video.
        """
        recipe = self.recipe
        batch, channels, frames, height, width = recipe.latent_shape
        if latent_frames <= frames:
            raise StateError(f"the video already has {frames} latent frames; {latent_frames} would not lengthen it")
        longer = replace(recipe, latent_shape=(batch, channels, latent_frames, height, width))
        planned = longer.chunk_lengths()[recipe.first_index :]
        if recipe.last_latents is not None:
            planned = planned[: len(recipe.chunk_lengths()) - 1 - recipe.first_index]
        whole = [chunk for chunk, length in zip(self.finished, planned, strict=False) if chunk.shape[2] == length]
        try:
            return replace(self, recipe=longer, finished=tuple(whole))
        except Refusal:
            if not recipe.attention.joint:
                raise
            problem = f"{recipe.attention.policy} has denoised the last chunks of this video at once, as its end"
            raise StateError(f"{problem}; start a new video that begins with this one's frames") from None

    def check_model(self, model: str) -> None:
        """StateError, naming both, unless the state was made by this model."""
        if model != self.model:
            raise StateError(
                f"this state was made by the model {self.model}, the loaded model is {model}; "
                f"load the former to continue, or start a new video"
            )


def save_run_state(state: RunState, path: str | Path) -> Path:
    """Write the state completely or not at all; OutputError if the folder or the disk cannot take the file."""
    tensors, facts = _packed(state)
    facts["checksums"] = {name: _checksum(tensor) for name, tensor in tensors.items()}
    version = 1 if state.recipe.last_latents is None and "key_mean" not in facts else 2
    changes_sinks = state.recipe.sink_rope.startswith("average")
    version = 3 if changes_sinks or any(one["switch"] == "cut" for one in facts["prompts"]) else version
    return write_tensors(path, tensors, {"format": FORMAT, "version": str(version), "state": json.dumps(facts)})


def load_run_state(path: str | Path) -> RunState:
    """Read a state to the CPU; StateError for a file that is missing, damaged, of another kind or a newer version."""
    path = Path(path)
    try:
        # Copies, because the rounding of a matrix product can depend on alignment, and the file gives none.
        tensors, metadata = read_tensors(path, copy=True)
    except OSError as error:
        raise StateError(f"{path}: cannot be read ({error.strerror}); choose another file") from error
    except ValueError as error:
        raise StateError(
            f"{path}: is cut short or no safetensors file ({error}); use an older copy, or a file of save_run_state"
        ) from error
    if (kind := metadata.get("format")) != FORMAT:
        raise StateError(f"{path}: holds no run state (format {kind!s:.40}); choose a file that save_run_state wrote")
    try:
        if int(metadata["version"]) > VERSION:
            problem = f"is a state of version {metadata['version']:.9}, this one reads up to {VERSION}"
            raise StateError(f"{path}: {problem}; update Light Forcing")
        facts = read_json(metadata["state"])
        for name, expected in facts.pop("checksums").items():
            if name not in tensors or _checksum(tensors[name]) != expected:
                raise StateError(f"{path}: {name} is missing or damaged; use an older copy of the state")
        return _unpacked(tensors, facts)
    except (StateError, MemoryError):
        raise
    except Exception as error:  # a damaged header can fail anywhere; to the user it means the same
        raise StateError(f"{path}: its header is damaged ({error!s:.200}); use an older copy of the state") from error


def _packed(state: RunState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by name, and everything else as plain JSON values."""
    recipe, noise, guidance = state.recipe, state.recipe.noise_options, state.recipe.guidance
    tensors = {f"chunk.{i:05d}": chunk for i, chunk in enumerate(state.finished)}
    tensors |= {f"prompt.{i}": prompt.context for i, prompt in enumerate(recipe.prompts)}
    given = {"given": recipe.initial_latents, "last_latents": recipe.last_latents, "negative": guidance.negative}
    given["begun"] = state.begun
    tensors |= {name: tensor for name, tensor in given.items() if tensor is not None}
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    facts = {name: getattr(recipe, name) for name in RECIPE_FACTS}
    facts |= {"model": state.model, "kv_dtype": state.kv_dtype, "finished": len(state.finished)}
    if state.key_mean and state.kv_dtype != "same":
        facts["key_mean"] = True
    facts |= {"cfg": guidance.cfg, "attention": recipe.attention.to_saved()}
    facts |= {**vars(noise), "chunk_seeds": list(noise.chunk_seeds.items())}
    facts["prompts"] = [
        {name: getattr(one, name) for name in PROMPT_FACTS[: None if one.switch == "cut" else 3]}
        for one in recipe.prompts
    ]
    return tensors, facts


def _unpacked(tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> RunState:
    """The reverse of `_packed`; any error if it is not a state."""
    if max(facts["latent_shape"]) > MOST_FRAMES:  # before a list of the chunks is made
        raise ValueError(f"latent_shape {facts['latent_shape']!s:.80}, over {MOST_FRAMES}")
    attention = facts.pop("attention")
    prompts = [Prompt(tensors[f"prompt.{i}"], **one) for i, one in enumerate(facts.pop("prompts"))]
    count = facts.pop("finished")
    finished = tuple(tensors[f"chunk.{i:05d}"] for i in range(count))
    state = {name: facts.pop(name) for name in ("model", "kv_dtype") if name in facts}
    key_mean = facts.pop("key_mean", state.get("kv_dtype", "same") == "same") is True
    noise = {name: facts.pop(name) for name in ("first_sigmas", "context_noise") if name in facts}
    lists = facts["sigmas"], facts.get("growth"), noise.get("first_sigmas")
    are_numbers = all(type(number) in (int, float) for some in lists for number in some or ())
    recipe = Recipe(
        context=prompts,
        initial_latents=tensors.get("given"),
        last_latents=tensors.get("last_latents"),
        attention=AttentionOptions.from_saved(attention),
        guidance=Guidance(facts.pop("cfg", 1.0), tensors.get("negative")),
        noise_options=NoiseOptions(chunk_seeds=dict(facts.pop("chunk_seeds")), **noise),
        **facts,
    )
    run = RunState(recipe, finished=finished, key_mean=key_mean, begun=tensors.get("begun"), **state)
    # JSON has other types than these fields need, and a wrong one would fail much later.
    integers = [count, recipe.frames_per_chunk, recipe.window or 0, recipe.sink_frames, recipe.seed]
    integers += recipe.noise_options.chunk_seeds.values()
    integers += [getattr(prompt, name) for prompt in recipe.prompts for name in PROMPT_FACTS if name != "switch"]
    if count < 0 or not all(type(number) is int and abs(number) < 1 << 64 for number in integers):
        raise TypeError(f"{integers!s:.80} where whole numbers are needed")
    are_floats = math.isfinite(recipe.guidance.cfg) and all(map(Tensor.is_floating_point, tensors.values()))
    if type(run.model) is not str or not are_floats or not are_numbers:
        raise TypeError("a text, number or tensor of another type than it needs")
    check_choice("kv_dtype", run.kv_dtype, KVDtype)
    return run


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0

"""The videos of a batch: one per line of a file, and per seed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ...lightforcing_core.refusal import check_size
from ...lightforcing_core.rollout.schedule import latent_frames_of
from ..queue.jobs import check_names, read_lines
from ..queue.prompt import UsageError

MOST_CHANGES = 1000  # of the prompt, in one video
Kinds: TypeAlias = Mapping[str, tuple[type, ...]]
SCENE: Kinds = {"text": (str,), "embeds": (str,)}
CHANGE: Kinds = {**SCENE, **dict.fromkeys(("start_chunk", "blend_chunks", "jump", "pin"), (int,)), "switch": (str,)}
NUMBERS: Kinds = {**dict.fromkeys(("seed", "height", "width", "length"), (int,)), "target": (int, float)}
LINE: Kinds = {**SCENE, **NUMBERS, "name": (str,), "timeline": (list,)}


@dataclass(frozen=True)
class RenderJob:
    """One video. What is None is the model's own.

    name: of its file. text, embeds: the prompt, or the file of one that ComfyUI has encoded.
    target: the mean sparsity, 0 for dense. timeline: further prompts, each with the arguments of `Prompt`.
    """

    name: str
    text: str | None = None
    embeds: str | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    length: int | None = None
    target: float | None = None
    timeline: Sequence[Mapping[str, Any]] = ()

    def digest(self, model: str) -> str:
        """The same for what gives the same video with a model. Raises OSError for a file that cannot be read."""
        facts = asdict(self)
        for one in (facts, *facts["timeline"]):
            if one.get("embeds"):  # the file may be moved, and another may take its place
                one["embeds"] = hashlib.sha256(Path(one["embeds"]).read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps([model, facts], sort_keys=True).encode()).hexdigest()[:16]


def read_jobs(path: Path, seeds: Sequence[int] | None) -> list[RenderJob]:
    """The jobs of a file with a text per line, or of a .jsonl file with an object of `LINE` per line.

    Raises UsageError, naming the line, for what no video can be made of.
    """
    jobs = []
    for number, line in enumerate(read_lines(path, _checked), 1):
        fields = dict(line)
        name = fields.pop("name", f"{number:04d}")
        if seeds is not None and "seed" in fields:
            raise UsageError(f"{name} has a seed of its own; leave out --seeds")
        folder = path.parent
        for one in (fields, *fields.get("timeline", ())):
            if "embeds" in one:
                one["embeds"] = str((folder / one["embeds"]).resolve())
        if seeds is None:
            jobs.append(RenderJob(name, **fields))
        jobs += [RenderJob(f"{name}-seed{seed}", **fields | {"seed": seed}) for seed in seeds or ()]
    check_names(jobs)
    return jobs


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A line's values; ValueError for one that is not known or has another type."""
    fields = _scene(fields, LINE)
    check_size(fields.get("height", 16), fields.get("width", 16))
    latent_frames_of(fields.get("length", 1))
    if len(timeline := fields.get("timeline", ())) > MOST_CHANGES:
        raise ValueError(f"timeline has {len(timeline)} prompts; use {MOST_CHANGES} at most")
    if timeline:
        fields["timeline"] = [_scene(one, CHANGE) for one in timeline]
    return fields


def _scene(fields: Any, kinds: Kinds) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise ValueError(f"{fields!r:.80} is not an object with text or embeds")
    for key, value in fields.items():
        if type(value) not in kinds.get(key, ()):
            raise ValueError(f"{key!r:.80} may not be {value!r:.80}; known are {', '.join(kinds)}")
    if ("text" in fields) == ("embeds" in fields):
        raise ValueError("give text or embeds, and not both")
    return dict(fields)

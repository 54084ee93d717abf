"""The jobs of a batch: one per line of a prompt file and per seed, each a whole prompt with its own name.

A prompt file holds one text per line; empty lines and lines that start with `#` are skipped. A `.jsonl` file holds one
object per line with any of `text`, `name` (the folder of its files), `seed` and `set` ({"node.input": value}).
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from ...lightforcing_core.files.json import mapping, read_json, read_text
from .prompt import Override, Prompt, UsageError, apply_overrides, find_input, list_nodes, title_of

PROMPT_INPUTS = {"CLIPTextEncode": "text", "LightForcingDemoPrompt": "caption"}  # prompt nodes, their input for it
SEED_NAMES = ("seed", "noise_seed")
NAME = re.compile(r"\w(?:[\w .()+-]{0,98}[\w)+-])?")
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows
MOST_SEEDS = MOST_LINES = 100_000
Line: TypeAlias = Mapping[str, Any]  # of a prompt file; a missing key keeps the workflow's own value


class Named(Protocol):
    @property
    def name(self) -> str: ...


@dataclass(frozen=True, eq=False)
class Job:
    """One prompt to run."""

    name: str
    prompt: Prompt

    @property
    def digest(self) -> str:
        """SHA-256 of what the server runs; titles do not count."""
        runs = {node: [entry["class_type"], entry.get("inputs")] for node, entry in self.prompt.items()}
        return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()


def read_prompts(path: Path) -> list[Line]:
    """The lines of a prompt file. Raises UsageError naming the line that cannot be read."""
    return read_lines(path, _checked)


def read_lines(path: Path, checked: Callable[[Any], Line]) -> list[Line]:
    """The same with another function for the values of a .jsonl file's lines."""
    try:
        rows = read_text(path).split("\n")  # splitlines() would also cut at a prompt's U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} as UTF-8 text: {error}") from error
    is_json = path.suffix.lower() in (".jsonl", ".ndjson")
    lines: list[Line] = []
    for number, row in enumerate(rows, 1):
        if row.strip() and not row.lstrip().startswith("#"):
            try:
                lines.append(checked(read_json(row)) if is_json else {"text": row.strip()})
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: {error}") from error
            if len(lines) > MOST_LINES:
                raise UsageError(f"{path} holds more than {MOST_LINES} prompts; split it into several files")
    if not lines:
        raise UsageError(f"{path} holds no prompt; write one per line")
    return lines


def read_seeds(text: str) -> list[int]:
    """`1,2,5-8` as [1, 2, 5, 6, 7, 8]."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,20})(?:-(\d{1,20}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 <= last - first < MOST_SEEDS:
            raise UsageError(f"--seeds {text}: {part.strip()!r} is no seed and no range; write them like 1,2,5-8")
        seeds += range(first, last + 1)
    return seeds


def text_input(prompt: Prompt, wanted: str | None = None) -> str:
    """The `node.input` that a line's text goes to.

    wanted: `NODE.INPUT`, or `NODE` for its prompt (`text` if the node is not known); without it, the one prompt node
    that is linked to a `positive` input.
    """
    if wanted is not None:
        node, name = find_input(prompt, wanted)
        return f"{node}.{name or PROMPT_INPUTS.get(prompt[node]['class_type'], 'text')}"
    links = [mapping(node.get("inputs")).get("positive") for node in prompt.values()]
    feeding = dict.fromkeys(str(link[0]) for link in links if isinstance(link, list) and link)
    candidates = [node for node in feeding if node in prompt and prompt[node]["class_type"] in PROMPT_INPUTS]
    if len(candidates) == 1:
        return f"{candidates[0]}.{PROMPT_INPUTS[prompt[candidates[0]]['class_type']]}"
    found = ", ".join(f"{one} ({title_of(prompt, one)})" for one in candidates) or f"no {' or '.join(PROMPT_INPUTS)}"
    raise UsageError(
        f"the prompt node is not clear: positive inputs are linked to {found}; say with --prompt-node NODE or "
        f"NODE.INPUT where the text goes; the workflow has {list_nodes(prompt)}"
    )


def make_jobs(
    prompt: Prompt,
    object_info: Mapping[str, Any],
    *,
    overrides: Sequence[Override] = (),
    lines: Sequence[Line] = ({"name": "prompt"},),
    seeds: Sequence[int] | None = None,
    prompt_node: str | None = None,
) -> list[Job]:
    """One job per line and seed, in that order. Raises UsageError for names, nodes and inputs that do not fit.

    overrides: for all jobs; a line's own values come after them.
    """
    base = apply_overrides(prompt, object_info, overrides)
    target = text_input(base, prompt_node) if any("text" in line for line in lines) else None
    jobs = []
    for number, line in enumerate(lines, 1):
        name = line.get("name") or f"{number:04d}"
        if seeds is not None and "seed" in line:
            raise UsageError(f"{name} has a seed of its own; leave out --seeds")
        for seed in (line.get("seed"),) if seeds is None else seeds:
            own = [Override(key, value) for key, value in line.get("set", {}).items()]
            if target is not None and "text" in line:
                own.append(Override(target, line["text"]))
            if seed is not None:
                own += [Override(key, seed) for key in _seed_inputs(base)]
            full_name = name if seeds is None else f"{name}-seed{seed}"
            jobs.append(Job(full_name, apply_overrides(base, object_info, own) if own else base))
    check_names(jobs)
    return jobs


def check_names(jobs: Sequence[Named]) -> None:
    """Raise UsageError unless the names can be those of files and folders: plain, and different on all systems."""
    seen = set()
    for job in jobs:
        if not NAME.fullmatch(job.name) or DEVICES.fullmatch(job.name):
            raise UsageError(f"{job.name!r} cannot be a folder's name; use letters, digits, spaces and . ( ) + - _")
        if job.name.casefold() in seen:
            raise UsageError(f"two prompts are called {job.name!r}; give every prompt and seed its own name")
        seen.add(job.name.casefold())


def _seed_inputs(prompt: Prompt) -> list[str]:
    """Every seed that is a number in the node itself."""
    found = [
        f"{node}.{name}"
        for node, entry in prompt.items()
        for name, value in mapping(entry.get("inputs")).items()
        if name.split(".")[-1] in SEED_NAMES and isinstance(value, int)
    ]
    if not found:
        raise UsageError(f"no node holds a seed; set the input that does; the workflow has {list_nodes(prompt)}")
    return found


def _checked(fields: Any) -> Line:
    kinds: dict[str, type] = {"text": str, "name": str, "seed": int, "set": dict}
    if not isinstance(fields, dict) or not fields:
        raise ValueError(f"not an object with any of {', '.join(kinds)}")
    for key, value in fields.items():
        if type(value) is not kinds.get(key):
            raise ValueError(
                f"{key!r:.80} may not be {value!r:.80}; use text or name (a text), seed (a number), set (an object)"
            )
    return fields

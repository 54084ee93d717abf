"""An API-form prompt: reading it, finding a node by id or title, and setting inputs with `node.input=value`.

The API form maps each node id to `{class_type, inputs: {name: value or [node id, output slot]}}`. The inputs of a
dynamic combo have dotted names (`preset`, `preset.target`); another key replaces everything below it by that key's
defaults, so one override is enough.
"""

import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...lightforcing_core.files.json import listing, mapping, read_json, read_text

Prompt = Mapping[str, Mapping[str, Any]]

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}  # as typed; a server takes any text for true


class UsageError(ValueError):
    """An invalid request; nothing has been sent to a server."""


class Override(NamedTuple):
    """`node.input` and its new value; typed: a text to read as the input's type."""

    target: str
    value: Any
    typed: bool = False


class Spec(NamedTuple):
    """An input as `/object_info` declares it: its type, or its choices, and its options."""

    kind: Any
    options: Mapping[str, Any]

    @property
    def choices(self) -> list[Any]:
        return listing(self.kind) or listing(self.options.get("options"))

    @property
    def branches(self) -> dict[str, Any]:
        """The keys of a dynamic combo, each with the inputs that it brings."""
        found = map(mapping, self.choices if self.kind == DYNAMIC_COMBO else ())
        return {str(choice.get("key")): choice.get("inputs") for choice in found}

    @property
    def default(self) -> Any:
        """The declared default, else the first choice, else None."""
        return self.options.get("default", next(iter(self.branches or self.choices), None))

    def read(self, typed: str) -> Any:
        """A typed value: a text or a choice as it is (a text may be in JSON's quotes), else JSON if it is JSON."""
        try:
            value = read_json(typed)
        except ValueError:
            value = typed
        if self.kind == "STRING":
            return value if isinstance(value, str) else typed
        if typed in (*self.choices, *self.branches):
            return typed
        return BOOLEANS.get(typed.strip().lower(), typed) if self.kind == "BOOLEAN" else value


def read_workflow(path: Path) -> Prompt:
    """The API-form prompt in a file; a `{"prompt": …}` envelope around it is opened.

    Raises UsageError for any other file, with the way to export this form if the file is a saved canvas.
    """
    try:
        document = read_json(read_text(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}); export the workflow again") from error
    if listing(mapping(document).get("nodes")):
        raise UsageError(
            f"{path} is a saved canvas (UI form), but a server runs the API form; open it in ComfyUI, choose File → "
            f"Export Workflow (API), and queue that file (comfy-cli's `comfy run` converts the UI form by itself)"
        )
    prompt = mapping(mapping(document).get("prompt")) or mapping(document)
    if not prompt or not all(isinstance(mapping(node).get("class_type"), str) for node in prompt.values()):
        raise UsageError(f"{path} is no ComfyUI workflow; export it again with File → Export Workflow (API)")
    return prompt


def title_of(prompt: Prompt, node: str) -> str:
    """A node's title for the user: its own, else its class, else its id."""
    entry = mapping(prompt.get(node))
    return str(mapping(entry.get("_meta")).get("title") or entry.get("class_type") or f"node {node}")


def printable(text: str) -> str:
    """Text without characters that steer a terminal, or that no file and no terminal can hold."""
    return _UNPRINTABLE.sub("?", text)


def list_nodes(prompt: Prompt) -> str:
    """The nodes as `id "title"`, for an error message."""
    shown = [f"{one} {json.dumps(title_of(prompt, one), ensure_ascii=False)}"[:100] for one in islice(prompt, 30)]
    return ", ".join(shown) + (f" and {len(prompt) - 30} more" if len(prompt) > 30 else "")


def find_input(prompt: Prompt, target: str) -> tuple[str, str | None]:
    """`node.input` as the node's id and the input, `node` alone as (id, None); node is an id or a title.

    Titles and inputs may both contain dots; the longest match counts. Raises UsageError for no match, or for several.
    """
    names = [(name, node) for node in prompt for name in (node, title_of(prompt, node))]
    fitting = [(name, node) for name, node in names if f"{target}.".startswith(f"{name}.")]
    if not fitting:
        raise UsageError(f"no node is called {target.partition('.')[0]!r}; the workflow has {list_nodes(prompt)}")
    longest = max((name for name, _ in fitting), key=len)
    found = [longest] if longest in prompt else [node for name, node in fitting if name == longest]
    if len(found) > 1:
        raise UsageError(f"{len(found)} nodes are called {longest!r}; use an id: {', '.join(found)}")
    return found[0], target[len(longest) + 1 :] or None


def read_override(text: str) -> Override:
    target, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: no '=' in it; write NODE.INPUT=VALUE, for example 4.seed=7")
    return Override(target.strip(), value, typed=True)


def apply_overrides(
    prompt: Prompt, object_info: Mapping[str, Any], overrides: Iterable[Override]
) -> dict[str, dict[str, Any]]:
    """A copy of `prompt` with the inputs set; for the same input the last one counts. A wired input loses its wire.

    object_info: the server's, for inputs that the workflow leaves out and for what a dynamic combo's key brings.
    Raises UsageError naming the inputs that exist.
    """
    changed = {key: {**node, "inputs": dict(mapping(node.get("inputs")))} for key, node in prompt.items()}
    # A dynamic combo's own key first: it decides which names exist below it.
    found = [(*find_input(prompt, target), target, value, typed) for target, value, typed in overrides]
    for node, name, target, value, typed in sorted(found, key=lambda one: str(one[1]).count(".")):
        if name is None:
            raise UsageError(f"{target!r} names a node but no input; write {target}.INPUT")
        inputs, title = changed[node]["inputs"], title_of(prompt, node)
        declared = _declared(object_info, changed[node])
        known = sorted({*declared, *inputs})
        if name not in known:
            raise UsageError(f"{title} (node {node}) has no input {name!r}; it has {', '.join(known) or 'none'}")
        spec = declared.get(name, Spec(None, {}))
        if typed:
            value = spec.read(value)
        if spec.kind == "BOOLEAN" and isinstance(value, str):
            raise UsageError(f"{title}: {name}: {value!r} is neither true nor false")
        if spec.kind != DYNAMIC_COMBO:
            inputs[name] = _literal(value)
        elif value not in list(spec.branches):
            raise UsageError(f"{title}: {name}: {value!r} is not a choice; use one of {', '.join(spec.branches)}")
        elif value != inputs.get(name):
            for old in [key for key in inputs if key.startswith(f"{name}.")]:
                del inputs[old]
            inputs[name] = value
            for key, below in _declared(object_info, changed[node]).items():
                if key.startswith(f"{name}.") and below.default is not None:
                    inputs[key] = _literal(below.default)
    return changed


def _literal(value: Any) -> Any:
    """A list as a literal value; a server would read a bare list of two as a wire."""
    return {"__value__": value} if isinstance(value, list) else value


def _fields(inputs: Any, prefix: str = "") -> dict[str, Spec]:
    """The inputs in `{"required": {name: [type, options]}, "optional": {…}}`."""
    rows = [row for group in ("required", "optional") for row in mapping(mapping(inputs).get(group)).items()]
    return {
        prefix + name: Spec(spec[0], mapping(spec[1] if len(spec) > 1 else None))
        for name, spec in rows
        if isinstance(spec, list) and spec
    }


def _declared(object_info: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Spec]:
    """A node's inputs by dotted name, with those below the chosen keys of its dynamic combos."""
    found: dict[str, Spec] = {}
    new = _fields(mapping(object_info.get(node["class_type"])).get("input"))
    while new:
        found |= new
        chosen = {name: spec.branches.get(str(node["inputs"].get(name))) for name, spec in new.items()}
        new = {name: spec for combo, inputs in chosen.items() for name, spec in _fields(inputs, f"{combo}.").items()}
    return found

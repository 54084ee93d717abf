"""`node.input=value`: finding the node by id or title, checking that the input exists, and setting it.

The API form names the inputs of a dynamic combo with dots (`preset`, `preset.target`); choosing another key replaces
everything below it by that key's defaults, so that one override is enough.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .comfy_server import Prompt, title_of
from .workflow_form import DYNAMIC_COMBO, WorkflowError, chosen_inputs


class UsageError(ValueError):
    """What was asked for does not fit together; nothing has been sent to a server."""


class Override(NamedTuple):
    """One input of one node, by the node's id, and its new value."""

    node: str
    input: str
    value: Any


def read_override(prompt: Prompt, object_info: Mapping[str, Any], text: str) -> Override:
    """`node.input=value` as an Override, the value read as what the input takes.

    Texts and choices stay as typed (a text may stand in JSON's quotes); anything else is JSON where it can be.
    """
    target, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: no '=' in it; write NODE.INPUT=VALUE, for example 4.seed=7")
    found = override(prompt, target.strip(), json_or_text(value))
    definition = object_info.get(prompt[found.node]["class_type"]) or {}
    spec = _spec_of(definition.get("input") or {}, found.input)
    return found if spec is None else found._replace(value=_as_declared(text, spec, value, found.value))


def override(prompt: Prompt, target: str, value: Any) -> Override:
    """The Override for `node.input`; node is an id or a title. Raises UsageError for a node that does not exist."""
    name, name_of_input = split_target(prompt, target)
    if name_of_input is None:
        raise UsageError(f"{target!r} names a node but no input; write {target}.INPUT")
    return Override(node_id(prompt, name), name_of_input, value)


def split_target(prompt: Prompt, target: str) -> tuple[str, str | None]:
    """`node.input` as its two parts, `node` alone as (node, None); titles and inputs may both have dots in them."""
    names = set(prompt) | {title_of(prompt, one) for one in prompt}
    if target in names:
        return target, None
    dots = [place for place, letter in enumerate(target) if letter == "."]
    for place in reversed(dots):
        if target[:place] in names and target[place + 1 :]:
            return target[:place], target[place + 1 :]
    raise UsageError(f"no node is called {target.partition('.')[0]!r}; the workflow has {list_nodes(prompt)}")


def node_id(prompt: Prompt, name: str) -> str:
    """The id of the node with this id or title."""
    if name in prompt:
        return name
    found = [one for one in prompt if title_of(prompt, one) == name]
    if not found:
        raise UsageError(f"no node is called {name!r}; the workflow has {list_nodes(prompt)}")
    if len(found) > 1:
        raise UsageError(f"{len(found)} nodes are called {name!r}; use an id: {', '.join(found)}")
    return found[0]


def apply_overrides(
    prompt: Prompt, object_info: Mapping[str, Any], overrides: Iterable[Override]
) -> dict[str, dict[str, Any]]:
    """A copy of `prompt` with the inputs set; for the same input the last one counts. A wired input loses its wire.

    object_info: the server's, to know inputs that the workflow leaves out and what a dynamic combo's keys bring.
    Raises UsageError naming the inputs that exist.
    """
    changed = {key: {**node, "inputs": dict(node.get("inputs") or {})} for key, node in prompt.items()}
    # A dynamic combo's own key first: it decides which names exist below it.
    for node, name, value in sorted(overrides, key=lambda one: one.input.count(".")):
        inputs, title = changed[node]["inputs"], title_of(prompt, node)
        definition = object_info.get(changed[node]["class_type"]) or {}
        declared = _declared(definition.get("input") or {}, inputs)
        known = sorted({*declared, *inputs})
        if name not in known:
            raise UsageError(f"{title} (node {node}) has no input {name!r}; it has {', '.join(known) or 'none'}")
        spec = declared.get(name)
        if spec is not None and spec[0] == DYNAMIC_COMBO:
            try:
                below = chosen_inputs(title, name, spec, value)
            except WorkflowError as error:
                raise UsageError(str(error)) from error
            if value != inputs.get(name):
                for old in [key for key in inputs if key.startswith(f"{name}.")]:
                    del inputs[old]
                inputs.update(below)
        else:
            inputs[name] = {"__value__": value} if isinstance(value, list) else value  # a bare list would be a wire
    return changed


def list_nodes(prompt: Prompt) -> str:
    """Every node as `id "title"`, for an error message."""
    return ", ".join(f"{one} {json.dumps(title_of(prompt, one), ensure_ascii=False)}" for one in prompt)


def json_or_text(text: str) -> Any:
    """The text's JSON value; the text itself where it is none."""
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text


def _as_declared(text: str, spec: Sequence[Any], typed: str, read: Any) -> Any:
    """`typed`, which is `read` as JSON, as an input of this [type, options] wants it."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if kind == "STRING":
        return read if isinstance(read, str) else typed
    if isinstance(kind, list) or kind == "COMBO":
        return typed if typed in (kind if isinstance(kind, list) else options.get("options") or []) else read
    if kind == "BOOLEAN" and not isinstance(read, bool):  # a server takes any text for true
        words = {"true": True, "1": True, "false": False, "0": False}
        if typed.strip().lower() not in words:
            raise UsageError(f"--set {text}: {typed!r} is neither true nor false")
        return words[typed.strip().lower()]
    return read


def _spec_of(fields: Mapping[str, Any], name: str) -> Sequence[Any] | None:
    """The [type, options] of an input by its dotted name, below whichever key of a dynamic combo; None without any."""
    declared = {**(fields.get("required") or {}), **(fields.get("optional") or {})}
    if name in declared:
        return declared[name]
    combo, _, below = name.partition(".")
    if not below or declared.get(combo, [None])[0] != DYNAMIC_COMBO:
        return None
    choices = (declared[combo][1] if len(declared[combo]) > 1 else {}).get("options") or []
    return next((spec for choice in choices if (spec := _spec_of(choice["inputs"], below)) is not None), None)


def _declared(fields: Mapping[str, Any], inputs: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Every input's [type, options] by its dotted name, for the dynamic combos as `inputs` has them chosen."""
    found: dict[str, list[Any]] = {}
    for group in ("required", "optional"):
        for short, spec in (fields.get(group) or {}).items():
            name = prefix + short
            found[name] = spec
            if spec[0] == DYNAMIC_COMBO:
                choices = (spec[1] if len(spec) > 1 else {}).get("options") or []
                chosen = next((choice for choice in choices if choice["key"] == inputs.get(name)), None)
                if chosen is not None:
                    found.update(_declared(chosen["inputs"], inputs, prefix=f"{name}."))
    return found

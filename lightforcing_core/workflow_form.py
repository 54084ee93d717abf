"""ComfyUI's two workflow forms: telling them apart, and turning a saved canvas (UI form) into what a server runs.

The UI form stores widget values by position and links by number; the API form maps each node id to
`{class_type, inputs: {name: value or [node id, output slot]}}`. What the positions mean comes from the server's
`/object_info`. Left to the canvas: subgraphs (refused by name) and `{a|b}` prompt wildcards (sent as written).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "CURVE", "BOUNDING_BOX", "RANGE", DYNAMIC_COMBO)
SEED_NAMES = ("seed", "noise_seed")
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
UPLOADS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload")


class WorkflowError(ValueError):
    """A workflow file that cannot be run as it is; the message says which node and what to do."""


class Link(NamedTuple):
    """One wire of the canvas: it starts at output `slot` of node `origin`."""

    origin: str
    slot: int
    type: str


@dataclass(frozen=True)
class Canvas:
    """Nodes and links of a UI-form document, by id."""

    nodes: dict[str, dict[str, Any]]
    links: dict[int, Link]

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> "Canvas":
        """From a parsed UI-form document; links may be rows of six or mappings."""
        links = {}
        for row in document.get("links") or []:
            if isinstance(row, dict):
                row = [row["id"], row["origin_id"], row["origin_slot"], None, None, row.get("type", "*")]
            links[row[0]] = Link(str(row[1]), int(row[2]), str(row[5]))
        return cls({str(node["id"]): node for node in document["nodes"]}, links)

    def source(self, link_id: int | None, wanted: str) -> "list[Any] | Constant | None":
        """What really feeds a link: `[node id, slot]`, a primitive's value, or None where the wire leads nowhere.

        Reroutes are followed, bypassed nodes passed through by type `wanted`, muted nodes cut the wire.
        """
        seen: set[int] = set()
        while link_id is not None and link_id in self.links and link_id not in seen:
            seen.add(link_id)
            link = self.links[link_id]
            node = self.nodes.get(link.origin)
            if node is None or node.get("mode") == MUTED:
                return None
            inputs = node.get("inputs") or []
            if node.get("mode") == BYPASSED:
                slot = _bypass_slot(node, link.slot, wanted)
            elif node["type"] == "Reroute":
                slot = 0 if inputs else None
            elif node["type"] == "PrimitiveNode":
                values = node.get("widgets_values") or [None]
                return Constant(values[0])
            else:
                return [link.origin, link.slot]
            link_id = None if slot is None else inputs[slot].get("link")
        return None


class Constant(NamedTuple):
    """The value of a PrimitiveNode, which exists on the canvas only."""

    value: Any


def read_workflow(path: str | Path) -> tuple[dict[str, Any], bool]:
    """A workflow file's content, and whether it is a canvas (UI form) that `ui_to_api` must convert first.

    A `{"prompt": …}` envelope around the API form is opened. Raises WorkflowError for anything else.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WorkflowError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise WorkflowError(f"{path} is not JSON ({error}); save the workflow again") from error
    if is_ui_form(document):
        return document, True
    if isinstance(document, dict) and is_api_form(document.get("prompt")):
        document = document["prompt"]
    if is_api_form(document):
        return document, False
    raise WorkflowError(f"{path} is neither a ComfyUI workflow nor its API form; save it from ComfyUI again")


def is_api_form(document: Any) -> bool:
    """Whether a parsed JSON document is an API-form prompt: node id → {class_type, inputs}."""
    return (
        isinstance(document, dict)
        and bool(document)
        and all(isinstance(node, dict) and "class_type" in node for node in document.values())
    )


def is_ui_form(document: Any) -> bool:
    """Whether a parsed JSON document is a saved canvas."""
    return isinstance(document, dict) and isinstance(document.get("nodes"), list)


def ui_to_api(document: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The API form of a saved canvas, as the canvas itself would send it.

    document: parsed UI-form JSON. object_info: the server's `/object_info`. Muted and bypassed nodes, notes,
    reroutes and primitives do not appear in the result. Raises WorkflowError for node types that the server lacks,
    subgraphs, and a graph in which nothing is left to run.
    """
    canvas = Canvas.read(document)
    subgraphs = {graph.get("id") for graph in (document.get("definitions") or {}).get("subgraphs") or []}
    prompt: dict[str, dict[str, Any]] = {}
    missing = []
    for node_id, node in canvas.nodes.items():
        kind = node["type"]
        if node.get("mode") in (MUTED, BYPASSED) or kind in (*NOTES, "Reroute", "PrimitiveNode"):
            continue
        if kind in subgraphs:
            raise WorkflowError(
                f"{node_title(node)}: subgraphs exist on the canvas only; unpack it there, "
                f"or queue the file that File → Export (API) writes"
            )
        if kind not in object_info:
            if _is_wired(node):
                missing.append(f"{node_title(node)} (type {kind})")
            continue
        definition = object_info[kind]
        prompt[node_id] = {
            "class_type": kind,
            "inputs": _inputs(canvas, node, definition),
            "_meta": {"title": node.get("title") or definition.get("display_name") or kind},
        }
    if missing:
        raise WorkflowError(f"the server has no node for {', '.join(missing)}; install the pack that brings it")
    if not prompt:
        raise WorkflowError("nothing to run: every node of this workflow is muted, bypassed or a note")
    return prompt


def chosen_inputs(title: str, name: str, spec: list[Any], key: Any) -> dict[str, Any]:
    """What a dynamic combo `name` and the widgets below it hold once `key` is chosen: their defaults, dotted names.

    spec: the combo's [type, options] in `/object_info`. Raises WorkflowError naming node `title` for an unknown key.
    """
    reader = _WidgetReader({"type": title, "widgets_values": {name: key}}, set())
    reader.read({"required": {name: spec}})
    return {found: _plain(value) for found, value in reader.found.items()}


def canvas_with(
    document: Mapping[str, Any], object_info: Mapping[str, Any], values: Mapping[tuple[str, str], Any]
) -> dict[str, Any] | None:
    """The canvas with widget values replaced, as if they had been typed there; `document` stays as it is.

    values: by (node id, input name). None where the canvas cannot show one of them: the input is wired, or choosing
    it would change which widgets the node has.
    """
    changed: dict[str, dict[str, Any]] = {}
    for (node_id, name), value in values.items():
        node = changed.get(node_id) or next((one for one in document["nodes"] if str(one["id"]) == node_id), None)
        if node is None or node["type"] not in object_info:
            return None
        slots = node.get("inputs") or []
        reader = _WidgetReader(node, {slot["name"] for slot in slots if slot.get("widget")})
        reader.read(object_info[node["type"]].get("input") or {})
        wired = any(slot["name"] == name and slot.get("link") is not None for slot in slots)
        if wired or name not in reader.places or any(found.startswith(f"{name}.") for found in reader.found):
            return None
        saved = node["widgets_values"]
        copied: Any = dict(saved) if isinstance(saved, dict) else list(saved)
        copied[reader.places[name]] = value
        changed[node_id] = {**node, "widgets_values": copied}
    return {**document, "nodes": [changed.get(str(node["id"]), node) for node in document["nodes"]]}


def node_title(node: Mapping[str, Any]) -> str:
    """How a canvas node is named to the user: its title, else its type."""
    return str(node.get("title") or node["type"])


def _inputs(canvas: Canvas, node: Mapping[str, Any], definition: Mapping[str, Any]) -> dict[str, Any]:
    """Widget values by name, then every wired input over them."""
    slots = node.get("inputs") or []
    widgets = _WidgetReader(node, {slot["name"] for slot in slots if slot.get("widget")})
    widgets.read(definition.get("input") or {})
    inputs = {name: _plain(value) for name, value in widgets.found.items()}
    for slot in slots:
        source = canvas.source(slot.get("link"), str(slot.get("type", "*")))
        if isinstance(source, Constant):
            inputs[slot["name"]] = _plain(source.value)
        elif source is not None:
            inputs[slot["name"]] = source
    return inputs


class _WidgetReader:
    """Walks a node's declared inputs and takes one saved value for each that is a widget."""

    def __init__(self, node: Mapping[str, Any], shown: set[str]) -> None:
        saved = node.get("widgets_values")
        self.title = node_title(node)
        self.shown = shown
        self.by_name: dict[str, Any] = saved if isinstance(saved, dict) else {}
        self.rest: list[Any] = list(saved) if isinstance(saved, list) else []
        self.saved = len(self.rest)
        self.found: dict[str, Any] = {}
        self.places: dict[str, int | str] = {}  # where in widgets_values each value was found

    def read(self, fields: Mapping[str, Any], prefix: str = "") -> None:
        """Fill `found` from `fields` = {"required": {name: [type, options]}, "optional": {…}}."""
        for group in ("required", "optional"):
            declared = fields.get(group) or {}
            for name, spec in declared.items():
                options = spec[1] if len(spec) > 1 else {}
                self._read_one(prefix + name, spec[0], options)
            if group == "required" and any(_uploads(spec) for spec in declared.values()):
                self._skip((None, "image", "video", "audio"))

    def _read_one(self, name: str, kind: Any, options: Mapping[str, Any]) -> None:
        is_list = isinstance(kind, list)
        kind = options.get("widgetType", kind)
        if options.get("forceInput") or not (is_list or kind in WIDGET_TYPES or name in self.shown):
            return
        choices = kind if is_list else options.get("options") or []
        if kind == DYNAMIC_COMBO:
            key = self._take(name, choices[0]["key"] if choices else None)
            chosen = next((choice for choice in choices if choice["key"] == key), None)
            if chosen is None:
                known = ", ".join(str(choice["key"]) for choice in choices)
                raise WorkflowError(f"{self.title}: {name}: {key!r} is not a choice; use one of {known}")
            self.found[name] = key
            self.read(chosen["inputs"], prefix=f"{name}.")
            return
        fallback = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(str(kind))
        value = self._take(name, options.get("default", choices[0] if choices else fallback))
        if value is not None:
            self.found[name] = value
        seed_like = kind == "INT" and name.split(".")[-1] in SEED_NAMES
        if options.get("control_after_generate", seed_like):
            self._skip(AFTER_GENERATE)
            if is_list or kind == "COMBO":
                self._skip(("",))

    def _take(self, name: str, default: Any) -> Any:
        """The next saved value, or the default where the file is older than the widget."""
        if self.rest:
            self.places[name] = self.saved - len(self.rest)
            return self.rest.pop(0)
        if name in self.by_name:
            self.places[name] = name
        return self.by_name.get(name, default)

    def _skip(self, values: tuple[Any, ...]) -> None:
        """Drop the value of a canvas-only widget, where the file has one."""
        if self.rest and not isinstance(self.rest[0], list | dict) and self.rest[0] in values:
            self.rest.pop(0)


def _uploads(spec: list[Any]) -> bool:
    """Whether the canvas adds an upload button behind this input."""
    chooses = isinstance(spec[0], list) or spec[0] == "COMBO"
    return chooses and len(spec) > 1 and any(spec[1].get(key) for key in UPLOADS)


def _plain(value: Any) -> Any:
    """A list as a literal value: bare lists of two would be read as links."""
    return {"__value__": value} if isinstance(value, list) else value


def _is_wired(node: Mapping[str, Any]) -> bool:
    """Whether any wire touches the node; one that none touches is decoration."""
    return any(slot.get("link") is not None for slot in node.get("inputs") or []) or any(
        slot.get("links") for slot in node.get("outputs") or []
    )


def _compatible(one: str, other: str) -> bool:
    """Whether a wire may join two slot types; a type may list several, separated by commas."""
    ones, others = ({part.strip().lower() for part in name.split(",")} for name in (one, other))
    return bool(ones & others) or "*" in ones | others


def _bypass_slot(node: Mapping[str, Any], output: int, wanted: str) -> int | None:
    """The input that stands in for `output` of a bypassed node: the same place, else the first of that type."""
    types = [str(slot.get("type", "*")) for slot in node.get("inputs") or []]
    if not types:
        return None
    if wanted == "*":
        return output if output < len(types) else 0
    offered = str(node["outputs"][output].get("type", "*"))
    fits = [_compatible(kind, offered) and _compatible(kind, wanted) for kind in types]
    if output < len(types) and fits[output]:
        return output
    if wanted in types:
        return types.index(wanted)
    return fits.index(True) if any(fits) else None

"""Every name of ComfyUI that the nodes use is there and takes the arguments that they pass; lists those that do not."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import comfyui
from server import PromptServer

ROOTS = {"comfy", "comfy_aimdo", "comfy_api", "comfy_execution", "comfy_kitchen"}
ROOTS |= {"folder_paths", "latent_preview", "server"}
UNTYPED = {"server": PromptServer}  # variables that always hold an object of this class


class Source:
    """The names of ComfyUI in one file. problems: one line for each that is missing or takes other arguments."""

    def __init__(self, name, text):
        self.name, self.count, self.problems, self.known = name, 0, [], {}
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._import(node, alias.name)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                module = self._import(node, node.module)
                for alias in node.names if module else ():
                    self._keep(node, module, alias.name, alias.asname or alias.name)
        self._check(tree, {})

    def _import(self, node, name):
        if name.partition(".")[0] not in ROOTS:
            return None
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            return self._note(node, f"import {name}", error)
        self.known.setdefault(name.partition(".")[0], sys.modules[name.partition(".")[0]])
        return module

    def _keep(self, node, module, name, as_name):
        try:
            self.known[as_name] = getattr(module, name)
        except AttributeError as error:
            self._note(node, f"from {module.__name__} import {name}", error)

    def _note(self, node, what, error):
        self.problems.append(f"{self.name}:{node.lineno}: {what}: {error}")

    def _find(self, node):
        """The object that a dotted name means; None for others, and for what is missing."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        owner = self._find(node.value) if isinstance(node, ast.Attribute) else None
        return None if owner is None else getattr(owner, node.attr, None)

    def _check_function(self, node, objects):
        kinds = {one.arg: self._find(one.annotation) for one in node.args.args if one.annotation}
        own = {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
        kinds |= {name: UNTYPED[name] for name in own & UNTYPED.keys()}
        assigned = [one for one in ast.walk(node) if isinstance(one, ast.Assign)]
        modules = {one.targets[0].id: found for one in assigned if inspect.ismodule(found := self._find(one.value))}
        outer, own = self.known, own | {one.arg for one in node.args.args}
        self.known = {name: known for name, known in outer.items() if name not in own} | modules
        for child in ast.iter_child_nodes(node):
            self._check(child, objects | {name: kind for name, kind in kinds.items() if inspect.isclass(kind)})
        self.known = outer

    def _check(self, node, objects):
        """Check a node and all inside it. objects: variables and the class of ComfyUI that they have an object of."""
        if isinstance(node, ast.FunctionDef):
            self._check_function(node, objects)
            return
        if isinstance(node, ast.Attribute):
            self._check_attribute(node, objects)
        if isinstance(node, ast.Call):
            self._check_call(node, objects)
        for child in ast.iter_child_nodes(node):
            self._check(child, objects)

    def _check_attribute(self, node, objects):
        owner, kind = self._find(node.value), objects.get(getattr(node.value, "id", None))
        self.count += owner is not None or kind is not None
        if owner is not None and not hasattr(owner, node.attr):
            self._note(node, ast.unparse(node), "no such name")
        elif kind is not None and not hasattr(kind, node.attr):
            set_by = [one.__init__.__code__ for one in kind.__mro__ if hasattr(one.__init__, "__code__")]
            if not any(node.attr in code.co_names for code in set_by):
                self._note(node, f"{kind.__name__}.{node.attr}", "no such name")

    def _check_call(self, node, objects):
        function, given = self._find(node.func), [None for _ in node.args]
        if kind := objects.get(getattr(getattr(node.func, "value", None), "id", None)):
            function, given = getattr(kind, node.func.attr, None), [None, *given]
        named = {one.arg: None for one in node.keywords}
        if function is None or None in named or any(isinstance(one, ast.Starred) for one in node.args):
            return
        try:
            signature = inspect.signature(function)
        except ValueError:  # a built-in without one
            return
        try:
            signature.bind(*given, **named)
        except TypeError as error:
            self._note(node, f"{ast.unparse(node.func)}{signature}", error)


renamed = Source(
    "renamed",
    "import comfy.utils\nfrom comfy.samplers import Sampled, Sampler\nfrom comfy.model_patcher import ModelPatcher\n"
    "comfy.utils.load_torch_file('x', pickled=True)\ndef of(model: ModelPatcher):\n    tools = comfy.utils\n"
    "    tools.load_torch_tile('x')\n    model.load_device\n    model.unloaded\n    model.is_dynamic(1, 2, 3)",
)
assert [one.split(":")[1] for one in renamed.problems] == ["2", "4", "7", "9", "10"], renamed.problems
files = sorted(Path(comfyui.PACK, "nodes").rglob("*.py"))
sources = [Source(path.relative_to(comfyui.PACK), path.read_text(encoding="utf-8")) for path in files]
assert sum(source.count for source in sources) > 200
missing = [problem for source in sources for problem in source.problems]
if missing:
    sys.exit("\n".join(["This ComfyUI lacks names that the pack uses, or they take other arguments:", *missing]))

"""Load the pack in a process that is ComfyUI already: it imports nothing heavy, warns of nothing and has its nodes."""

import sys

sys.path.insert(0, sys.argv[1])

import comfy.cli_args

comfy.cli_args.args.cpu = True

import asyncio  # noqa: E402
import importlib.abc  # noqa: E402
import logging  # noqa: E402
import warnings  # noqa: E402

import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy_api.latest  # noqa: E402, F401
import folder_paths  # noqa: E402, F401

import nodes  # noqa: E402, F401

# PyAV is not among them: comfy_api imports it at every start.
HEAVY = ("matplotlib", "imageio", "typer", "rich", "scipy", "pandas", "triton", "torchvision", "httpx", "websockets")
asked, said = set(), []


class Watch(importlib.abc.MetaPathFinder):
    """Notes which heavy packages are asked for, and says that they are not there."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            asked.add(name.partition(".")[0])
            raise ModuleNotFoundError(name)


class Listen(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


for name in [name for name in sys.modules if name.partition(".")[0] in HEAVY]:
    del sys.modules[name]  # ComfyUI may have loaded some of them for itself: a request has to reach the watch again
sys.meta_path.insert(0, Watch())
logging.getLogger().addHandler(Listen(logging.WARNING))
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_: said.append(str(message))

import comfyui  # noqa: E402

extension = asyncio.run(comfyui.pack.comfy_entrypoint())
names = [node.GET_NODE_INFO_V1()["name"] for node in asyncio.run(extension.get_node_list())]
assert (asked, said) == (set(), [])
assert sorted(comfyui.pack.__all__) == ["WEB_DIRECTORY", "comfy_entrypoint"]
assert not hasattr(comfyui.pack, "NODE_CLASS_MAPPINGS")  # ComfyUI would take it and never look at the entry point
assert len(names) == len(set(names)) >= 8
assert all(name.startswith("LightForcing") for name in names)

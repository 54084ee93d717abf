"""Import the pack in ComfyUI without triton, warnings being errors once ComfyUI is up; its nodes as JSON."""

import sys
import warnings

sys.modules["triton"] = None  # any import of it now fails as if it were not installed
sys.path.insert(0, sys.argv[1])

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.sd  # noqa: E402
import comfy_api.latest  # noqa: E402, F401

warnings.simplefilter("error")

import asyncio  # noqa: E402
import json  # noqa: E402

import comfyui  # noqa: E402

extension = asyncio.run(comfyui.pack.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
facts = {
    "nodes": [node.GET_SCHEMA().node_id for node in nodes],
    "exported": sorted(comfyui.pack.__all__),
    "has node mappings": hasattr(comfyui.pack, "NODE_CLASS_MAPPINGS"),
}
print(json.dumps(facts))

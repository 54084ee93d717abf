"""The texts of both sampling nodes on a device without a sparse backend; printed as JSON."""

import json

import card_runs as runs
import torch
from card_runs import comfyui, management

live_view, select, sampler_node = comfyui.modules("nodes", "sampling.live_view", "sampling.select", "sampling.sampler")
lines = []
for module in (live_view, sampler_node):
    module.show_text = lines.append
live_view.LINE_PAUSE = 0.0


def texts_of(backend, *, fails_at=None, node=runs.node):
    """Lines on the node while it runs, and the text of its result."""
    lines.clear()
    runs.OPTIONS["backend"] = backend
    model = runs.file()
    if fails_at:

        def fail():
            raise torch.OutOfMemoryError("CUDA out of memory")

        model = runs.meanwhile(model, fails_at, fail)
    management.unload_all_models()
    runs.plan_of.graph = False
    output = node.execute(**runs.arguments(model))
    return {"lines": list(lines), "text": (output.ui or {}).get("text")}


facts = {"auto": texts_of("auto"), "named": texts_of("reference"), "cut": texts_of("auto", fails_at=5)}

lines.clear()
runs.OPTIONS["backend"] = "auto"
sampler = select.LightForcingSamplerSelect.PREPARE_CLASS_CLONE(
    {"hidden_inputs": {comfyui.io.Hidden.unique_id: "6"}}
).execute()[0]
noise = torch.randn(1, 16, runs.FRAMES, 4, 6, generator=torch.Generator().manual_seed(1))
comfyui.sample(runs.file(), sampler, noise, positive=runs.prompt())
facts["select"] = {"lines": list(lines)}
print(json.dumps(facts))

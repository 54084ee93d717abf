"""The texts of both sampling nodes on a device without a sparse backend."""

import card_runs as runs
import torch
from card_runs import comfyui, management

observer, sampler_node = comfyui.modules("nodes.sampling", "observer", "sampler")
lines = []
observer.show_text = lambda line, notes=(), details="": lines.append("\n".join((line, *notes, details)))
observer.LINE_PAUSE = 0.0
REASON = "dense attention: the attention kernel needs an NVIDIA GPU"


def assert_said_once():
    """The lines of a run of two chunks say once why its attention is dense."""
    first, *_, last = [line.splitlines() for line in lines if line.startswith("chunk ")]
    # The first chunk sees only itself, so it is dense anyway.
    assert not any(REASON in part for part in first)
    assert last[0].startswith("chunk 2/2 · density 100 %"), last
    assert [part.startswith(REASON) for part in last] == [False, True, False, False]


def texts_of(backend, *, fails_at=None, node=runs.node):
    """The text of a result; `lines` then holds the node's texts during the run."""
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
    return (output.ui or {}).get("text")


(text,) = texts_of("auto")
assert_said_once()
assert text.startswith(REASON)
assert text in lines[-1]
why, dense = texts_of("auto", fails_at=5)
assert (why.startswith("out of memory"), dense.startswith(REASON)) == (True, True)
assert lines[-1].startswith(f"{why}\n{dense}\n")
assert texts_of("reference") is None
assert not any(REASON in line for line in lines)

lines.clear()
runs.OPTIONS["backend"] = "auto"
sampler = sampler_node.LightForcingSamplerSelect.PREPARE_CLASS_CLONE(
    {"hidden_inputs": {comfyui.io.Hidden.unique_id: "6"}}
).execute()[0]
noise = torch.randn(1, 16, runs.FRAMES, 4, 6, generator=torch.Generator().manual_seed(1))
comfyui.sample(runs.file(), sampler, noise, positive=runs.prompt())
assert_said_once()

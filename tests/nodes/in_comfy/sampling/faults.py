"""Memory that runs out and disks that fill up in the middle of a run, on the sampling node itself; printed as JSON."""

import json
from types import SimpleNamespace

import comfyui
import torch
from comfyui import comfy, failing, model_failing

state = comfyui.module("nodes.state")
decode, video_output, schedules = comfyui.modules("nodes", "vae.decode", "video_output", "schedule")
core = comfyui.module("lightforcing_core.files.video")
run_state, tensor_files = comfyui.modules("lightforcing_core", "rollout.state", "files.tensors")
memory, refusals = comfyui.module("lightforcing_core.memory.estimate"), comfyui.module("nodes.sampling.refusals")
memory_plan, kv_storage = comfyui.modules("lightforcing_core", "memory.plan", "model.kv_storage")
recipe = comfyui.module("lightforcing_core.rollout.recipe")
model, vae = comfyui.applied(comfyui.load("tiny_wan.safetensors")), comfyui.small_vae()
latent = {"samples": torch.zeros(1, 16, 9, 4, 6)}
node = comfyui.sampling_node()
OUTPUT = comfyui.module("nodes.comfy").output_folder()


def run(**inputs):
    """What a run of three chunks gives: latent and video frames and the node's words, or its error."""
    arguments = {"model": model, "positive": comfyui.prompt(), "latent": latent, "seed": 1, "steps": 2, **inputs}
    try:
        output = node.execute(**arguments)
    except Exception as error:
        return {"error": str(error), "kind": type(error).__name__, "to ComfyUI": comfy.model_management.is_oom(error)}
    frames = output[1].shape[0] if isinstance(output[1], torch.Tensor) else None
    return {"latent": output[0]["samples"].shape[2], "frames": frames, "ui": output.ui}


facts = {"whole": run(vae=vae)}
oom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
facts["step"] = run(
    model=model_failing(model, 5, oom), vae=vae
)  # two steps, the clean pass, then the second chunk's second
facts["step, not kept"] = run(model=model_failing(model, 5, oom), keep_finished=False)
facts["first step"] = run(model=model_failing(model, 1, oom))
facts["CPU memory"] = run(
    model=model_failing(model, 5, RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"))
)
facts["another error"] = run(model=model_failing(model, 5, RuntimeError("boom")))


def model_with(forward, answer):
    """The MODEL, whose forwards from number `forward` on predict `answer` everywhere."""
    clone, count = model.clone(), iter(range(1, 10000))

    def maybe(execute, x, *rest, **named):
        made = execute(x, *rest, **named)
        return made.fill_(answer) if next(count) >= forward else made

    clone.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, maybe)
    return clone


# NaN and infinity: from the model at once or from the second chunk on, and from the VAE.
video = video_output.VideoOutput("not_finite/clip", "mp4", None, 16.0, False)
saved = {"state": state.StateFile(state.state_folder() / "not_finite")}
nan = float("nan")
facts["NaN"] = run(model=model_with(1, nan), vae=vae, video_output=video, **saved)
facts["infinity without a VAE"] = run(model=model_with(1, float("inf")), **saved)
broken = comfyui.small_vae()
with torch.no_grad():
    broken.first_stage_model.decoder.head[-1].bias[0] = nan
    broken.first_stage_model.encoder.head[-1].bias[0] = nan
facts["NaN of the VAE"] = run(vae=broken, video_output=video)
facts["NaN of the encoder"] = comfyui.error_of(
    comfyui.module("nodes.vae.encode").LightForcingEncode.execute, torch.zeros(1, 32, 48, 3), broken
)
facts["NaN leaves"] = [path.name for folder in (OUTPUT, state.state_folder()) for path in folder.rglob("*finite*/*")]
facts["NaN later"] = run(model=model_with(4, nan), vae=vae)
facts["NaN later, not kept"] = run(model=model_with(4, nan), keep_finished=False)
stream = decode.StreamingDecoder.decode
for name, calls in (("decode", 2), ("first decode", 1)):
    decode.StreamingDecoder.decode = failing(stream, calls, oom)
    facts[name] = run(vae=vae)
decode.StreamingDecoder.decode = stream

# A disk that is full when the second chunk's frames, or its state, are written.
video = video_output.VideoOutput("faults/clip", "mp4", None, 16.0, False)
full = core.av.error.OSError(28, "No space left on device")
open_writer = core.VideoWriter._open


def open_on_a_small_disk(writer):
    open_writer(writer)
    writer._stream = SimpleNamespace(encode=failing(writer._stream.encode, 15, full))


core.VideoWriter._open = open_on_a_small_disk
facts["disk full, video"] = run(vae=vae, video_output=video)
core.VideoWriter._open = open_writer
sync = tensor_files.os.fsync
tensor_files.os.fsync = failing(sync, 2, OSError(28, "No space left on device"))
facts["disk full, state"] = run(state=state.StateFile(state.state_folder() / "faults"))
tensor_files.os.fsync = sync
(kept,) = state.state_folder().glob("faults*")
facts["chunks in the state"] = len(run_state.load_run_state(kept).finished)
facts["left"] = sorted(path.name for path in (OUTPUT / "faults").iterdir())
with core.av.open(str(OUTPUT / "faults" / "clip_00001.partial.mp4")) as container:
    facts["frames in the partial file"] = len(list(container.decode(video=0)))


def advice(width, height, *, decoding=False, host_memory=False):
    """The advice for a run of this size when its memory runs out."""
    shape = (1, 16, 9, height // 8, width // 8)
    wanted = recipe.Recipe(shape, 3, (1.0, 0.5, 0.0), torch.zeros(1, 4, 8), window=3)
    needed = memory.MemoryEstimate(weights=1 << 30, cache=4 << 30, prompt=0, step=4 << 30)
    plan = memory_plan.MemoryPlan(needed, needed, 0, kv_storage.KVOptions("int8", host=host_memory))
    return refusals.memory_advice(wanted, plan, decoding=decoding)


facts["advice"] = {f"{width}×{height}": advice(width, height) for width, height in ((832, 480), (48, 32), (64, 16))}
facts["advice at the least size"] = advice(16, 16)
facts["no advice left"] = [advice(16, 16, host_memory=True, decoding=decoding) for decoding in (False, True)]
print(json.dumps(facts))

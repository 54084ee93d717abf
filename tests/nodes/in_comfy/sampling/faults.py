"""Memory that runs out and NaN in the middle of a run, on the sampling node itself."""

import comfyui
import torch
from comfyui import comfy, failing, model_failing

state = comfyui.module("nodes.state")
decode, video_output, schedules = comfyui.modules("nodes", "vae.decode", "video_output", "schedule")
memory, advices = comfyui.module("lightforcing_core.memory.estimate"), comfyui.module("nodes.sampling.memory")
memory_plan, kv_storage = comfyui.modules("lightforcing_core", "memory.plan", "model.kv_storage")
recipe = comfyui.module("lightforcing_core.rollout.recipe")
model, vae = comfyui.applied(comfyui.load("tiny_wan.safetensors")), comfyui.small_vae()
latent = {"samples": torch.zeros(1, 16, 9, 4, 6)}
node = comfyui.sampling_node()
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
NAN = float("nan")
OUTPUT = comfyui.module("nodes.comfy").output_folder()


def run(**inputs):
    """What a run of three chunks gives: latent and video frames, and the node's words."""
    arguments = {"model": model, "positive": comfyui.prompt(), "latent": latent, "seed": 1, "steps": 2, **inputs}
    output = node.execute(**arguments)
    frames = output[1].shape[0] if isinstance(output[1], torch.Tensor) else None
    return output[0]["samples"].shape[2], frames, (output.ui or {}).get("text", ("",))[0]


def refused(kind, *parts, **inputs):
    """A run ends with an error of this kind, whose message has these parts."""
    errors = []
    try:
        run(**inputs)
    except Exception as raised:
        errors.append(raised)
    (error,) = errors
    assert type(error).__name__ == kind
    assert comfy.model_management.is_oom(error) == (kind == "OutOfMemoryError")
    assert all(part in str(error) for part in parts), error


# Out of memory in a step: five forwards are two steps, the clean pass, then the second chunk's second.
assert run(vae=vae)[:2] == (9, 33)
of_the_cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")
for error, given, made in ((OOM, {"vae": vae}, (3, 9)), (of_the_cpu, {}, (3, None))):
    *found, text = run(model=model_failing(model, 5, error), **given)
    assert tuple(found) == made
    assert "out of memory while sampling a chunk, after 1 of 3 chunks: 9 of 33 frames" in text
    assert "window from 9 to 6 latent frames" in text
    assert "size from 48×32 to 32×16" in text
smaller = "lower the size from 48×32 to 32×16"
refused("OutOfMemoryError", smaller, model=model_failing(model, 5, OOM), keep_finished=False)
refused("OutOfMemoryError", smaller, model=model_failing(model, 1, OOM))
refused("RuntimeError", "boom", model=model_failing(model, 5, RuntimeError("boom")))

# Out of memory in decoding: all latents so far, and the frames so far.
stream = decode.StreamingDecoder.decode
for calls, made in ((2, (6, 9)), (1, (3, None))):
    decode.StreamingDecoder.decode = failing(stream, calls, OOM)
    *found, text = run(vae=vae)
    assert tuple(found) == made
    assert "while decoding" in text
    assert "LightVAE" in text
decode.StreamingDecoder.decode = stream


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
words = "chunk 0 of the video holds NaN or infinity; the model computes in torch.float32", "its LoRA"
refused("NotFinite", *words, model=model_with(1, NAN), vae=vae, video_output=video, **saved)
refused("NotFinite", *words, model=model_with(1, float("inf")), **saved)
broken = comfyui.small_vae()
with torch.no_grad():
    broken.first_stage_model.decoder.head[-1].bias[0] = NAN
    broken.first_stage_model.encoder.head[-1].bias[0] = NAN
words = "holds NaN or infinity", "the VAE computes in torch.float32"
refused("NotFinite", *words, vae=broken, video_output=video, keep_finished=False)
for given, made, cut in (
    (broken, [3, None], "1 of 3 chunks: 9 of 33 frames"),
    (comfyui.vae_with_nan(4), [6, 9], "2 of 3 chunks: 21 of 33 frames"),
    (comfyui.vae_with_nan(9), [9, 21], "3 of 3 chunks: 33 of 33 frames"),
):
    *found, text = run(vae=given)
    assert found == made
    assert all(part in text for part in (*words, f"stopped after {cut}")), text
encode = comfyui.module("nodes.vae.encode").LightForcingEncode.execute
assert all(part in comfyui.error_of(encode, torch.zeros(1, 32, 48, 3), broken) for part in words)
assert not [path for folder in (OUTPUT, state.state_folder()) for path in folder.rglob("*finite*/*")]
*found, text = run(model=model_with(4, NAN), vae=vae)
assert found == [3, 9]
assert "chunk 1 of the video holds NaN" in text
assert "stopped after 1 of 3 chunks: 9 of 33 frames" in text
refused("NotFinite", model=model_with(4, NAN), keep_finished=False)


def advice(width, height, *, decoding=False, host_memory=False):
    """The advice for a run of this size when its memory runs out."""
    shape = (1, 16, 9, height // 8, width // 8)
    wanted = recipe.Recipe(shape, 3, (1.0, 0.5, 0.0), torch.zeros(1, 4, 8), window=3)
    needed = memory.MemoryEstimate(weights=1 << 30, cache=4 << 30, prompt=0, step=4 << 30)
    plan = memory_plan.MemoryPlan(needed, needed, 0, kv_storage.KVOptions("int8", host=host_memory))
    return advices.memory_advice(wanted, plan, decoding=decoding)


assert "lower the size from 832×480 to 720×416 (2.00 GiB less)" in advice(832, 480)
assert "lower the size from 64×16 to 48×16 (2.00 GiB less)" in advice(64, 16)
assert advice(16, 16).startswith("lower kv_cache to int8_host (")
assert "16×16" not in advice(16, 16)
nothing_left = "every setting is at its lowest; close other programs"
assert advice(16, 16, host_memory=True) == nothing_left
decoding = advice(16, 16, host_memory=True, decoding=True)
assert decoding.startswith(f"{nothing_left}; LightVAE (lightvaew2_1) decodes in")

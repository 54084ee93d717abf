"""What the sampling node does with more and less memory, and the encode node; printed as JSON."""

import json

import comfyui
import torch
from comfyui import comfy

encode, decode, memory, state = comfyui.modules("nodes", "vae.encode", "vae.decode", "sampling.memory", "state")
run_state = comfyui.module("lightforcing_core.rollout.state")
node_comfy = comfyui.module("nodes.comfy")
model = comfyui.applied(comfyui.load("tiny_wan.safetensors"), "light_forcing_short", "16")
vae, node = comfyui.small_vae(), comfyui.sampling_node()
plans, plan_of = [], memory.plan_of
chunk_sampler = comfyui.module("nodes.sampling.chunk_sampler")


def remember(*arguments, **named):
    plans.append(plan_of(*arguments, **named))
    return plans[-1]


chunk_sampler.plan_of = remember


def run(*, free=None, frames=9, size=(4, 6), **inputs):
    """Latents and plan of a run; free: bytes that there seem to be."""
    latent = {"samples": torch.zeros(1, 16, frames, *size)}
    asked = memory.memory_for_a_run
    if free is not None:
        memory.memory_for_a_run = lambda device: free
    try:
        arguments = {"model": model, "positive": comfyui.prompt(), "latent": latent, "seed": 1, "steps": 2}
        output = node.execute(**{**arguments, **inputs})
    finally:
        memory.memory_for_a_run = asked
    return output[0]["samples"], output[1], plans[-1]


def described(plan):
    return {"line": str(plan), "given up": plan.given_up, "fits": plan.fits, "needed": plan.needed}


def error_of(action, *arguments, **named):
    try:
        action(*arguments, **named)
    except Exception as error:
        return {"error": str(error), "to ComfyUI": comfy.model_management.is_oom(error)}


whole, _, plan = run()
facts = {"plenty": described(plan), "size": run(vae=vae)[2].needed}
facts["kv_cache"] = {}
for name in chunk_sampler.KV_CACHES:
    latents, _, plan = run(kv_cache=name)
    facts["kv_cache"][name] = [float((latents - whole).abs().max()), float(whole.std()), *plan.given_up]
tight = run(free=plans[0].estimate.total // 2)[2]
facts["tight"] = described(tight)
wider = comfyui.small_vae(16)
_, images, plan = run(vae=wider, size=(32, 32), frames=2)
_, tiled, small = run(vae=wider, size=(32, 32), frames=2, free=plan.needed)
facts["tiles"] = [plan.decode_tiles, small.decode_tiles, list(tiled.shape), float((tiled - images).abs().mean())]

# A run that was kept in eight bits continues in eight bits, whatever the node asks for by then.
file = state.StateFile(state.state_folder() / "memory")
eight = run(kv_cache="int8", state=file)[0]
(path,) = state.state_folder().glob("memory*")
saved = run_state.load_run_state(path)
facts["state"] = [saved.kv_dtype, len(saved.finished)]
half = run_state.replace(saved, finished=saved.finished[:2])
run_state.save_run_state(half, path)
loaded = state.LightForcingLoadState.execute(path.name)[0]
again = run(kv_cache="full", state=loaded)[0]
facts["resumed equals uninterrupted"] = bool((again == eight).all())

# ComfyUI runs nodes in inference mode, where PyTorch shows fewer of the allocations that are counted.
sizes = []
for inside in (True, False):
    decode.decode_bytes.cache_clear()
    with torch.inference_mode(inside):
        plan = run(vae=vae, size=(16, 16))[2]
        sizes.append([plan.estimate.step, plan.estimate.decode])
facts["estimates"] = sizes

# Encode: equal to ComfyUI's, the end of a video kept, clear errors.
video = torch.rand(11, 32, 48, 3, generator=torch.Generator().manual_seed(2))
ours = encode.LightForcingEncode.execute(video, vae)[0]["samples"]
facts["encode"] = [list(ours.shape), float((ours - vae.encode(video[2:])).abs().max())]
facts["odd size"] = error_of(encode.LightForcingEncode.execute, torch.rand(1, 40, 48, 3), vae)["error"]
other = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=16).state_dict())
facts["another VAE"] = error_of(encode.LightForcingEncode.execute, video, other)["error"]
stream, calls = encode.StreamingEncoder.encode, iter(range(100))


def fails(*arguments, **named):
    if next(calls) == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return stream(*arguments, **named)


encode.StreamingEncoder.encode = fails
facts["encode runs out"] = error_of(encode.LightForcingEncode.execute, video, vae)
encode.StreamingEncoder.encode = stream

# With --novram weights are on the card only while they are used.
management, state_of = comfy.model_management, comfy.model_management.vram_state
management.vram_state = comfy.model_management.VRAMState.NO_VRAM
facts["novram"] = [run()[2].estimate.weights, plans[0].estimate.weights]
management.vram_state = state_of

# What another model takes of the memory counts as free, for ComfyUI moves it out.
device = model.load_device
comfy.model_management.load_models_gpu([vae.patcher])
free = comfy.model_management.get_free_memory
comfy.model_management.get_free_memory = lambda *a: 10 << 30
with_loaded = node_comfy.memory_for_a_run(device)
comfy.model_management.unload_all_models()
facts["loaded models count"] = with_loaded > node_comfy.memory_for_a_run(device)
comfy.model_management.get_free_memory = free
print(json.dumps(facts))

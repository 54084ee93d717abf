"""What the sampling node does with more and less memory, and the encode node."""

import re

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


whole, _, plan = run()
assert plan.given_up == []
assert re.match(r"needs about [\d.]+ GiB \(weights .*\), [\d.]+ GiB free$", str(plan))
errors, given_up = {}, {}
for name in chunk_sampler.KV_CACHES:
    latents, _, found = run(kv_cache=name)
    errors[name], given_up[name] = float((latents - whole).abs().max()), found.given_up
assert errors["auto"] == errors["full"] == errors["host"] == 0.0
assert errors["int8"] == errors["int8_host"] > 0.0
for name in ("int8", "fp8"):
    assert 0.0 < errors[name] < 0.2 * float(whole.std()), name
    assert given_up[name] == [f"8-bit KV cache ({name})"]
assert given_up["int8_host"] == ["8-bit KV cache (int8) in CPU memory"]
tight = run(free=plan.estimate.total // 2)[2]
assert tight.given_up == ["8-bit KV cache (int8)"]
assert "8-bit KV cache (int8) (without: " in str(tight)
assert "too little" in str(tight)  # a CPU has no other memory to move to
wider = comfyui.small_vae(16)
_, images, big = run(vae=wider, size=(32, 32), frames=2)
_, tiled, small = run(vae=wider, size=(32, 32), frames=2, free=big.needed)
assert (big.decode_tiles, small.decode_tiles > 1, tiled.shape) == (0, True, (5, 256, 256, 3))
assert 0.0 < (tiled - images).abs().mean() < 0.1

# A run that was kept in eight bits continues in eight bits, whatever the node asks for by then.
file = state.StateFile(state.state_folder() / "memory")
eight = run(kv_cache="int8", state=file)[0]
(path,) = state.state_folder().glob("memory*")
saved = run_state.load_run_state(path)
assert (saved.kv_dtype, len(saved.finished)) == ("int8", 3)
half = run_state.replace(saved, finished=saved.finished[:2])
run_state.save_run_state(half, path)
loaded = state.LightForcingLoadState.execute(path.name)[0]
again = run(kv_cache="full", state=loaded)[0]
assert torch.equal(again, eight)

# ComfyUI runs nodes in inference mode, where PyTorch shows fewer of the allocations that are counted.
sizes = []
for inside in (True, False):
    decode.decode_bytes.cache_clear()
    with torch.inference_mode(inside):
        found = run(vae=vae, size=(16, 16))[2]
        sizes.append((found.estimate.step, found.estimate.decode))
assert sizes[0] == sizes[1]

# Encode: the end of a video kept, clear errors.
video = torch.rand(11, 32, 48, 3, generator=torch.Generator().manual_seed(2))
assert (encode.LightForcingEncode.execute(video, vae)[0]["samples"] - vae.encode(video[2:])).abs().max() <= 1e-5
odd = comfyui.error_of(encode.LightForcingEncode.execute, torch.rand(1, 40, 48, 3), vae)
assert "height 40 is not a multiple of 16; use 32 or 48" in odd
other = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=16).state_dict())
assert "use the Wan 2.1 VAE or LightVAE" in comfyui.error_of(encode.LightForcingEncode.execute, video, other)
stream, oom = encode.StreamingEncoder.encode, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
encode.StreamingEncoder.encode = comfyui.failing(stream, 3, oom)
try:
    encode.LightForcingEncode.execute(video, vae)
except Exception as error:
    full = error
encode.StreamingEncoder.encode = stream
assert comfy.model_management.is_oom(full)
needs = r"encoding frame 8 of 9 at 48×32, which needs about \d\.\d\d GiB of the \d+\.\d\d GiB"
assert re.search(needs + ".*lower the size to 32×16, or use LightVAE", str(full), re.DOTALL)

# With --novram weights are on the card only while they are used.
management, state_of = comfy.model_management, comfy.model_management.vram_state
management.vram_state = comfy.model_management.VRAMState.NO_VRAM
assert (run()[2].estimate.weights, plan.estimate.weights > 0) == (0, True)
management.vram_state = state_of

# What another model takes of the memory counts as free, for ComfyUI moves it out.
device = model.load_device
comfy.model_management.load_models_gpu([vae.patcher])
free = comfy.model_management.get_free_memory
comfy.model_management.get_free_memory = lambda *a: 10 << 30
with_loaded = node_comfy.memory_for_a_run(device)
comfy.model_management.unload_all_models()
assert with_loaded > node_comfy.memory_for_a_run(device)

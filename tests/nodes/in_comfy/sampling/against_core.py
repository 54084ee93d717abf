"""Largest differences between core's ar_video sampler and our patch, same noise; printed as JSON."""

import json

import comfyui
import torch

patch, chunk_sampler = comfyui.module("nodes.model.patch"), comfyui.module("nodes.sampling.chunk_sampler")
schedules = comfyui.module("lightforcing_core.rollout.schedule")
SEED, SHAPE = 7, (1, 16, 6, 8, 12)


def core_noise(chunk_index, draw, shape):
    """The noise that core draws after step `draw`, from its global seed per block."""
    generator = torch.Generator().manual_seed(SEED + chunk_index * 1000 + draw - 1)
    return torch.randn(shape, generator=generator)


settings = comfyui.settings_of("unknown")
noise = comfyui.noise_of(SHAPE, seed=1)
causal, plain = comfyui.load("tiny_causal.safetensors"), comfyui.load("tiny_wan.safetensors")
worst = {}
for frames_per_chunk in (3, 1, 4):
    core = comfyui.comfy.samplers.ksampler("ar_video", {"num_frame_per_block": frames_per_chunk})
    expected = comfyui.sample(causal, core, noise, seed=SEED)
    worst["spread of the latents"] = float(expected.std())
    for name, model in (("core's causal model", causal), ("a plain Wan model", plain)):
        schedule = schedules.Schedule(SHAPE[2], frames_per_chunk)
        ours = chunk_sampler.ChunkSampler(chunk_sampler.Request(schedule), fresh_noise=core_noise)
        actual = comfyui.sample(patch.patched(model, settings), ours, noise, seed=SEED)
        worst[f"{frames_per_chunk} per chunk, {name}"] = float((actual - expected).abs().max())
print(json.dumps(worst))

"""Steps recorded inside ComfyUI's wrapper of the model, on a tape instead of a CUDA graph, if that is safe."""

import sys
from dataclasses import replace
from pathlib import Path

import comfyui
import torch

sys.path.insert(0, str(Path(comfyui.PACK, "tests", "support")))
import tape  # isort: skip

chunk_sampler, patch = comfyui.modules("nodes", "sampling.chunk_sampler", "model.patch")
graphs = comfyui.module("lightforcing_core.model.cuda_graph")
SHAPE = (1, 16, 9, 8, 12)
settings = comfyui.settings_of("self_forcing", backend="reference")
noise = comfyui.noise_of(SHAPE)
comfyui.infer()
graphs.CudaRecorder, graphs.is_off, graphs.choose = tape.TapeRecorder, lambda: False, lambda *_, **__: "graph"
plan_of = chunk_sampler.plan_of


def sample(model, on):
    chunk_sampler.plan_of = lambda *a, **n: replace(plan_of(*a, **n), cuda_graph=on)
    tape.TapeRecorder.events.clear()
    sampler = comfyui.chunk_sampler(SHAPE[2])
    latents = comfyui.sample(patch.patched(model, settings), sampler, noise)
    launches = [kind for kind, _ in tape.TapeRecorder.events].count("launch")
    return latents, launches, sampler.record.facts.get("CUDA graphs")


def wrapped():
    """A model with a weight that is changed at every use."""
    model = comfyui.load("tiny_wan.safetensors")
    model.add_weight_wrapper("diffusion_model.blocks.0.self_attn.q.weight", torch.clone)
    return model


MOVES = "not used: ComfyUI moves or patches the weights of {} while they are used"
for make, launched, note in (
    (lambda: comfyui.load("tiny_wan.safetensors"), 9, "9 passes launched as graphs"),  # three of a chunk's four
    (lambda: comfyui.load("tiny_causal.safetensors"), 9, "9 passes launched as graphs"),
    (lambda: comfyui.with_lora(comfyui.load("tiny_wan.safetensors")), 9, "9 passes launched as graphs"),
    (lambda: comfyui.loaded("tiny_wan.safetensors", "fp8_rowwise"), 9, "9 passes launched as graphs"),
    (wrapped, 0, MOVES.format("blocks.0.self_attn.q")),
):
    expected, *without = sample(make(), False)
    latents, launches, said = sample(make(), True)
    assert torch.equal(latents, expected)
    assert (launches, said, without) == (launched, note, [0, None] if launched else without), make

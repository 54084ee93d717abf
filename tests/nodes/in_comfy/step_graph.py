"""Steps recorded inside the host's wrapper, on a tape in the place of a CUDA graph; printed as JSON."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import host
import torch
from host import comfy

sys.path.insert(0, str(Path(host.PACK, "tests", "support")))
import tape  # isort: skip

chunk_sampler, patch, loader = (
    host.room(f"nodes.{name}") for name in ("sampling.chunk_sampler", "model.patch", "model.loader")
)
schedules, families = host.room("lightforcing_core.rollout.schedule"), host.room("lightforcing_core.families")
attention, graphs = host.room("lightforcing_core.attention.dispatch"), host.room("lightforcing_core.model.cuda_graph")
SHAPE = (1, 16, 9, 8, 12)
settings = patch.Settings(families.FAMILIES["self_forcing"], attention.AttentionOptions(backend="reference"))
noise = host.noise_of(SHAPE)
inference = torch.inference_mode()  # as the host runs every node; it ends with this object
inference.__enter__()
torch.set_num_threads(1)
graphs.CudaRecorder = tape.TapeRecorder
plan_of = chunk_sampler.plan_of


def sample(model, on):
    chunk_sampler.plan_of = lambda *a, **n: replace(plan_of(*a, **n), cuda_graph=on)
    tape.TapeRecorder.events.clear()
    sampler = chunk_sampler.ChunkSampler(schedules.Schedule(SHAPE[2], 3, target=0.5, base=0.6))
    latents = host.sample(patch.patched(model, settings), sampler, noise)
    launches = [kind for kind, _ in tape.TapeRecorder.events].count("launch")
    return latents, launches, sampler.record.facts.get("CUDA graphs")


def with_lora(model):
    lora = comfy.utils.load_torch_file(f"{host.BASE}/models/loras/tiny_lora.safetensors")
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def rowwise():
    path = f"{host.BASE}/models/diffusion_models/tiny_wan.safetensors"
    return loader.load_checkpoint(path, "auto", None, "fp8_rowwise")


def partly():
    """A model whose host moves its weights in while they are used."""
    model = host.load("tiny_wan.safetensors")
    for module in model.model.diffusion_model.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.comfy_cast_weights = True
    return model


facts = {}
for name, make in {
    "plain": lambda: host.load("tiny_wan.safetensors"),
    "core's causal model": lambda: host.load("tiny_causal.safetensors"),
    "LoRA": lambda: with_lora(host.load("tiny_wan.safetensors")),
    "fp8_rowwise": rowwise,
    "weights that move": partly,
}.items():
    expected, none, words = sample(make(), False)
    latents, launches, said = sample(make(), True)
    facts[name] = [torch.equal(latents, expected), launches, said, none, words]
print(json.dumps(facts))

"""Runs of the sampling node on the card, with every kind of weight that a MODEL may carry."""

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfyui
import torch
from card import CARD, OnCard, card, management, plug_in, sized
from comfy.quant_ops import QuantizedTensor
from comfyui import comfy
from safetensors.torch import load_file, save_file

plug_in()
comfyui.infer()

loader, decode, encode = comfyui.modules("nodes", "model.loader", "vae.decode", "vae.encode")
chunk_sampler, report = comfyui.module("nodes.sampling.chunk_sampler"), comfyui.module("nodes.report")
fused, graphs = comfyui.module("lightforcing_core.model.fused"), comfyui.module("lightforcing_core.model.cuda_graph")
pinned = comfyui.module("lightforcing_core.pinned")
wan = comfyui.module("lightforcing_core.model.wan")
LAYERS, WIDTH, TEXT, FRAMES = 3, 256, 256, 6
FOLDER = Path(comfyui.BASE, "low_memory")
DIT = FOLDER / "light_forcing_short.safetensors"
METADATA = {"config": json.dumps({"transformer": {"text_dim": TEXT}})}
OPTIONS = {"backend": "reference", "block": "16", "keep_frames": -1, "keep_sink": -1, "keep_near": -1}
node = comfyui.sampling_node()
plans = []


def plan_of(*arguments, plan=chunk_sampler.plan_of, **named):
    plans.append(replace(plan(*arguments, **named), cuda_graph=plan_of.graph, overlap=plan_of.graph))
    return plans[-1]


chunk_sampler.plan_of = plan_of
# What else than an NVIDIA GPU do recorded steps and fused kernels want? An ordinary weight on this card is an OnCard.
graphs.CudaRecorder.why_not = staticmethod(lambda device: None)
graphs.choose, graphs.is_off = lambda *_, **__: "graph", lambda: False
comfyui.module("lightforcing_core.vae.graph").choose = graphs.choose
fused.nn = pinned.nn = SimpleNamespace(**{**vars(torch.nn), "Parameter": OnCard})
FOLDER.mkdir(exist_ok=True)
save_file(
    wan.random_state_dict(dim=WIDTH, ffn_dim=512, layers=LAYERS, text_dim=TEXT, seed=1),
    DIT,
    metadata=METADATA,
)


def file(weight_dtype="default"):
    """A MODEL as Light Forcing Model Loader makes it."""
    return loader.patched(
        loader.load_checkpoint(str(DIT), "auto", None, weight_dtype),
        loader.settings_from(loader.chosen_family("auto", DIT.name), **OPTIONS),
    )


def stored(dtype):
    """A MODEL for which ComfyUI keeps the weights in `dtype` and computes in float32."""
    weights = {name: weight.to(dtype) for name, weight in load_file(DIT).items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype}, metadata=METADATA)
    return comfyui.applied(model, "light_forcing_short", "16", "reference")


def with_lora(model):
    """A MODEL as Load LoRA makes it: low-rank changes of matrices, whole ones of norms and biases."""
    generator = torch.Generator().manual_seed(4)
    lora = {}
    for layer in range(LAYERS):
        name = f"diffusion_model.blocks.{layer}"
        for linear, out in (("self_attn.q", WIDTH), ("self_attn.v", WIDTH), ("ffn.0", 512)):
            lora[f"{name}.{linear}.lora_A.weight"] = torch.randn(4, WIDTH, generator=generator) * 0.1
            lora[f"{name}.{linear}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.1
        lora[f"{name}.self_attn.norm_k.diff"] = torch.randn(WIDTH, generator=generator) * 0.1
        lora[f"{name}.self_attn.q.diff_b"] = torch.randn(WIDTH, generator=generator) * 0.1
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


KINDS = {
    "float32": file,
    "float32, LoRA": lambda: with_lora(file()),
    "bfloat16": lambda: stored(torch.bfloat16),
    "bfloat16, LoRA": lambda: with_lora(stored(torch.bfloat16)),
    "fp8_e4m3fn": lambda: file("fp8_e4m3fn"),
    "fp8_e4m3fn, LoRA": lambda: with_lora(file("fp8_e4m3fn")),
    "fp8_rowwise": lambda: file("fp8_rowwise"),
    "fp8_rowwise, LoRA": lambda: with_lora(file("fp8_rowwise")),
}


new_vae = comfyui.small_vae
latents, video = comfyui.noise_of((1, 16, 3, 4, 6)), torch.rand(9, 32, 48, 3)


def decoded(vae):
    return decode.LightForcingDecode.execute({"samples": latents}, vae)[0]


def encoded(vae):
    return encode.LightForcingEncode.execute(video, vae)[0]["samples"]


def run(model, *, size=None, graph=False, **inputs):
    """Latents, frames and record of a run of two chunks from an empty card of `size` bytes; None: of any size.

    graph: record steps and decode beside the sampling.
    """
    management.unload_all_models()
    plan_of.graph = graph
    with sized(1 << 40 if size is None else size):
        latents, images = node.execute(**{**arguments(model), **inputs})[:2]
    return latents["samples"], images, latents[report.RECORD]


def arguments(model):
    latent = {"samples": torch.zeros(1, 16, FRAMES, 4, 6)}
    return {"model": model, "positive": prompt(), "latent": latent, "seed": 1, "steps": 2, "kv_cache": "full"}


def prompt():
    return [[torch.randn(1, 12, TEXT, generator=torch.Generator().manual_seed(9)), {}]]


def same(one, other):
    """Whether two runs gave the same latents and frames, bit for bit."""
    return [torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True)]


def distance(one, other):
    """How far the latents of a run are from another's, as a share of theirs."""
    return ((one[0] - other[0]).norm() / other[0].norm()).item()


def contents(model):
    """What the weights hold, wherever they lie and however they are stored."""
    found = {}
    for name, weight in model.model.named_parameters():
        plain = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        found[name] = hashlib.sha1(plain.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()
    return found


def meanwhile(model, call, action):
    """`model`, in whose runs `action` happens just before forward number `call`, as another pack's hook would do it."""
    clone, calls = model.clone(), iter(range(1, 1000))

    def wrapper(forward, *arguments, **named):
        if next(calls) == call:
            action()
        return forward(*arguments, **named)

    clone.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, wrapper)
    return clone


def layers_of(model):
    """The modules whose weights ComfyUI may move one by one."""
    modules = model.model.diffusion_model.modules()
    return [module for module in modules if hasattr(module, "comfy_cast_weights") and module.weight is not None]


def watched_norms(seen):
    """Note in `seen` what the fused store reads of a norm: whether at all, and whether ComfyUI reads the same."""
    store = fused.store

    def watched(attention, x, *arguments, **named):
        for norm in (attention.norm_q, attention.norm_k):
            is_taken = fused._why_not_plain(norm, x, torch.nn.RMSNorm) is None
            weight = fused._cast(norm, norm.weight, x) if is_taken else None
            by_hand = partial(torch.nn.functional.rms_norm, x, norm.normalized_shape, weight, norm.eps)
            seen.append((is_taken, not is_taken or torch.equal(norm(x), by_hand())))
        return store(attention, x, *arguments, **named)

    fused.store = watched


def away(model):
    """How many of them lie in main memory, and how many are patched while they are used."""
    layers = layers_of(model)
    patched = sum(bool(layer.weight_function or layer.bias_function) for layer in layers)
    return [len(layers), sum(layer.weight.device != CARD for layer in layers), patched]


__all__ = ["CARD", "card", "comfyui", "decode", "loader", "management", "replace", "sized"]

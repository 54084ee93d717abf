"""No node of ComfyUI that changes a MODEL does so in vain: it acts as with ComfyUI's sampler, or is refused by name.

A node comes before Light Forcing Apply, or after our loader. Videos of one chunk are compared with those of a plain
sampling loop over the same MODEL without our patch: there the causal forward equals the stock one.
"""

import asyncio
from types import SimpleNamespace
from unittest.mock import MagicMock

import comfyui
import torch
from comfyui import comfy

import nodes

SHAPE = (1, 16, 3, 8, 12)
samplers = comfyui.module("nodes.sampling.chunk_sampler")
recipe, schedules = comfyui.modules("lightforcing_core.rollout", "recipe", "schedule")
comfyui.infer()
asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))

generator = torch.Generator().manual_seed(1)
image, vae = torch.rand(1, 64, 96, 3, generator=generator), comfyui.small_vae()
positive = comfyui.prompt()
negative = [[torch.randn(1, 12, 4096, generator=generator), {}]]
fresh = torch.randn(5, *SHAPE, generator=generator)
recipe.Recipe.noise = lambda _: lambda chunk, draw, shape: fresh[draw][:, :, : shape[2]]
stock = comfyui.load("tiny_wan.safetensors")
other = comfyui.with_lora(stock)
ours = comfyui.loaded("tiny_wan.safetensors", family="unknown")
# Values by the type of an input, for those without a default.
VALUES = {
    "IMAGE": image,
    "VAE": vae,
    "CONDITIONING": positive,
    "LATENT": {"samples": torch.zeros(SHAPE)},
    "LATENT_OPERATION": lambda latent, **_: 1.5 * latent,
    "LORA_MODEL": comfy.utils.load_torch_file(f"{comfyui.BASE}/models/loras/tiny_lora.safetensors"),
    "MODEL_PATCH": MagicMock(),
    "CLIP_VISION_OUTPUT": MagicMock(),
    "AUDIO_ENCODER_OUTPUT": MagicMock(),
    "AUDIO": {"waveform": torch.zeros(1, 1, 400), "sample_rate": 44100},
}
# Values with which a node does something to this model, where its defaults do not.
SPECIAL = {
    "ARVideoI2V": {"width": 96, "height": 64, "length": 9},
    "CFGOverride": {"cfg": 2.0},
    "ChromaRadianceOptions": {"nerf_tile_size": 1},
    "FreSca": {"freq_cutoff": 1},
    "LTXVReferenceAudio": {
        "audio_vae": SimpleNamespace(encode=lambda _: torch.zeros(1, 8, 4, 4), audio_sample_rate=44100)
    },
    "LTXVSpatioTemporalGuidance": {"blocks": "0"},
    "LoraLoader": {"clip": None},
    "LoraLoaderBypass": {"clip": None},
    "ModelComputeDtype": {"dtype": "bf16"},
    "ModelNoiseScale": {"noise_scale": 2.0},
    "SkipLayerGuidanceDiT": {"double_layers": "0", "start_percent": 0.0, "end_percent": 1.0},
    "SkipLayerGuidanceDiTSimple": {"double_layers": "0"},
    "SkipLayerGuidanceSD3": {"layers": "0", "start_percent": 0.0, "end_percent": 1.0},
}


# These change nothing on a Wan model, or on this machine, with ComfyUI's sampler either.
NEUTRAL = {
    "ChromaRadianceOptions": "read by Chroma Radiance alone",
    "DifferentialDiffusion": "acts on noise masks, which a rollout refuses",
    "MultiGPU_WorkUnits": "there is one device",
    "SelectModelDevice": "there is one device",
    "UNetCrossAttentionMultiply": "Wan's layers have other names",
    "UNetSelfAttentionMultiply": "Wan's layers have other names",
    "UNetTemporalAttentionMultiply": "Wan's layers have other names",
    "WanAnimate2Cache": "read by Wan Animate 2 alone",
    "wanBlockSwap": "does nothing since ComfyUI 0.3",
}
# These compare the two prompts' predictions, and cfg 1 makes only one.
GUIDANCE = {
    *("CFGNorm", "CFGZeroStar", "FreSca", "Mahiro", "RescaleCFG", "TCFG"),
    *("VideoLinearCFGGuidance", "VideoTriangleCFGGuidance"),
}
# These fail on a Wan model with ComfyUI's sampler too.
NOT_FOR_WAN = {"FreeU", "FreeU_V2", "RenormCFG", "TripoSplatSamplingPreview"}
# These need a file of another kind of model; the kinds of patches that they add.
WITH_FILES = {
    "HypernetworkLoader": ("attn1_patch", "attn2_patch"),
    "QwenImageDiffsynthControlnet": ("double_block", "noise_refiner"),
    "SUPIRApply": ("middle_block_after_patch", "output_block_patch"),
    "USOStyleReference": ("post_input",),
    "WanInfiniteTalkToVideo": ("attn1_patch", "attn2_patch"),
    "WanUni3CControlnetApply": ("double_block",),
}
# How a refusal names a patch, if not by the node.
ALIASES = {
    "AnimaLLLiteApply": "AnimaLLLitePatch",
    "ContextWindowsManual": "context windows",
    "EasyCache": "easycache",
    "FluxKVCache": "KV_Attn_Input",
    "LTXVContextWindows": "context windows",
    "LazyCache": "lazycache",
    "ModelAttentionBackend": "attention override",
    "ScaleROPE": "scaled RoPE",
    "SkipLayerGuidanceSD3": "SkipLayerGuidanceDiT",
    "WanContextWindowsManual": "context windows",
}
STARTS = "ARVideoI2V"  # acts in samplers for autoregressive video alone; see against_core.py
ROUNDS = "ModelComputeDtype"  # to 16 bits, which makes a batch of two prompts differ from one at a time


def inputs_of(node):
    """Types and options of a node's inputs by name."""
    kinds = node.INPUT_TYPES()
    return {name: spec for part in ("required", "optional") for name, spec in kinds.get(part, {}).items()}


def through(name, model):
    """The MODEL that a node of ComfyUI makes of one."""
    node, models, given = nodes.NODE_CLASS_MAPPINGS[name], iter((model, other)), {}
    for key, (kind, *options) in inputs_of(node).items():
        options = options[0] if options else {}
        if key in SPECIAL.get(name, {}):
            given[key] = SPECIAL[name][key]
        elif kind == "MODEL":
            given[key] = next(models)
        elif name.startswith("ModelMerge") and kind == "FLOAT":
            given[key] = 0.5
        elif "default" in options:
            given[key] = options["default"]
        elif isinstance(kind, list) or "options" in options:
            given[key] = (options.get("options") or kind)[0]
        elif kind in VALUES:
            given[key] = VALUES[kind]
    made = node.execute(**given) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(**given)
    return made[list(node.RETURN_TYPES).index("MODEL")]


def plain(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The few-step loop of a single chunk, with the bidirectional model."""
    for step, sigma in enumerate(sigmas[:-1]):
        x0 = model(x, sigma * x.new_ones(len(x)), **extra_args)
        x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * fresh[step + 1]
    return x0


def video_of(model, sampler, cfg):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    return guider.sample(fresh[0], torch.zeros(SHAPE), sampler, sigmas, disable_pbar=True, seed=0)


def of_chunk(model, cfg):
    return video_of(model, samplers.ChunkSampler(samplers.Request(schedules.Schedule(SHAPE[2], SHAPE[2]))), cfg)


def of_loop(model, cfg):
    return video_of(model, comfy.samplers.KSAMPLER(plain), cfg)


def made(action):
    """A result, or the message of its error."""
    try:
        return action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def difference(video, reference):
    """The largest difference of two videos; the message of the first that has failed."""
    failed = next((one for one in (video, reference) if isinstance(one, str)), None)
    return failed or float((video - reference).abs().max())


def why_wrong(name, cfg, stock, acts, off):
    """Why a node's effect is not what it should be, or None.

    stock, acts: what the node changes with ComfyUI's sampler and with ours; off: how far these two are apart.
    """
    if isinstance(acts, str):
        if name in NOT_FOR_WAN and acts == stock:
            return None
        return None if acts.startswith("ValueError: this MODEL ") and ALIASES.get(name, name) in acts else acts
    if name == STARTS:
        return None if acts > 1 else "it does nothing"
    if not off < 1e-3 and not (name == ROUNDS and cfg == 3):
        return f"it is {off} off"
    is_neutral = name in NEUTRAL or (cfg == 1 and name in GUIDANCE)
    return None if is_neutral == (acts < 1e-4) else f"it changes the video by {acts}"


shifted = stock.clone()
comfyui.module("nodes.comfy").set_shift(shifted, 5.0)
base = {cfg: (of_loop(shifted, cfg), of_chunk(ours, cfg)) for cfg in (1.0, 3.0)}
assert difference(*base[1.0]) == 0.0
assert difference(*base[3.0]) < 1e-4  # to rounding: ComfyUI runs both prompts in one batch
TOO_SLOW = ("TorchCompileModel",)  # half a minute of tracing, for the same numbers
wrong, walked = {}, set()
for name, node in sorted(nodes.NODE_CLASS_MAPPINGS.items()):
    takes_model = any(kind[0] == "MODEL" for kind in inputs_of(node).values())
    code = getattr(node, "execute", None) or getattr(node, node.FUNCTION)
    code = getattr(code, "__func__", code)  # some nodes share theirs
    if "MODEL" not in node.RETURN_TYPES or not takes_model or name in TOO_SLOW or code in walked:
        continue
    walked.add(code)
    reference = made(lambda name=name: through(name, shifted))
    if isinstance(reference, str):  # a new node needs a value above, or a place in a list
        if name not in NOT_FOR_WAN | WITH_FILES.keys():
            wrong[name] = reference
        continue
    before = made(lambda name=name: comfyui.applied(through(name, stock)))
    after = made(lambda name=name: through(name, ours))
    for cfg, (plain_video, our_video) in base.items():
        expected = made(lambda cfg=cfg, model=reference: of_loop(model, cfg))
        effect = difference(expected, plain_video)
        for place, model in (("before", before), ("after", after)):
            video = model if isinstance(model, str) else made(lambda cfg=cfg, model=model: of_chunk(model, cfg))
            why = why_wrong(name, cfg, effect, difference(video, our_video), difference(video, expected))
            if why is not None:
                wrong[name, place, cfg] = why
assert wrong == {}, wrong
assert len(walked) > 60, len(walked)
for kind in {kind for kinds in WITH_FILES.values() for kind in kinds}:
    model = ours.clone()
    model.set_model_patch(plain, kind)
    assert f"({kind}: plain)" in made(lambda model=model: of_chunk(model, 1.0))
# The noise levels of two frame-wise chunks, and of the clean pass between them, with another shift behind Apply.
levels, model = [], through("ModelSamplingSD3", comfyui.applied(stock, "causal_forcing_2step"))


def spy(executor, x, sigma, *arguments, **named):
    levels.append(round(float(sigma), 4))
    return executor(x, sigma, *arguments, **named)


model.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, spy)
comfyui.sampling_node().execute(model, positive, {"samples": torch.zeros(1, 16, 2, 8, 12)}, 5, 0)
# Shift 3: steps 1000, 750, 500 and 250 of the first chunk, and 1000 and 500 of the next, of Causal Forcing++.
assert levels == [1.0, 0.9, 0.75, 0.5, 0.0, 1.0, 0.75]

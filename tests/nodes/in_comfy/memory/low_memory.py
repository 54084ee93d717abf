"""Runs on a card that is too small for the weights, and one that loses them meanwhile."""

import gc
from contextlib import contextmanager

import card_runs as runs
import torch
from card_runs import CARD, card, comfyui, decode, management, new_vae, run, same, sized
from comfyui import comfy

gc.disable()  # memory that a cycle keeps must show


@contextmanager
def started_with(state):
    """ComfyUI as started with --lowvram or --novram."""
    before, management.vram_state = management.vram_state, getattr(management.VRAMState, state)
    yield
    management.vram_state = before


def too_small(model, by=5):
    """A size of the card that the last run's peak misses by a fifth of the weights, or another share."""
    return card.peak - model.model_size() // by


def trace_of(model):
    """All that loading, patching and sampling could leave on a module tree."""
    found = {}
    for name, module in model.model.named_modules():
        flags = [getattr(module, flag, None) for flag in ("comfy_cast_weights", "comfy_patched_weights")]
        functions = len(getattr(module, "weight_function", ())) + len(getattr(module, "bias_function", ()))
        found[name] = [type(module).__name__, *flags, hasattr(module, "prev_comfy_cast_weights"), functions]
        for key, tensor in module.named_parameters(recurse=False):
            found[f"{name}.{key}"] = [type(tensor).__name__, str(tensor.dtype), str(tensor.device)]
    return found | runs.contents(model)


# Every kind of weight: all on the card, as many as fit, none; with --lowvram ComfyUI does what it does without.
for name, make in runs.KINDS.items():
    model, has_lora = make(), name.endswith("LoRA")
    whole = run(model, steps=1)
    fully, size = runs.away(model), too_small(model)
    partly, plan = run(model, size=size, steps=1), runs.plans[-1]
    modules, moved, _ = on_the_small_card = runs.away(model)
    assert (fully, moved > 0) == ([modules, 0, 0], True), (name, fully, on_the_small_card)
    assert (plan.fits, card.peak <= size) == (False, True), name  # more than the plan allows for, and yet it fits
    assert "too little, so ComfyUI will offload weights" in str(plan), name
    with started_with("NO_VRAM"):
        novram = run(model, steps=1)
    modules, moved, patched = runs.away(model)
    assert (moved, patched > 0, runs.plans[-1].estimate.weights) == (modules, has_lora, 0), name
    rounding = max(runs.distance(other, novram) for other in (whole, partly))
    if has_lora and name != "float32, LoRA":
        # ComfyUI rounds the sum of a weight on the card and its LoRA, but not where it adds them at every use.
        assert 0.0 < rounding < (0.002 if "bfloat16" in name else 0.1), (name, rounding)
    else:
        assert [torch.equal(whole[0], other[0]) for other in (partly, novram)] == [True, True], name
    if name == "float32":
        with started_with("LOW_VRAM"):
            assert torch.equal(whole[0], run(model, size=size, steps=1)[0])
        assert runs.away(model) == on_the_small_card

# What a run leaves behind, LoRA and patch included; what it decided on the way.
model, vae = runs.with_lora(runs.file()), new_vae()
stock = comfy.sd.load_diffusion_model(str(runs.DIT))
mine = comfyui.applied(stock, "light_forcing_short", "16", "reference")
euler = comfy.samplers.sampler_object("euler")


def stock_video():
    return comfyui.sample(stock, euler, comfyui.noise_of((1, 16, 3, 4, 6)), positive=runs.prompt()).cpu()


before, untouched, shift = stock_video(), trace_of(model), stock.model.model_sampling.shift
management.unload_all_models()
assert card.used == 0
whole = run(model, vae=vae)
seen, size = [], too_small(model, by=2)
runs.watched_norms(seen)
wrapped = runs.with_lora(runs.file())
wrapped.add_weight_wrapper("diffusion_model.blocks.1.self_attn.norm_q.weight", torch.clone)  # a change at every use
for name, made, limit, state, norms in (
    ("fully", model, None, "NORMAL_VRAM", {(True, True)}),
    ("partly", model, size, "NORMAL_VRAM", {(True, True), (False, True)}),
    ("novram", model, None, "NO_VRAM", {(False, True)}),
    ("one norm wrapped", wrapped, None, "NORMAL_VRAM", {(False, True), (True, True)}),
):
    seen.clear()
    with started_with(state):
        latents, frames, record = run(made, vae=vae, size=limit, graph=True)
    assert same(whole, (latents, frames)) == [True, True], name
    assert set(seen) <= norms, (name, seen)  # pairs of (taken by the fused store, equal to what ComfyUI makes of it)
    assert name == "partly" or set(seen) == norms, (name, seen)
    reason = runs.pinned.why_not_resident(made.model.diffusion_model, CARD)
    if name == "fully":
        assert reason is None
    else:
        assert "ComfyUI moves or patches the weights of " in reason, (name, reason)
        assert record.facts["CUDA graphs"] == f"not used: {reason}", name
run(mine, size=size)
management.unload_all_models()
gc.collect()
assert card.used == 0
assert trace_of(model) == untouched
assert stock.model.model_sampling.shift == shift
assert torch.equal(before, stock_video())

# Other models are loaded during the run: ComfyUI frees memory for them.
other, calls = new_vae(16), []


def another_comes():
    calls.append(runs.away(model))
    management.load_models_gpu([other.patcher])
    calls.append(runs.away(model))


def the_vae_goes():
    """All of it, as where ComfyUI has nothing smaller to take."""
    (at,) = [at for at, loaded in enumerate(management.current_loaded_models) if loaded.model is vae.patcher]
    management.current_loaded_models[at].model_unload()
    del management.current_loaded_models[at]
    calls.append([str(vae.patcher.current_loaded_device())])


whole = run(model, vae=vae)
tight = card.peak + other.patcher.model_size() // 2
assert same(whole, run(runs.meanwhile(model, 4, another_comes), vae=vae, size=tight)) == [True, True]
(_, *before), (_, moved, patched) = calls
assert (before, moved > 0, patched > 0) == ([0, 0], True, True)  # a LoRA is now added at every use
calls.clear()
assert same(whole, run(runs.meanwhile(model, 4, the_vae_goes), vae=vae)) == [True, True]
assert calls == [["cpu"]]

# Decode and encode on a card that is too small for the VAE; a decoder beside the sampling needs all of it.
wide, late = new_vae(16), comfyui.module("tests.support.late").LateStream
comfyui.module("lightforcing_core.vae.overlap").side_stream = late


def overlaps():
    decoder = decode.FrameDecoder(wide, runs.latents.shape)
    decoder.cut(1, overlap=True)
    decoder.put(runs.latents, normalised=False)
    decoder.drop()
    began, late.log[:] = "put" in late.log, []
    return began


for node in (runs.decoded, runs.encoded):
    made, needed, size = [], 0, 1 << 40
    for _ in range(2):
        # ComfyUI's own figure is for its own encode, all frames at once.
        wide.memory_used_encode = lambda *_, needed=needed: needed
        management.unload_all_models()
        with sized(size):
            made.append((node(wide), bool(wide.patcher.model.model_lowvram), overlaps()))
        needed = card.peak - wide.patcher.model_size()
        size = card.peak - wide.patcher.model_size() // 2
    (whole, *fully), (partly, *lowvram) = made
    assert (torch.equal(whole, partly), fully, lowvram) == (True, [False, True], [True, False]), node

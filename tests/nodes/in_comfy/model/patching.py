"""The patch stays on its clone, refuses what it would drop, and a run gives its memory back."""

import comfyui
import torch
from comfyui import comfy

patch, chunk_sampler = comfyui.module("nodes.model.patch"), comfyui.module("nodes.sampling.chunk_sampler")
schedules = comfyui.module("lightforcing_core.rollout.schedule")
WrappersMP = comfy.patcher_extension.WrappersMP
SHAPE = (1, 16, 6, 8, 12)
settings = comfyui.settings_of("unknown")
stock = comfyui.load("tiny_wan.safetensors")
noise = comfyui.noise_of(SHAPE)
euler = comfy.samplers.sampler_object("euler")


def ours(*observers, **options):
    return comfyui.chunk_sampler(SHAPE[2], *observers, keep_finished=False, **options)


# The stock model before, between and after runs of the patched clone; the clone under a stock sampler.
before = comfyui.sample(stock, euler, noise)
model = patch.patched(stock, settings)
first = comfyui.sample(model, ours(), noise)
assert torch.equal(before, comfyui.sample(stock, euler, noise))
assert torch.equal(first, comfyui.sample(model, ours(), noise))
shifted = stock.clone()
shifted.add_object_patch("model_sampling", model.get_model_object("model_sampling"))
assert torch.equal(comfyui.sample(shifted, euler, noise), comfyui.sample(model, euler, noise))
assert [one.get_model_object("model_sampling").shift for one in (stock, model)] == [8.0, 5.0]
assert patch.settings_of(model.clone().clone()) == settings
assert len(patch.patched(model, settings).get_all_wrappers(WrappersMP.DIFFUSION_MODEL)) == 1

# A wrapper around the whole model, such as a timer or torch.compile's, still runs: chunks x (steps + clean), less one.
calls = []


def count(executor, *args, **kwargs):
    calls.append(None)
    return executor(*args, **kwargs)


counted = model.clone()
counted.add_wrapper(WrappersMP.APPLY_MODEL, count)
assert torch.equal(first, comfyui.sample(counted, ours(), noise))
assert len(calls) == 2 * 4 + 1

# Four given chunks and one new: all of them, or the sink's, the last and the one that is partly visible.
for replay, forwards in (("all", 4 + 4), ("window", 3 + 4)):
    calls.clear()
    plan = schedules.Schedule(15, 3, window=6, sink_frames=1)
    given = comfyui.noise_of((1, 16, 12, 8, 12))
    sampler = chunk_sampler.ChunkSampler(chunk_sampler.Request(plan, {"samples": given}, replay=replay))
    comfyui.sample(counted, sampler, comfyui.noise_of((1, 16, 15, 8, 12)))
    assert len(calls) == forwards, replay

# Patches beyond those of ComfyUI's own nodes, each refused by its name; when applied, and when they come later.
conflicts = {
    "optimized_attention_override": lambda m: m.model_options["transformer_options"].update(
        optimized_attention_override=count
    ),
    "double_block": lambda m: m.set_model_patch_replace(count, "dit", "double_block", 1),
    "diffusion_model.forward": lambda m: m.add_object_patch("diffusion_model.forward", count),
    "diffusion_model.blocks.0.self_attn.forward": lambda m: m.add_object_patch(
        "diffusion_model.blocks.0.self_attn.forward", count
    ),
}
for name, add in conflicts.items():
    m = stock.clone()
    add(m)
    assert name in comfyui.error_of(patch.patched, m, settings)
    m = model.clone()
    add(m)
    assert name in comfyui.error_of(comfyui.sample, m, ours(), noise)


# Guidance whose second run of the model cannot be read from its code.
def again(args):
    names = ("model", "conds", "input", "sigma", "model_options")
    return comfy.samplers.calc_cond_batch(*(args[name] for name in names))


m = model.clone()
m.set_model_sampler_pre_cfg_function(lambda args: again(args))
refusal = comfyui.error_of(comfyui.sample, m, ours(), noise)
assert "twice in one step" in refusal
assert refusal.endswith("one of: <lambda>")


def twice(apply, args):
    return [apply(args["input"], args["timestep"], **args["c"]) for _ in range(2)][1]


m = model.clone()
m.set_model_unet_function_wrapper(twice)
assert comfyui.error_of(comfyui.sample, m, ours(), noise).endswith("one of: twice")

# Memory of a run is gone after success, an error and an interrupt; the cache alone would be this large.
cache = 2 * 2 * SHAPE[2] * 24 * 2 * 128 * 4  # keys and values of 2 layers with 2 heads, float32
comfyui.sample(model, ours(), noise)
start = comfyui.tensor_bytes()
comfyui.sample(model, ours(), noise)
assert comfyui.tensor_bytes() == start


class Fails(chunk_sampler.Observer):
    def chunk(self, chunk, *, is_last):
        raise RuntimeError("no more")


def interrupt(step, x0, x, total):
    assert (tuple(x0.shape), tuple(x.shape), total) == (SHAPE, SHAPE, 2 * 4)  # the whole video in one shape
    if step == 2:
        comfy.model_management.interrupt_current_processing(True)


Interrupted = comfy.model_management.InterruptProcessingException
for kind, observers, callback in ((RuntimeError, [Fails()], None), (Interrupted, [], interrupt)):
    held = None
    try:
        comfyui.sample(model, ours(*observers), noise, callback=callback)
    except kind as error:
        held = error  # as a server holds the exception while it reports it
    assert held is not None
    assert comfyui.tensor_bytes() - start < cache, kind
    held = None
    assert comfyui.tensor_bytes() == start, kind
assert torch.equal(first, comfyui.sample(model, ours(), noise))

# The memory request: what reaches ComfyUI's estimate is one chunk of activations or decode, and the whole cache.
spied = []
real = comfy.sampler_helpers.estimate_memory
comfy.sampler_helpers.estimate_memory = lambda m, shape, conds: spied.append(shape) or real(m, shape, conds)
vae = comfy.sd.VAE(sd=comfyui.module("lightforcing_core.vae.wan_vae").random_vae_state_dict(dim=8))
decoder = comfyui.module("nodes.vae.decode").FrameDecoder(vae, SHAPE)
comfyui.sample(model, ours(decoder=decoder), noise)
chunk = stock.model.memory_required([1, 16, 3, 8, 12])
asked, one_frame = (stock.model.memory_required(shape) for shape in (spied[-1], [1, 16, 1, 8, 12]))
decode = decoder.bytes_of(1)
needed = max(chunk, decode["decode"]) + decode["history"] + cache
assert needed <= asked < needed + 0.1 * cache + one_frame

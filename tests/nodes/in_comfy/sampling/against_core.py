"""With nothing skipped and the same noise, a run equals ComfyUI core's own sampler, or the library's own rollout."""

import comfyui
import torch
from comfy_extras import nodes_ar_video

patch, chunk_sampler = comfyui.module("nodes.model.patch"), comfyui.module("nodes.sampling.chunk_sampler")
recipe, schedules = comfyui.modules("lightforcing_core.rollout", "recipe", "schedule")
SEED, SHAPE, WITH_IMAGE = 7, (1, 16, 6, 8, 12), (1, 16, 7, 8, 12)


def noise_as_in_core(given_chunks):
    """Draw noise after each step as core does: from its global seed per block that it generates."""

    def draw(chunk_index, number, shape):
        generator = torch.Generator().manual_seed(SEED + (chunk_index - given_chunks) * 1000 + number - 1)
        return torch.randn(shape, generator=generator)

    recipe.Recipe.noise = lambda _: draw


settings = comfyui.settings_of("unknown")
noise = comfyui.noise_of(SHAPE, seed=1)
causal, plain = comfyui.load("tiny_causal.safetensors"), comfyui.load("tiny_wan.safetensors")
noise_as_in_core(0)
for frames_per_chunk in (3, 1, 4):
    core = comfyui.comfy.samplers.ksampler("ar_video", {"num_frame_per_block": frames_per_chunk})
    expected = comfyui.sample(causal, core, noise, seed=SEED)
    assert expected.std() > 0.1
    for model in (causal, plain):
        schedule = schedules.Schedule(SHAPE[2], frames_per_chunk)
        ours = chunk_sampler.ChunkSampler(chunk_sampler.Request(schedule))
        actual = comfyui.sample(patch.patched(model, settings), ours, noise, seed=SEED)
        assert (actual - expected).abs().max() <= 1e-5, frames_per_chunk

# Image to video: the start image that ARVideoI2V sets, before and after Apply.
vae, image = comfyui.small_vae(), torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(3))


def animated(model):
    return nodes_ar_video.ARVideoI2V.execute(model, vae, image, 96, 64, 25, 1)[0]


noise_as_in_core(1)
noise = comfyui.noise_of(WITH_IMAGE, seed=1)
for frames_per_chunk in (3, 1):
    core = comfyui.comfy.samplers.ksampler("ar_video", {"num_frame_per_block": frames_per_chunk})
    expected = comfyui.sample(animated(causal), core, noise, seed=SEED)
    schedule = schedules.Schedule(WITH_IMAGE[2], frames_per_chunk)
    places = {"before": patch.patched(animated(causal), settings), "after": animated(patch.patched(plain, settings))}
    for place, model in places.items():
        ours = chunk_sampler.ChunkSampler(chunk_sampler.Request(schedule))
        actual = comfyui.sample(model, ours, noise, seed=SEED)
        assert (actual - expected).abs().max() <= 1e-5, (frames_per_chunk, place)

# Chunks that are denoised at once, whose frames differ in noise: with guidance, a batch and an image at the start.
loop, runtimes, states = comfyui.modules("lightforcing_core.rollout", "loop", "runtime", "state")
noise, start = comfyui.noise_of((2, 16, 22, 8, 12), seed=2), comfyui.noise_of((1, 16, 1, 8, 12), seed=5)
model = patch.patched(plain, comfyui.settings_of("rolling_forcing", policy="rolling_forcing"))
sigmas = comfyui.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 3)
guider = comfyui.comfy.samplers.CFGGuider(model)
prompts = {"positive": comfyui.prompt(), "negative": comfyui.prompt(tokens=5)}
guider.inner_set_conds(prompts)
guider.set_cfg(2.0)
request = chunk_sampler.Request(schedules.Schedule(22, 3, 13, 3, "follow"), start_latent={"samples": start})
made = []


class Seen(chunk_sampler.Observer):
    """Keeps the state after every chunk."""

    def begin(self, run, plan):
        made.append(run)

    def chunk(self, chunk, *, is_last):
        made.append(made[-1].extended_by(chunk))


def sampled(sampler):
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=SEED)


ours = chunk_sampler.ChunkSampler(request, [Seen()])
actual = sampled(ours)
begun = states.load_run_state(states.save_run_state(made[4], comfyui.BASE + "/begun.safetensors"))
assert begun.finished_frames == 13
assert (sampled(chunk_sampler.ChunkSampler(request, saved=begun)) == actual).all()
guider.conds = {name: [{"cross_attn": texts[0][0]}] for name, texts in prompts.items()}
recipe_of_run = request.recipe(guider, patch.settings_of(model), sigmas.tolist(), noise.shape, SEED)
fresh, first = recipe_of_run.noise(), [0, *range(1, 22, 3)]


def draw(chunk_index, number, shape):
    start = first[chunk_index]
    return fresh(chunk_index, number, shape) if number else noise[:, :, start : start + 3]


chunks = loop.rollout(model.model.diffusion_model, recipe_of_run, runtimes.Runtime(device="cpu", noise=draw))
expected = model.model.process_latent_out(torch.cat([chunk.latents for chunk in chunks], dim=2))
assert expected.std() > 0.1
assert (actual[:, :, 1:] - expected).abs().max() <= 1e-4
assert "rolling_forcing (published)" in ours.record.facts["policy"]

"""Small API prompts for the tests, built from plain functions: one node each, or a whole run."""

import itertools

import torch
from safetensors.torch import load_file, save_file

WIDTH, HEIGHT, LENGTH = 96, 64, 21
EMBEDS, OTHER_EMBEDS = "panda.safetensors", "rain.safetensors"
CAPTION = "on a plain background a red circle moves right slowly"
RUNS = itertools.count()  # a server that has every node cached lists no files: each prompt saves under its own name


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def link(source, slot=0):
    return [source, slot]


def loader(**inputs):
    defaults = {"model_name": "tiny_wan.safetensors", "weight_dtype": "default", "weights": "auto", "lora_name": "none"}
    return node("LightForcingModelLoader", **{**defaults, **options(), **inputs})


def options(**inputs):
    frames = {"keep_frames": -1, "keep_sink": -1, "keep_near": -1}
    return {"family": "auto", "backend": "auto", "block": "64", **frames, **inputs}


def core_loader(name, weight_dtype="default"):
    return node("UNETLoader", unet_name=name, weight_dtype=weight_dtype)


def lora(model, strength=1.0):
    return node("LoraLoaderModelOnly", model=model, lora_name="tiny_lora.safetensors", strength_model=strength)


def apply(model, **inputs):
    return node("LightForcingApply", model=model, **options(**inputs))


def empty(length=LENGTH, width=WIDTH, height=HEIGHT, batch_size=1):
    return node("EmptyARVideoLatent", width=width, height=height, length=length, batch_size=batch_size)


def save_images(images):
    return node("SaveImage", images=images, filename_prefix=f"frames{next(RUNS)}")


def save_latents(samples, prefix):
    return node("SaveLatent", samples=samples, filename_prefix=prefix)


def schedule(length=LENGTH, preset="custom", **inputs):
    chunks = {"frames_per_chunk": 3, "window": 0, "sink_frames": 0, "sink_rope": "fixed"}
    growth = {"target": 0.6, "base": 0.7, "curve": "inverse_sqrt", "dense_chunks": 1}
    custom = {**chunks, **growth, **inputs} if preset == "custom" else {}
    dotted = {f"preset.{name}": value for name, value in custom.items()}
    return node("LightForcingSchedule", length=length, preset=preset, **dotted)


def text(name=EMBEDS):
    return node("LightForcingLoadTextEmbeds", name=name)


def change(start, switch="hard", blend_chunks=2, positive="other", before=None):
    chained = {"timeline": link(before)} if before else {}
    own = {"start": start, "switch": switch, "blend_chunks": blend_chunks}
    return node("LightForcingPromptTimeline", positive=link(positive), **own, **chained)


def save_state(name="run"):
    return node("LightForcingSaveState", name=name)


def load_state(file):
    return node("LightForcingLoadState", file=file)


def video_output(prefix, **inputs):
    defaults = {"format": "mp4", "crf": -1, "fps": 16.0, "keep_images": False}
    return node("LightForcingVideoOutput", filename_prefix=prefix, **{**defaults, **inputs})


def latents_of(server, prompt):
    return saved_latents(server, server.run(prompt))


def saved_latents(server, entry):
    (path,) = [path for path in server.files(entry) if path.suffix == ".latent"]
    return load_file(path)["latent_tensor"]


def load_latent(name):
    return node("LoadLatent", latent=name)


def save_latent(models, name, latents):
    """A file in the server's input folder, for `load_latent`."""
    save_file({"latent_tensor": latents, "latent_format_version_0": torch.zeros(0)}, models / "input" / name)


def vae_loader(name="tiny_lightvae.safetensors"):
    return node("VAELoader", vae_name=name)


def encoded(kind="VAEEncode", **inputs):
    """A node that encodes the picture of node "image" with "vae"."""
    return node(kind, pixels=link("image"), vae=link("vae"), **inputs)


def image_to_video(length):
    """ComfyUI's node that gives a MODEL a start image, from nodes "unet", "vae" and "image"."""
    sources = {"model": link("unet"), "vae": link("vae"), "start_image": link("image")}
    return node("ARVideoI2V", width=WIDTH, height=HEIGHT, length=length, batch_size=1, **sources)


def empty_image(color=0):
    return node("EmptyImage", width=WIDTH, height=HEIGHT, batch_size=1, color=color)


def graph(models, *, latent=None, vae=False, seed=3, **sampler):
    """A prompt whose `models` end in node "model"; the sampler's latent is saved, its frames too with a VAE."""
    inputs = {"model": link("model"), "positive": link("text"), "latent": link("latent"), "seed": seed, "steps": 4}
    prompt = {
        **models,
        "text": text(),
        "latent": latent or empty(),
        "sampler": node("LightForcingSampler", **inputs, **sampler),
        "save": save_latents(link("sampler"), f"latents/run{next(RUNS)}"),
    }
    if vae:
        prompt["vae"] = vae_loader()
        prompt["sampler"]["inputs"]["vae"] = link("vae")
        prompt["images"] = save_images(link("sampler", 1))
    return prompt


def demo_graph(caption=CAPTION, **inputs):
    """A whole run of the demo model, its frames saved."""
    models = {"model": loader(model_name="light_forcing_demo.safetensors", block="16")}
    prompt = graph(models, latent=empty(length=33, width=48, height=32), vae=True, **inputs)
    prompt["vae"] = vae_loader("light_forcing_demo_vae.safetensors")
    return prompt | {"text": node("LightForcingDemoPrompt", caption=caption)}


def custom_graph(models, **select):
    """The same through SamplerCustomAdvanced; `select` are inputs of Sampler Select."""
    parts = {name: link(name) for name in ("noise", "guider", "sigmas")}
    return graph(models) | {
        "noise": node("RandomNoise", noise_seed=3),
        "guider": node("BasicGuider", model=link("model"), conditioning=link("text")),
        "select": node("LightForcingSamplerSelect", **select),
        "sigmas": node("BasicScheduler", model=link("model"), scheduler="simple", steps=4, denoise=1.0),
        "sampler": node("SamplerCustomAdvanced", sampler=link("select"), latent_image=link("latent"), **parts),
    }

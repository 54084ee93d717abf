"""Small API prompts for the tests, built from plain functions: one node each, or a whole run."""

import itertools

import torch
from safetensors.torch import load_file, save_file

WIDTH, HEIGHT, LENGTH = 96, 64, 21
EMBEDS, OTHER_EMBEDS = "panda.safetensors", "rain.safetensors"
RUNS = itertools.count()  # a server that has every node cached lists no files: each prompt saves under its own name


def link(node, slot=0):
    return [node, slot]


def loader(**inputs):
    defaults = {
        "model_name": "tiny_wan.safetensors",
        "weight_dtype": "default",
        "weights": "auto",
        "lora_name": "none",
        **options(),
    }
    return {"class_type": "LightForcingModelLoader", "inputs": {**defaults, **inputs}}


def options(**inputs):
    frames = {"keep_frames": -1, "keep_sink": -1, "keep_near": -1}
    return {"family": "auto", "backend": "auto", "block": "64", **frames, **inputs}


def core_loader(name, weight_dtype="default"):
    return {"class_type": "UNETLoader", "inputs": {"unet_name": name, "weight_dtype": weight_dtype}}


def apply(model, **inputs):
    return {"class_type": "LightForcingApply", "inputs": {"model": model, **options(**inputs)}}


def empty(length=LENGTH, width=WIDTH, height=HEIGHT, batch_size=1):
    inputs = {"width": width, "height": height, "length": length, "batch_size": batch_size}
    return {"class_type": "EmptyARVideoLatent", "inputs": inputs}


def save_images(images):
    return {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": f"frames{next(RUNS)}"}}


def schedule(length=LENGTH, preset="custom", model=None, **inputs):
    custom = {
        "frames_per_chunk": 3,
        "window": 0,
        "sink_frames": 0,
        "sink_rope": "fixed",
        "target": 0.6,
        "base": 0.7,
        "curve": "inverse_sqrt",
        "dense_chunks": 1,
    }
    dotted = {f"preset.{name}": value for name, value in {**custom, **inputs}.items()} if preset == "custom" else {}
    connected = {"model": model} if model else {}
    return {"class_type": "LightForcingSchedule", "inputs": {"length": length, "preset": preset, **dotted, **connected}}


def text(name=EMBEDS):
    return {"class_type": "LightForcingLoadTextEmbeds", "inputs": {"name": name}}


def change(start, switch="hard", blend_chunks=2, positive="other", before=None):
    inputs = {"positive": link(positive), "start": start, "switch": switch, "blend_chunks": blend_chunks}
    chained = {"timeline": link(before)} if before else {}
    return {"class_type": "LightForcingPromptTimeline", "inputs": {**inputs, **chained}}


def save_state(name="run"):
    return {"class_type": "LightForcingSaveState", "inputs": {"name": name}}


def load_state(file):
    return {"class_type": "LightForcingLoadState", "inputs": {"file": file}}


def video_output(prefix, **inputs):
    defaults = {"format": "mp4", "crf": -1, "fps": 16.0, "keep_images": False}
    return {"class_type": "LightForcingVideoOutput", "inputs": {"filename_prefix": prefix, **defaults, **inputs}}


def latents_of(server, prompt):
    return saved_latents(server, server.run(prompt))


def saved_latents(server, entry):
    (path,) = [path for path in server.files(entry) if path.suffix == ".latent"]
    return load_file(path)["latent_tensor"]


def load_latent(name):
    return {"class_type": "LoadLatent", "inputs": {"latent": name}}


def save_latent(models, name, latents):
    """A file in the server's input folder, for `load_latent`."""
    save_file({"latent_tensor": latents, "latent_format_version_0": torch.zeros(0)}, models / "input" / name)


def vae_loader(name="tiny_lightvae.safetensors"):
    return {"class_type": "VAELoader", "inputs": {"vae_name": name}}


def image_to_video(size, length):
    """ComfyUI's node that gives a MODEL a start image, from nodes "unet", "vae" and "image"."""
    inputs = {name: link(source) for name, source in (("model", "unet"), ("vae", "vae"), ("start_image", "image"))}
    size = {"width": size[0], "height": size[1], "length": length, "batch_size": 1}
    return {"class_type": "ARVideoI2V", "inputs": {**inputs, **size}}


def empty_image(color=0):
    inputs = {"width": WIDTH, "height": HEIGHT, "batch_size": 1, "color": color}
    return {"class_type": "EmptyImage", "inputs": inputs}


def graph(models, *, latent=None, vae=False, seed=3, **sampler):
    """A prompt whose `models` end in node "model"; the sampler's latent is saved, its frames too with a VAE."""
    prompt = {
        **models,
        "text": text(),
        "latent": latent or empty(),
        "sampler": {
            "class_type": "LightForcingSampler",
            "inputs": {
                "model": link("model"),
                "positive": link("text"),
                "latent": link("latent"),
                "seed": seed,
                "steps": 4,
                **sampler,
            },
        },
        "save": {
            "class_type": "SaveLatent",
            "inputs": {"samples": link("sampler"), "filename_prefix": f"latents/run{next(RUNS)}"},
        },
    }
    if vae:
        prompt["vae"] = vae_loader()
        prompt["sampler"]["inputs"]["vae"] = link("vae")
        prompt["images"] = save_images(link("sampler", 1))
    return prompt


CAPTION = "on a plain background a red circle moves right slowly"


def demo_graph(caption=CAPTION, **inputs):
    """A whole run of the demo model, its frames saved."""
    models = {"model": loader(model_name="light_forcing_demo.safetensors", block="16")}
    prompt = graph(models, latent=empty(length=33, width=48, height=32), vae=True, **inputs)
    prompt["vae"] = vae_loader("light_forcing_demo_vae.safetensors")
    return prompt | {"text": {"class_type": "LightForcingDemoPrompt", "inputs": {"caption": caption}}}


def custom_graph(models, **select):
    """The same through SamplerCustomAdvanced; `select` are inputs of Sampler Select."""
    prompt = graph(models)
    prompt["noise"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}}
    prompt["guider"] = {
        "class_type": "BasicGuider",
        "inputs": {"model": link("model"), "conditioning": link("text")},
    }
    prompt["select"] = {"class_type": "LightForcingSamplerSelect", "inputs": select}
    levels = {"model": link("model"), "scheduler": "simple", "steps": 4, "denoise": 1.0}
    prompt["sigmas"] = {"class_type": "BasicScheduler", "inputs": levels}
    inputs = {name: link(name) for name in ("noise", "guider", "sigmas")}
    inputs |= {"sampler": link("select"), "latent_image": link("latent")}
    prompt["sampler"] = {"class_type": "SamplerCustomAdvanced", "inputs": inputs}
    return prompt

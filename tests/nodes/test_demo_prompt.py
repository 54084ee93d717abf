"""The demo model in ComfyUI: captions become prompts, wrong ones are refused early, its files need no download."""

import pytest
import torch

from ..support.comfy_server import Failed, Refused
from ..support.graphs import empty, graph, latents_of, link, loader, save_images

CAPTION = "on a plain background a red circle moves right slowly"


def demo_prompt(caption=CAPTION):
    return {"class_type": "LightForcingDemoPrompt", "inputs": {"caption": caption}}


def run_of(caption=CAPTION, **inputs):
    """A whole run of the demo model, its frames saved."""
    models = {"model": loader(model_name="light_forcing_demo.safetensors", block="16")}
    prompt = graph(models, latent=empty(length=33, width=48, height=32), **inputs)
    prompt["text"] = demo_prompt(caption)
    prompt["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": "light_forcing_demo_vae.safetensors"}}
    prompt["sampler"]["inputs"]["vae"] = link("vae")
    prompt["images"] = save_images(link("sampler", 1))
    return prompt


def test_caption_makes_a_video_and_another_caption_another(server):
    entry = server.run(run_of())
    assert len([path for path in server.files(entry) if path.suffix == ".png"]) == 33
    captions = (CAPTION, "On a plain background, a red circle moves right slowly.", CAPTION.replace("red", "blue"))
    first, spelt_otherwise, other = (latents_of(server, run_of(caption)) for caption in captions)
    assert torch.equal(spelt_otherwise, first)
    assert not torch.allclose(other, first, atol=1e-3)


def test_caption_outside_the_grammar_is_refused_before_anything_runs(server):
    with pytest.raises(Refused) as refused:
        server.run(run_of("on a plain background a red cube moves right slowly"))
    assert "'cube'; use circle or square or triangle. Captions read like: " in str(refused.value)
    (error,) = refused.value.errors["node_errors"]["text"]["errors"]
    assert error["extra_info"]["input_name"] == "caption"


def test_demo_prompt_of_another_model_is_refused(server):
    prompt = run_of()
    prompt["model"]["inputs"]["model_name"] = "tiny_wan.safetensors"
    with pytest.raises(Failed, match="the positive prompt is 32 wide and the model takes 4096"):
        server.run(prompt)

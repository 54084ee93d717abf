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


@pytest.fixture(scope="module")
def facts(run_inside):
    return run_inside("demo_files")


def test_packs_own_files_are_in_the_loaders_lists_and_load(facts):
    """Without any in ComfyUI's folders: what a first start finds."""
    assert facts["listed"] == {"diffusion_models": True, "vae": True}
    assert facts["loaded"] == {"dit": ["WAN21_CausalAR", 32], "vae": "WanVAE", "ours": ["demo", 32]}
    assert facts["context"] == [[1, 18, 32], True]


def test_no_list_changes_where_the_pack_has_no_model(facts):
    assert facts["without files"] == facts["before"]
    assert "reinstall the pack" in facts["no table"]


def test_node_is_offered_only_where_its_model_is(facts):
    assert facts["node"] == [False, True]

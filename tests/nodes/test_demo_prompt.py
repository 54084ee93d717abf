"""The demo model in ComfyUI: captions become prompts, wrong ones are refused early, its files need no download."""

import pytest
import torch

from ..support.comfy_server import Failed, Refused
from ..support.graphs import CAPTION, demo_graph, latents_of


def test_caption_makes_a_video_and_another_caption_another(server):
    entry = server.run(demo_graph())
    assert len([path for path in server.files(entry) if path.suffix == ".png"]) == 33
    captions = (CAPTION, "On a plain background, a red circle moves right slowly.", CAPTION.replace("red", "blue"))
    first, spelt_otherwise, other = (latents_of(server, demo_graph(caption)) for caption in captions)
    assert torch.equal(spelt_otherwise, first)
    assert not torch.allclose(other, first, atol=1e-3)


def test_caption_outside_the_grammar_is_refused_before_anything_runs(server):
    with pytest.raises(Refused) as refused:
        server.run(demo_graph("on a plain background a red cube moves right slowly"))
    assert "'cube'; use circle or square or triangle. Captions read like: " in str(refused.value)
    (error,) = refused.value.errors["node_errors"]["text"]["errors"]
    assert error["extra_info"]["input_name"] == "caption"


def test_demo_prompt_of_another_model_is_refused(server):
    prompt = demo_graph()
    prompt["model"]["inputs"]["model_name"] = "tiny_wan.safetensors"
    with pytest.raises(Failed, match="the positive prompt is 32 wide and the model takes 4096"):
        server.run(prompt)

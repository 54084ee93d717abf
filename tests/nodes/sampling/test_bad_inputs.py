"""Bad input ends in one clear message that names the thing, the value and the way out, and nothing half-written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ...support.graphs import (
    EMBEDS,
    OTHER_EMBEDS,
    apply,
    change,
    core_loader,
    custom_graph,
    demo_graph,
    empty_image,
    graph,
    image_to_video,
    link,
    load_latent,
    loader,
    save_latent,
    schedule,
    text,
    vae_loader,
)


@pytest.fixture(scope="module")
def bad_files(models):
    """More broken and foreign files than `models` has."""
    folder = models / "models" / "diffusion_models"
    good = load_file(folder / "tiny_wan.safetensors")
    wide = {"patch_embedding.weight": torch.zeros(256, 48, 1, 2, 2)}
    wide |= {"head.head.weight": torch.zeros(192, 256), "head.head.bias": torch.zeros(192)}
    save_file({**good, **wide}, folder / "wan_ti2v_5b.safetensors")
    embeds = models / "models" / "text_embeds"
    cond = torch.zeros(1, 512, 4096)
    cond[:, 0] = 1.0
    metadata = {"format": "light_forcing_text_embeds", "entries": json.dumps([{}])}
    save_file({"0.cond": cond}, embeds / "empty.safetensors", metadata=metadata)
    save_file({"weight": torch.zeros(2)}, embeds / "foreign.safetensors")
    for name, value in (("nan", float("nan")), ("full", 1.0)):
        save_latent(models, f"{name}.latent", torch.full((1, 16, 6, 8, 12), value))


def with_schedule(length=21, models=None, **inputs):
    return {**graph(models or {"model": loader()}, schedule=link("plan")), "plan": schedule(length, **inputs)}


def through_apply(name):
    return graph({"unet": core_loader(name), "model": apply(link("unet"))})


def masked():
    prompt = graph({"model": loader()}, latent=None)
    prompt["empty"] = prompt["latent"]
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 96, "height": 64}}
    prompt["latent"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": link("empty"), "mask": link("mask")}}
    return prompt


def two_strengths():
    conds = {"cond1": link("text"), "cond2": link("text"), "negative": link("text")}
    inputs = {"model": link("model"), **conds, "cfg_conds": 3.0, "cfg_cond2_negative": 2.0, "style": "regular"}
    return custom_graph({"model": loader()}) | {"guider": {"class_type": "DualCFGGuider", "inputs": inputs}}


def partial_denoise():
    prompt = custom_graph({"model": loader()})
    prompt["sigmas"]["inputs"]["denoise"] = 0.5
    return prompt


def with_timeline(*starts):
    nodes, before = {"other": text(OTHER_EMBEDS)}, None
    for number, start in enumerate(starts):
        nodes[f"change {number}"] = change(start, before=before)
        before = f"change {number}"
    return {**graph({"model": loader()}, timeline=link(before)), **nodes}


def start_image_twice():
    start = {"class_type": "VAEEncode", "inputs": {"pixels": link("image"), "vae": link("vae")}}
    nodes = {"vae": vae_loader(), "image": empty_image(), "start": start, "unet": loader()}
    return graph({**nodes, "model": image_to_video((96, 64), 21)}, start_latent=link("start"))


def create_video():
    inputs = {"images": link("sampler", 1), "fps": 16.0}
    prompt = {**graph({"model": loader()}), "video": {"class_type": "CreateVideo", "inputs": inputs}}
    prompt["file"] = {
        "class_type": "SaveVideo",
        "inputs": {"video": link("video"), "filename_prefix": "a", "format": "auto", "codec": "auto"},
    }
    return prompt


def no_shift():
    inputs = {"model": link("unet"), "shift": 0.0}
    return graph({"unet": loader(), "model": {"class_type": "ModelSamplingSD3", "inputs": inputs}})


def demo_prompt():
    prompt = demo_graph()
    prompt["model"]["inputs"]["model_name"] = "tiny_wan.safetensors"
    return prompt


def saved_as(name):
    save = {"class_type": "LightForcingSaveTextEmbeds", "inputs": {"conditioning": link("text"), "name": name}}
    return {"text": text(EMBEDS), "save": save}


CASES = {
    "Wan I2V through Apply": (lambda: through_apply("wan_i2v.safetensors"), ["36 channels"]),
    "Wan 2.2 5B through Apply": (lambda: through_apply("wan_ti2v_5b.safetensors"), ["Wan 2.1 text-to-video"]),
    "unpatched model": (lambda: graph({"model": core_loader("tiny_wan.safetensors")}), ["Light Forcing Apply"]),
    "schedule for another length": (lambda: with_schedule(33), ["33 video frames", "21"]),
    "chunks of another kind of checkpoint": (
        lambda: with_schedule(models={"model": loader(family="causal_forcing_framewise")}),
        ["chunks of 3", "frame by frame", "unknown"],
    ),
    "backend that cannot run": (lambda: graph({"model": loader(backend="triton")}), ["triton"]),
    "backend without a tail": (lambda: graph({"model": loader(backend="flash4", tail="on")}), ["pooled tail"]),
    "empty prompt": (lambda: {**graph({"model": loader()}), "text": text("empty.safetensors")}, ["prompt is empty"]),
    "foreign embeddings": (lambda: {**graph({"model": loader()}), "text": text("foreign.safetensors")}, ["foreign"]),
    "NaN latent": (lambda: graph({"model": loader()}, latent=load_latent("nan.latent")), ["latent", "NaN"]),
    "NaN start": (
        lambda: {**graph({"model": loader()}, start_latent=link("start")), "start": load_latent("nan.latent")},
        ["start_latent", "NaN"],
    ),
    "latent that is not empty": (
        lambda: graph({"model": loader()}, latent=load_latent("full.latent")),
        ["not empty", "start_latent"],
    ),
    "end longer than a chunk": (
        lambda: {**graph({"model": loader()}, end_latent=link("end")), "end": load_latent("full.latent")},
        ["end_latent", "6 latent frames", "at most 2", "last 8 frames"],
    ),
    "noise mask": (masked, ["mask"]),
    "a guider with two strengths": (two_strengths, ["DualCFG", "CFGGuider"]),
    "two prompts on one chunk": (lambda: with_timeline(0.6, 0.8), ["0.8 s", "chunk 1 (0.56 to 1.31 s)", "0.6 s"]),
    "a prompt on the first chunk": (lambda: with_timeline(0.2), ["0.2 s", "chunk 0", "own prompt"]),
    "a prompt behind the end": (lambda: with_timeline(9.0), ["9 s", "end at 1.31 s", "earlier"]),
    "seed for a chunk that is not there": (
        lambda: graph({"model": loader()}, chunk_seeds="1: 5, 2: 7"),
        ["this video has chunks 0 to 1"],
    ),
    "demo prompt of another model": (demo_prompt, ["the positive prompt is 32 wide and the model takes 4096"]),
    "caption outside the grammar": (
        lambda: demo_graph("on a plain background a red cube moves right slowly"),
        ["'cube'; use circle or square or triangle. Captions read like: "],
    ),
    "two start images": (start_image_twice, ["start_latent", "ARVideoI2V"]),
    "frames without a VAE": (create_video, ["IMAGE", "CreateVideo", "vae"]),
    "a shift of 0": (no_shift, ["shift 0", "ModelSamplingSD3"]),
    "partial denoise": (partial_denoise, ["sigmas", "denoise 1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_message_names_the_thing_and_the_way_out(server, bad_files, case):
    build, expected = CASES[case]
    message = server.error_of(build())
    for part in expected:
        assert part in message, message
    assert len(message) < 600, message
    assert "Traceback" not in message


def test_nothing_half_written_stays(server, bad_files, models):
    assert "../../escape" in server.error_of(saved_as("../../escape"))
    assert not list(models.glob("**/*escape*"))
    assert not list((models / "models" / "text_embeds").rglob(".*"))

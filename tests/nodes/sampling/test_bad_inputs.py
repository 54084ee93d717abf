"""Bad input ends in one clear message that names the thing, the value and the way out, and nothing half-written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ...support.comfy_server import Failed, Refused
from ...support.graphs import (
    OTHER_EMBEDS,
    apply,
    change,
    core_loader,
    custom_graph,
    demo_graph,
    empty,
    empty_image,
    encoded,
    graph,
    image_to_video,
    link,
    load_latent,
    loader,
    node,
    save_latent,
    schedule,
    text,
    vae_loader,
    video_output,
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
    for name, value in (("nan", float("nan")), ("full", 1.0)):
        save_latent(models, f"{name}.latent", torch.full((1, 16, 6, 8, 12), value))


def through_apply(name):
    return graph({"unet": core_loader(name), "model": apply(link("unet"))})


def with_parts(models=None, build=graph, parts=(), **inputs):
    """A run of the usual model, with some nodes instead of others."""
    return build(models or {"model": loader()}, **inputs) | dict(parts)


def masked():
    mask = node("SolidMask", value=1.0, width=96, height=64)
    latent = node("SetLatentNoiseMask", samples=link("empty"), mask=link("mask"))
    return with_parts(parts={"empty": empty(), "mask": mask, "latent": latent})


def two_strengths():
    conds = {"cond1": link("text"), "cond2": link("text"), "negative": link("text")}
    strengths = {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0, "style": "regular"}
    guider = node("DualCFGGuider", model=link("model"), **conds, **strengths)
    return with_parts(build=custom_graph, parts={"guider": guider})


def partial_denoise():
    prompt = custom_graph({"model": loader()})
    prompt["sigmas"]["inputs"]["denoise"] = 0.5
    return prompt


def with_timeline(*starts):
    nodes, before = {"other": text(OTHER_EMBEDS)}, None
    for number, start in enumerate(starts):
        nodes[f"change {number}"] = change(start, before=before)
        before = f"change {number}"
    return with_parts(parts=nodes, timeline=link(before))


def start_image_twice():
    nodes = {"vae": vae_loader(), "image": empty_image(), "start": encoded(), "unet": loader()}
    return with_parts({**nodes, "model": image_to_video(21)}, start_latent=link("start"))


def create_video():
    video = node("CreateVideo", images=link("sampler", 1), fps=16.0)
    file = node("SaveVideo", video=link("video"), filename_prefix="a", format="auto", codec="auto")
    return with_parts(parts={"video": video, "file": file})


def demo_prompt():
    prompt = demo_graph()
    prompt["model"]["inputs"]["model_name"] = "tiny_wan.safetensors"
    return prompt


CASES = {
    "Wan I2V through Apply": (lambda: through_apply("wan_i2v.safetensors"), ["36 channels"]),
    "Wan 2.2 5B through Apply": (lambda: through_apply("wan_ti2v_5b.safetensors"), ["Wan 2.1 text-to-video"]),
    "unpatched model": (lambda: graph({"model": core_loader("tiny_wan.safetensors")}), ["Light Forcing Apply"]),
    "sparsity of a chunk that the video lacks": (
        lambda: with_parts(schedule=link("plan"), parts={"plan": schedule(33, sparsity="2: 0.5")}),
        ["names chunk 2", "chunks 0 to 1"],
    ),
    "chunks of another kind of checkpoint": (
        lambda: with_parts(
            {"model": loader(family="causal_forcing_framewise")}, schedule=link("plan"), parts={"plan": schedule()}
        ),
        ["chunks of 3", "frame by frame", "unknown"],
    ),
    "backend that cannot run": (lambda: graph({"model": loader(backend="triton")}), ["triton"]),
    "backend without a tail": (lambda: graph({"model": loader(backend="flash4", tail="on")}), ["pooled tail"]),
    "empty prompt": (lambda: with_parts(parts={"text": text("empty.safetensors")}), ["prompt is empty"]),
    "NaN latent": (lambda: graph({"model": loader()}, latent=load_latent("nan.latent")), ["latent", "NaN"]),
    "NaN start": (
        lambda: with_parts(start_latent=link("start"), parts={"start": load_latent("nan.latent")}),
        ["start_latent", "NaN"],
    ),
    "latent that is not empty": (
        lambda: graph({"model": loader()}, latent=load_latent("full.latent")),
        ["not empty", "start_latent"],
    ),
    "end longer than a chunk": (
        lambda: with_parts(end_latent=link("end"), parts={"end": load_latent("full.latent")}),
        ["end_latent", "6 latent frames", "at most 2", "last 8 frames"],
    ),
    "an end of chunks denoised at once": (
        lambda: with_parts(
            {"model": loader(family="rolling_forcing")},
            end_latent=link("end"),
            parts={"end": load_latent("full.latent")},
        ),
        ["end_latent", "rolling_forcing", "leave it out"],
    ),
    "two prompts for chunks denoised at once": (
        lambda: with_timeline(0.6) | {"model": loader(family="rolling_forcing")},
        ["the positive prompt changes", "rolling_forcing denoises 4 chunks at once", "use one prompt"],
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
    "caption that the model cannot draw": (
        lambda: demo_graph("on a striped background a red circle moves right slowly"),
        ["one thing on a plain background", "Captions read like: on a plain background"],
    ),
    "two start images": (start_image_twice, ["start_latent", "ARVideoI2V"]),
    "a shift of 0": (
        lambda: graph({"unet": loader(), "model": node("ModelSamplingSD3", model=link("unet"), shift=0.0)}),
        ["shift 0", "ModelSamplingSD3"],
    ),
    "roles that are no JSON": (
        lambda: graph({"model": loader(policy="forcing_kv", **{"policy.roles": "heads"})}),
        ["the roles are no JSON", "static_head"],
    ),
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


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"policy": "magic"}, "magic"),
        ({"policy": "mass", "policy.top_p": 1.0}, "Value 1.0 bigger than max of 0.99"),
        ({"policy": "vmoba", "policy.share": 0.0}, "Value 0.0 smaller than min of 0.01"),
        ({"policy": "sta", "policy.rows": 0}, "Value 0 smaller than min of 1"),
    ],
)
@pytest.mark.parametrize("place", ["loader", "apply"])
def test_a_policy_is_refused_when_the_graph_is_queued(server, place, chosen, expected):
    places = {"loader": loader(), "apply": apply(link("unet"))}
    prompt = graph({"unet": core_loader("tiny_wan.safetensors"), "model": places[place]})
    prompt["model"]["inputs"] |= chosen
    with pytest.raises(Refused) as refused:
        server.run(prompt)
    assert expected in str(refused.value.errors), refused.value.errors


def linked_keep_images():
    """A graph whose keep_images only a run knows."""
    parts = {"off": node("PrimitiveBoolean", value=False), "out": video_output("a", keep_images=link("off"))}
    return graph({"model": loader(), **parts}, vae=True, video_output=link("out"))


NOT_KEPT = "IMAGE is connected to SaveImage, but keep_images of Light Forcing Video Output is off; turn it on"


@pytest.mark.parametrize(
    ("build", "expected", "error"),
    [
        (create_video, "IMAGE is connected to CreateVideo, but vae to nothing; connect Load VAE", Refused),
        (
            lambda: graph({"model": loader(), "out": video_output("a")}, vae=True, video_output=link("out")),
            NOT_KEPT,
            Refused,
        ),
        (linked_keep_images, NOT_KEPT, Failed),
    ],
)
def test_a_use_of_images_that_will_not_be_is_refused_when_the_graph_is_queued(server, build, expected, error):
    with pytest.raises(error, match=expected):
        server.run(build())


def test_nothing_half_written_stays(server, bad_files, models):
    save = node("LightForcingSaveTextEmbeds", conditioning=link("text"), name="../../escape")
    assert "../../escape" in server.error_of({"text": text(), "save": save})
    assert not list(models.glob("**/*escape*"))
    assert not list((models / "models" / "text_embeds").rglob(".*"))

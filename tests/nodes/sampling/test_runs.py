"""Runs in a real server: every way to a MODEL, every way to sample, and what a cancelled run leaves."""

import time

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from ...support.comfy_server import Interrupted
from ...support.graphs import (
    HEIGHT,
    LENGTH,
    WIDTH,
    apply,
    core_loader,
    custom_graph,
    empty,
    graph,
    latents_of,
    link,
    loader,
    save_images,
    schedule,
)


def test_every_way_to_the_same_model_gives_the_same_video(server):
    ours = latents_of(server, graph({"model": loader()}))
    assert ours.shape == (1, 16, 6, HEIGHT // 8, WIDTH // 8)
    assert ours.isfinite().all()
    assert ours.std() > 0.1
    ways = {
        "plain Wan through Apply": {"unet": core_loader("tiny_wan.safetensors"), "model": apply(link("unet"))},
        "core's causal model": {"unet": core_loader("tiny_causal.safetensors"), "model": apply(link("unet"))},
        "a training file, its EMA": {"model": loader(model_name="self_forcing_dmd.pt")},
    }
    for name, models in ways.items():
        assert (latents_of(server, graph(models)) - ours).abs().max() <= 1e-4, name
    plain = latents_of(server, graph({"model": loader(model_name="self_forcing_dmd.pt", weights="plain")}))
    assert (plain - ours).abs().max() > 0.1


def test_lora_changes_the_video_the_same_through_node_and_loader(server):
    without = latents_of(server, graph({"model": loader()}))
    inputs = {"lora_name": "tiny_lora.safetensors", "model": link("unet"), "strength_model": 1.0}
    lora = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    behind = latents_of(server, graph({"unet": loader(), "model": lora}))
    stock = {"unet": core_loader("tiny_wan.safetensors"), "lora": lora, "model": apply(link("lora"))}
    before = latents_of(server, graph(stock))
    merged = latents_of(server, graph({"model": loader(lora_name="tiny_lora.safetensors")}))
    assert (behind - without).abs().max() > 0.05
    assert (behind - before).abs().max() <= 1e-5
    assert (behind - merged).abs().max() <= 1e-2


def test_batch_of_two_holds_two_videos(server):
    prompt = graph({"model": loader()}, latent=empty(batch_size=2), vae=True)
    entry = server.run(prompt)
    latents = load_file(next(path for path in server.files(entry) if path.suffix == ".latent"))["latent_tensor"]
    assert latents.shape[0] == 2
    assert (latents[0] - latents[1]).abs().max() > 0.1
    assert len([path for path in server.files(entry) if path.suffix == ".png"]) == 2 * LENGTH


def test_frames_decoded_while_sampling_equal_those_decoded_later(server):
    prompt = graph({"model": loader()}, vae=True)
    decode = {"samples": link("sampler"), "vae": link("vae")}
    prompt["ours"] = {"class_type": "LightForcingDecode", "inputs": decode}
    prompt["core"] = {"class_type": "VAEDecode", "inputs": decode}
    prompt["images ours"], prompt["images core"] = save_images(link("ours")), save_images(link("core"))
    entry = server.run(prompt)
    frames = {}
    for node in ("images", "images ours", "images core"):
        saved = entry["outputs"][node]["images"]
        paths = [server.base / "output" / item["subfolder"] / item["filename"] for item in saved]
        frames[node] = np.stack([np.asarray(Image.open(path), dtype=np.int16) for path in paths])
    assert frames["images"].shape == (LENGTH, HEIGHT, WIDTH, 3)
    assert frames["images"].std() > 1
    assert abs(frames["images"] - frames["images ours"]).max() <= 1
    assert abs(frames["images"] - frames["images core"]).max() <= 1


def test_sampler_select_runs_in_the_custom_sampler(server):
    prompt = custom_graph({"model": loader()}, schedule=link("schedule"))
    prompt["schedule"] = schedule(window=6, sink_frames=1, sink_rope="follow")
    save = {"samples": link("sampler", 1), "filename_prefix": "latents/denoised"}
    prompt["save denoised"] = {"class_type": "SaveLatent", "inputs": save}
    latents = [path for path in server.files(server.run(prompt)) if path.suffix == ".latent"]
    saved, denoised = (load_file(path)["latent_tensor"] for path in latents)
    assert saved.shape == (1, 16, 6, HEIGHT // 8, WIDTH // 8)
    assert (saved - denoised).abs().max() <= 1e-4


def test_continuing_from_the_first_half_equals_the_whole(server, models):
    whole = latents_of(
        server, graph({"model": loader()}, latent=empty(33), schedule=link("plan")) | {"plan": schedule(33)}
    )
    half = whole[:, :, :3].clone()
    save_file({"latent_tensor": half, "latent_format_version_0": half.new_zeros(0)}, models / "input" / "half.latent")
    prompt = graph({"model": loader()}, latent=empty(33), schedule=link("plan"), start_latent=link("half"))
    prompt |= {"plan": schedule(33), "half": {"class_type": "LoadLatent", "inputs": {"latent": "half.latent"}}}
    continued = latents_of(server, prompt)
    assert (continued - whole).abs().max() <= 1e-3


def test_schedule_lists_its_sparsities_if_no_page_draws_them(server):
    prompt = graph({"model": loader()}, schedule=link("plan")) | {"plan": schedule(preset="light_forcing_short")}
    (text,) = server.run(prompt)["outputs"]["plan"]["text"]
    assert text == "Light Forcing, 5 s video: 2 chunks, sparsity 0.000, 0.827; mean of the sparse chunks 0.827"


def test_cancelled_run_leaves_a_healthy_server(server):
    expected = latents_of(server, graph({"model": loader()}, seed=9))
    before, since = server.resident_bytes(), len(server.log())
    prompt_id = server.queue(graph({"model": loader()}, latent=empty(length=1001), seed=8, keep_finished=False))
    server.wait_for_steps(1, 336, since)  # of 84 chunks × 4 steps
    asked = time.monotonic()
    server.interrupt()
    with pytest.raises(Interrupted):
        server.wait(prompt_id)
    assert time.monotonic() - asked < 20
    server.free()  # so that nothing of the first run is left to answer from
    entry = server.run(graph({"model": loader()}, seed=9))
    (path,) = server.files(entry)
    cached = next(data["nodes"] for kind, data in entry["status"]["messages"] if kind == "execution_cached")
    assert "sampler" not in cached
    assert (load_file(path)["latent_tensor"] == expected).all()
    assert server.resident_bytes() - before < 200 * 2**20


def test_core_template_runs_with_our_sampler_and_its_start_image(server):
    """ComfyUI's image-to-video template for Causal Forcing; a start latent of the same image gives the same video."""

    template = {
        "unet": core_loader("causal_forcing-framewise.safetensors"),
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "tiny_lightvae.safetensors"}},
        "image": {
            "class_type": "EmptyImage",
            "inputs": {"width": WIDTH, "height": HEIGHT, "batch_size": 1, "color": 0x40A0C0},
        },
    }

    def video(models, latent, **select):
        prompt = custom_graph({**template, **models}, **select)
        prompts = {"positive": link("text"), "negative": link("text")}
        prompt["guider"] = {"class_type": "CFGGuider", "inputs": {"model": link("model"), **prompts, "cfg": 1.0}}
        prompt["sampler"]["inputs"]["latent_image"] = latent
        return latents_of(server, prompt)

    size = {"width": WIDTH, "height": HEIGHT, "length": 13, "batch_size": 1}
    inputs = {"model": link("unet"), "vae": link("vae"), "start_image": link("image"), **size}
    start = {"class_type": "ARVideoI2V", "inputs": inputs}
    encode = {"class_type": "VAEEncode", "inputs": {"pixels": link("image"), "vae": link("vae")}}
    theirs = video({"start": start, "model": apply(link("start"))}, link("start", 1))
    ours = video(
        {"model": apply(link("unet")), "start": encode, "short": empty(13)}, link("short"), start_latent=link("start")
    )
    assert (theirs == ours).all()
    assert theirs[:, :, 0].std() < theirs[:, :, 1].std()

    # The sampling node needs no Apply, because the file's name shows the family.
    both = {"start": start, "model": apply(link("start"))}, {"model": start}
    applied, alone = (latents_of(server, graph({**template, **models}, latent=empty(13))) for models in both)
    assert (applied == alone).all()

"""Runs in a real server: every way to a MODEL, every way to sample, and what a cancelled run leaves."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ...support.comfy_server import Interrupted
from ...support.graphs import (
    CAPTION,
    HEIGHT,
    WIDTH,
    apply,
    core_loader,
    custom_graph,
    demo_graph,
    empty,
    empty_image,
    encoded,
    graph,
    image_to_video,
    latents_of,
    link,
    loader,
    lora,
    node,
    save_images,
    save_latents,
    saved_latents,
    schedule,
    vae_loader,
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
    behind = latents_of(server, graph({"unet": loader(), "model": lora(link("unet"))}))
    stock = {"unet": core_loader("tiny_wan.safetensors"), "lora": lora(link("unet")), "model": apply(link("lora"))}
    before = latents_of(server, graph(stock))
    merged = latents_of(server, graph({"model": loader(lora_name="tiny_lora.safetensors")}))
    assert (behind - without).abs().max() > 0.05
    assert (behind - before).abs().max() <= 1e-5
    assert (behind - merged).abs().max() <= 1e-2


def test_frames_decoded_while_sampling_equal_those_decoded_later(server):
    """Those of a start image included."""
    nodes = {"model": loader(), "image": empty_image(0x40A0C0), "start": encoded()}
    prompt = graph(nodes, latent=empty(17), vae=True, start_latent=link("start"))
    for name, kind in (("ours", "LightForcingDecode"), ("core", "VAEDecode")):
        prompt[name] = node(kind, samples=link("sampler"), vae=link("vae"))
        prompt[f"images {name}"] = save_images(link(name))
    entry = server.run(prompt)
    frames = {}
    for name in ("images", "images ours", "images core"):
        paths = [server.output / item["filename"] for item in entry["outputs"][name]["images"]]
        frames[name] = np.stack([np.asarray(Image.open(path), dtype=np.int16) for path in paths])
    assert frames["images"].shape == (17, HEIGHT, WIDTH, 3)
    assert frames["images"].std() > 1
    assert abs(frames["images"] - frames["images ours"]).max() <= 1
    assert abs(frames["images"] - frames["images core"]).max() <= 1


def test_sampler_select_runs_in_the_custom_sampler(server):
    prompt = custom_graph({"model": loader()}, schedule=link("schedule"))
    prompt["schedule"] = schedule(window=6, sink_frames=1, sink_rope="follow")
    prompt["save denoised"] = save_latents(link("sampler", 1), "latents/denoised")
    latents = [path for path in server.files(server.run(prompt)) if path.suffix == ".latent"]
    saved, denoised = (load_file(path)["latent_tensor"] for path in latents)
    assert saved.shape == (1, 16, 6, HEIGHT // 8, WIDTH // 8)
    assert (saved - denoised).abs().max() <= 1e-4


def test_schedule_takes_the_length_of_the_latent(server):
    """Its own number is for the plot; sparsities are those of the length that is made."""
    shorter, same = (
        latents_of(
            server, graph({"model": loader()}, schedule=link("plan"), latent=empty(33)) | {"plan": schedule(length)}
        )
        for length in (21, 33)
    )
    assert torch.equal(shorter, same)


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
    assert "sampler" in server.executed(entry)
    assert (saved_latents(server, entry) == expected).all()
    assert server.resident_bytes() - before < 200 * 2**20


def test_start_image_of_core_equals_a_start_latent_and_a_named_file_needs_no_apply(server):
    """As in ComfyUI's image-to-video template for Causal Forcing."""
    nodes = {"vae": vae_loader(), "image": empty_image(0x40A0C0), "encoded": encoded()}
    nodes["unet"] = core_loader("causal_forcing-framewise.safetensors")
    start = image_to_video(13)
    alone = latents_of(server, graph({**nodes, "model": start}, latent=empty(13)))
    applied = {**nodes, "model": apply(link("unet"))}
    assert (latents_of(server, graph(applied, latent=empty(13), start_latent=link("encoded"))) == alone).all()
    assert alone[:, :, 0].std() < alone[:, :, 1].std()


def test_caption_makes_a_video_and_another_caption_another(server):
    entry = server.run(demo_graph())
    assert len([path for path in server.files(entry) if path.suffix == ".png"]) == 33
    captions = (CAPTION, "On a plain background, a red circle moves right slowly.", CAPTION.replace("red", "blue"))
    first, spelt_otherwise, other = (latents_of(server, demo_graph(caption)) for caption in captions)
    assert torch.equal(spelt_otherwise, first)
    assert not torch.allclose(other, first, atol=1e-3)


def test_jobs_of_the_server_list_a_run_with_its_picture(server):
    """The list reads every node's output, so it would fail on one that it does not expect."""
    prompt_id = server.queue(graph({"model": loader()}, vae=True))
    server.wait(prompt_id)
    job = server.get(f"/api/jobs/{prompt_id}")
    assert (job["status"], job["preview_output"]["nodeId"]) == ("completed", "images")
    assert prompt_id in [one["id"] for one in server.get("/api/jobs")["jobs"]]

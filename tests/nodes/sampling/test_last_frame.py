"""Videos that end with a given frame, in a real server: from a latent, from an image, and after a restart."""

import pytest
import torch
from safetensors.torch import load_file

from ...support.graphs import (
    HEIGHT,
    WIDTH,
    custom_graph,
    empty,
    empty_image,
    encoded,
    graph,
    latents_of,
    link,
    load_latent,
    load_state,
    loader,
    save_latent,
    save_latents,
    save_state,
    schedule,
)

CLOSE = 1e-5  # the rounding of two changes of latent space


@pytest.fixture(scope="module")
def end(models):
    """A latent frame in the VAE's space, in the server's input folder as end.latent."""
    latents = torch.randn(1, 16, 1, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(12))
    save_latent(models, "end.latent", latents)
    return latents


@pytest.mark.parametrize("sampler", [graph, custom_graph])
def test_video_ends_with_the_given_latent_and_starts_as_ever(server, end, sampler):
    plain = latents_of(server, sampler({"model": loader()}))
    nodes = {"end": load_latent("end.latent")}
    video = latents_of(server, {**sampler({"model": loader()}, end_latent=link("end")), **nodes})
    assert video.shape == plain.shape
    assert (video[:, :, -1:] - end).abs().max() <= CLOSE
    assert (video[:, :, :3] == plain[:, :, :3]).all()
    assert (video[:, :, 3:5] - plain[:, :, 3:5]).abs().max() > 0.01


@pytest.mark.parametrize("encode", [encoded("LightForcingEncode", place="end"), encoded()], ids=["ours", "core"])
def test_last_image_is_encoded_and_decoded_at_the_end(server, encode):
    prompt = graph({"model": loader()}, vae=True, end_latent=link("end"))
    prompt |= {"end": encode, "image": empty_image(0x3080D0), "save end": save_latents(link("end"), "ends/end")}
    entry = server.run(prompt)
    files = server.files(entry)
    (given,) = [load_file(path)["latent_tensor"] for path in files if path.parent.name == "ends"]
    (video,) = [load_file(path)["latent_tensor"] for path in files if path.parent.name == "latents"]
    assert given.shape == (1, 16, 1, HEIGHT // 8, WIDTH // 8)
    assert (video[:, :, -1:] - given).abs().max() <= CLOSE
    assert len([path for path in files if path.suffix == ".png"]) == 21


def dense(server, length, state=None, **options):
    """The latents of a run without sparsity, whose chunks do not depend on the length, with end.latent at hand."""
    nodes = {"model": loader(), "plan": schedule(length, target=0.0), "end": load_latent("end.latent")}
    if state:
        nodes, options = {**nodes, "state": state}, {**options, "state": link("state")}
    return latents_of(server, graph(nodes, latent=empty(length), schedule=link("plan"), **options))


@pytest.mark.parametrize(
    ("first", "later"),
    [({"end_latent": link("end")}, {}), ({}, {"end_latent": link("end")})],
    ids=["kept", "not added"],
)
def test_saved_run_has_the_end_with_which_it_began(server, end, first, later):
    dense(server, 21, save_state(name := f"with_{len(first)}_ends"), **first)
    longer = dense(server, 33, load_state(f"{name}_00001.safetensors"), **later)
    assert (longer == dense(server, 33, **first)).all()

"""FP8 in ComfyUI: a checkpoint of our command in both loaders, and the loader's `fp8_rowwise`."""

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lightforcing.cli.main import app
from lightforcing.lightforcing_core.model.wan import random_state_dict

from ...support.graphs import EMBEDS, apply, core_loader, graph, latents_of, link, loader

FP8 = "self_forcing_fp8.safetensors"
PLAIN = "tiny_wan.safetensors"


def quantized(models, source, out, *options):
    folder = models / "models" / "diffusion_models"
    result = CliRunner().invoke(app, ["quantize", str(folder / source), str(folder / out), "--force", *options])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def checkpoint(models):
    """The FP8 file that `lightforcing quantize` makes of self_forcing_dmd.pt, whose EMA holds tiny_wan's weights."""
    return quantized(models, "self_forcing_dmd.pt", FP8)


@pytest.fixture(scope="module")
def outliers(models):
    """A model with a channel of 3000 inside a feed-forward, that weighs little in what follows; and its FP8 files."""
    weights = random_state_dict(dim=256, ffn_dim=512, layers=2, text_dim=4096, seed=1)
    weights["blocks.1.ffn.0.weight"][5], weights["blocks.1.ffn.0.bias"][5] = 0.0, 3000.0
    weights["blocks.1.ffn.2.weight"][:, 5] /= 100.0
    source = "self_forcing_outlier.safetensors"
    save_file(weights, models / "models" / "diffusion_models" / source)
    prompts = models / "models" / "text_embeds" / EMBEDS
    cut = quantized(models, source, "self_forcing_outlier_fp8.safetensors")
    calibrated = quantized(models, source, "self_forcing_outlier_calibrated.safetensors", "--prompts", str(prompts))
    return source, cut, calibrated


def error(latents, reference):
    return ((latents - reference).norm() / reference.norm()).item()


@pytest.fixture(scope="module")
def reference(server):
    return latents_of(server, graph({"model": loader(family="self_forcing")}))


def test_file_samples_alike_through_load_diffusion_model_and_our_loader(server, checkpoint, reference):
    stock = {"file": core_loader(checkpoint), "model": apply(link("file"))}
    latents = latents_of(server, graph(stock))
    assert latents.isfinite().all()
    assert 0.005 < error(latents, reference) < 0.06
    assert torch.equal(latents, latents_of(server, graph({"model": loader(model_name=checkpoint)})))


def test_rowwise_samples(server, reference):
    rowwise = {"family": "self_forcing", "weight_dtype": "fp8_rowwise"}
    latents = latents_of(server, graph({"model": loader(**rowwise)}))
    assert 0.005 < error(latents, reference) < 0.06


def test_comfyui_holds_and_computes_both_forms_of_fp8_as_expected(run_inside, checkpoint, outliers):
    run_inside("model/fp8", PLAIN, checkpoint, *outliers, returns=False)

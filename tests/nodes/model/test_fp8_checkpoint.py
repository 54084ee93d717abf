"""FP8 in ComfyUI: a checkpoint of our command in both loaders, and the loader's `fp8_rowwise`.

Errors are those of whole runs' latents on random weights, against the same run on the float32 file.
"""

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


@pytest.fixture(scope="module")
def facts(run_inside, checkpoint, outliers):
    return run_inside("model/fp8", PLAIN, checkpoint, *outliers)


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


@pytest.mark.parametrize("way", ["stock loader", "our loader"])
def test_comfyui_holds_the_file_in_its_own_fp8_format(facts, way):
    assert facts[way]["class"] == "WAN21_CausalAR"
    assert facts[way]["operations"] == "mixed_precision_ops"
    assert facts[way]["layers"] == 20
    assert facts[way]["held"] == [["TensorCoreFP8E4M3Layout", "torch.float8_e4m3fn"]]
    assert facts[way]["others"] == ["Parameter"]  # embeddings, time and head are plain


def test_both_loaders_give_the_same_latents_within_three_percent_of_float32(facts):
    assert facts["both loaders alike"]
    assert 0.01 < facts["stock loader"]["error"] < 0.04
    assert 0.01 < facts["stock loader"]["error on FP8 units"] < 0.04


def test_rowwise_is_held_by_the_hosts_fp8_layers_with_our_rows(facts):
    assert facts["fp8_rowwise"]["operations"] == "mixed_precision_ops"
    assert facts["fp8_rowwise"]["held"] == [["LightForcingRowwiseFP8Layout", "torch.float8_e4m3fn"]]
    assert facts["rows"]
    assert facts["moved"][:2] == ["LightForcingRowwiseFP8Layout", "torch.bfloat16"]
    assert facts["moved"][2] < 0.03


def test_rowwise_is_closer_than_a_plain_cast_to_fp8(facts):
    assert 0.01 < facts["fp8_rowwise"]["error"] < 0.04
    assert 0.01 < facts["fp8_rowwise"]["error on FP8 units"] < 0.04
    assert facts["fp8_rowwise"]["error"] < facts["fp8_e4m3fn"]["error"]


def test_rowwise_bears_an_outlier_that_the_hosts_constant_scale_cuts_off(facts):
    for way in ("our loader", "fp8_rowwise"):
        assert 0.03 < facts[way]["layer error"] < 0.04
    assert facts["our loader"]["layer error with an outlier"] > 0.5
    assert facts["fp8_rowwise"]["layer error with an outlier"] < 0.04


def test_calibrated_inputs_save_a_file_whose_activations_leave_fp8s_range(facts):
    """Measured: 25 % from the float32 run without, 2.6 % with them, 3.1 % by rows."""
    assert facts["input_scale"] == [False, True]
    assert facts["outlier"]["cut"] > 0.15
    assert 0.01 < facts["outlier"]["calibrated"] < 0.04
    assert 0.01 < facts["outlier"]["rowwise"] < 0.045


@pytest.mark.parametrize("way", ["stock loader", "fp8_rowwise"])
def test_a_lora_on_fp8_layers_does_what_it_does_on_float32(facts, way):
    """It changes the run by a third; ComfyUI rounds the patched weights at random, which errs half as much again."""
    assert facts["LoRA changes"] > 0.2
    assert facts[way]["error with LoRA"] < 0.09


@pytest.mark.parametrize("way", ["our loader", "fp8_rowwise"])
def test_a_lora_outside_the_weights_is_added_to_the_dequantised_ones(facts, way):
    assert facts[way]["functions"] == 1
    assert 0 < facts[way]["layer error with LoRA outside"] < 0.03


def test_a_patched_rowwise_weight_is_requantised_by_rows(facts):
    layout, shape, difference = facts["requantised"]
    assert (layout, shape) == ("LightForcingRowwiseFP8Layout", [256, 1])
    assert difference < 0.045
    assert facts["largest of a row"]


def test_a_file_that_is_fp8_already_is_not_quantised_again(facts):
    assert "is quantised already" in facts["FP8 file as rowwise"]
    assert "set weight_dtype to default" in facts["FP8 file as rowwise"]

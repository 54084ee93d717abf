"""Scripts that assert what only ComfyUI's Python can see; the first line of each says what that is."""

import json

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from lightforcing.cli.main import app
from lightforcing.lightforcing_core.model.wan import random_state_dict

from ..support.graphs import EMBEDS

OUTLIER = "self_forcing_outlier.safetensors"
SCRIPTS = [
    "light_import",
    "names_used",
    "node_texts",
    "single_nodes",
    "demo_files",
    "output_files",
    "model/lora_kinds",
    "model/patching",
    "model/preferred_attention",
    "model/published_formats",
    "model/step_graph",
    "sampling/against_core",
    "sampling/faults",
    "sampling/live_view",
    "sampling/measured",
    "sampling/other_patches",
    "memory/memory",
    "memory/low_memory",
    "memory/dynamic_vram",
    "memory/graphs",
    "memory/no_backend",
    "memory/joined",
    "vae/overlap",
    "vae/tae",
    "vae/vae_against_core",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_in_comfyui(run_inside, script):
    run_inside(script, returns=False)


def test_comfyui_holds_and_computes_both_forms_of_fp8_as_expected(run_inside, models):
    """Of tiny_wan's weights, and of a model with a channel of 3000 in a feed-forward that weighs little behind it."""
    folder, prompts = models / "models" / "diffusion_models", models / "models" / "text_embeds" / EMBEDS
    weights = random_state_dict(dim=256, ffn_dim=512, layers=2, text_dim=4096, seed=1)
    weights["blocks.1.ffn.0.weight"][5], weights["blocks.1.ffn.0.bias"][5] = 0.0, 3000.0
    weights["blocks.1.ffn.2.weight"][:, 5] /= 100.0
    save_file(weights, folder / OUTLIER)
    files = []
    for name, source, options in (
        ("self_forcing_fp8", "self_forcing_dmd.pt", ()),
        ("self_forcing_outlier_fp8", OUTLIER, ()),
        ("self_forcing_outlier_calibrated", OUTLIER, ("--prompts", str(prompts))),
    ):
        files.append(f"{name}.safetensors")
        command = ["quantize", str(folder / source), str(folder / files[-1]), "--force", *options]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    checkpoint, cut, calibrated = files
    run_inside("model/fp8", "tiny_wan.safetensors", checkpoint, OUTLIER, cut, calibrated, returns=False)


def test_bench_core_times_whole_videos_of_cores_sampler_and_ours(comfyui, tmp_path):
    sizes = ["--frames", "33", "--height", "64", "--width", "96", "--dim", "256", "--ffn-dim", "512", "--layers", "1"]
    command = ["bench", "core", *sizes, "--rounds", "1", "--target", "0.7", "--out", str(tmp_path / "core.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "core.json").read_text())
    assert list(record["video"]) == ["core", "dense", "published", "default", "target 0.7"]
    assert all(row["times as fast as core"]["median"] > 0 for row in record["video"].values())
    assert record["facts"]["ComfyUI"] in result.output

"""Calibration: the largest input of every layer, and scales with which it fits."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightforcing.lightforcing_core.checkpoint.load import CheckpointError
from lightforcing.lightforcing_core.families import FAMILIES
from lightforcing.lightforcing_core.fp8.calibrate import largest_inputs, read_prompts
from lightforcing.lightforcing_core.fp8.export import write_fp8_checkpoint
from lightforcing.lightforcing_core.model.fp8 import LAYER_LINEARS
from lightforcing.lightforcing_core.model.wan import random_state_dict, wan_from_state_dict
from lightforcing.lightforcing_core.refusal import NotFinite

TEXT, SMALL = 4096, (4, 6)
FAMILY = FAMILIES["self_forcing"]


def text(seed, tokens=7):
    return torch.randn(1, tokens, TEXT, generator=torch.Generator().manual_seed(seed))


def weights_with_an_outlier():
    """Channel 5 between the two halves of layer 1's feed-forward is always 3000, and weighs little in what follows."""
    weights = random_state_dict(dim=128, ffn_dim=192, layers=2, text_dim=TEXT)
    weights["blocks.1.ffn.0.weight"][5], weights["blocks.1.ffn.0.bias"][5] = 0.0, 3000.0
    weights["blocks.1.ffn.2.weight"][:, 5] /= 3000.0
    return weights


def test_every_quantised_layer_is_seen_at_its_largest_over_all_prompts_steps_and_passes():
    dit = wan_from_state_dict(weights_with_an_outlier())
    inputs = {}

    def watch(name):
        return lambda _, args: inputs.setdefault(name, []).append(args[0].abs().max().item())

    names = [f"blocks.{i}.{name}" for i in range(2) for name in LAYER_LINEARS]
    hooks = [dit.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    steps = []
    found = largest_inputs(dit, [text(1), text(2)], FAMILY, latent_size=SMALL, on_step=lambda *step: steps.append(step))
    for hook in hooks:
        hook.remove()
    assert found == {name: max(inputs[name]) for name in names}
    assert found["blocks.1.ffn.2"] == 3000.0
    assert len(inputs["blocks.0.self_attn.q"]) == 2 * (2 * 4 + 1)  # prompts · (chunks · steps + the pass between)
    assert steps == [(done, 16) for done in range(1, 17)]
    assert not dit.blocks[0].ffn[0]._forward_pre_hooks


def test_inputs_that_are_not_finite_are_an_error_and_leave_no_hook():
    weights = random_state_dict(dim=128, ffn_dim=192, layers=1, text_dim=TEXT)
    weights["blocks.0.ffn.0.bias"][3] = float("inf")
    dit = wan_from_state_dict(weights)
    with pytest.raises(NotFinite, match="chunk 0 of the video holds NaN or infinity"):
        largest_inputs(dit, [text(1)], FAMILY, latent_size=SMALL)
    assert not dit.blocks[0].ffn[0]._forward_pre_hooks


def test_prompts_are_those_of_save_text_embeds(tmp_path):
    save_file({"1.cond": text(2), "0.cond": text(1), "0.pooled_output": text(3)[0]}, tmp_path / "prompts.safetensors")
    first, second = read_prompts(tmp_path / "prompts.safetensors", TEXT)
    assert torch.equal(first, text(1))
    assert torch.equal(second, text(2))
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors: contains no text embeddings"):
        read_prompts(tmp_path / "other.safetensors", TEXT)


def test_a_calibrated_file_holds_a_scale_for_the_inputs_of_every_layer(tmp_path):
    save_file(weights_with_an_outlier(), tmp_path / "self_forcing.safetensors")
    save_file({"0.cond": text(1)}, tmp_path / "prompts.safetensors")
    stages = []
    out = tmp_path / "self_forcing_fp8.safetensors"
    write_fp8_checkpoint(
        tmp_path / "self_forcing.safetensors",
        out,
        prompts=tmp_path / "prompts.safetensors",
        on_progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    stored = load_file(out)
    scales = {name: stored[f"blocks.{i}.{name}.input_scale"] for i in range(2) for name in LAYER_LINEARS}
    assert all(scale.dtype == torch.float32 and scale.shape == () for scale in scales.values())
    assert scales["ffn.2"] == pytest.approx(2 * 3000 / 448, rel=2**-8)
    assert 0.005 < scales["self_attn.q"] < 0.1  # normalised inputs
    assert stages == [*(("calibrating", i, 8) for i in range(1, 9)), *(("quantising", i, 20) for i in range(1, 21))]

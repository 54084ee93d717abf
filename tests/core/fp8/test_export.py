"""The FP8 writer: stored tensors, metadata and notes, and refusals before any work."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lightforcing.cli.main import app
from lightforcing.lightforcing_core.checkpoint.load import CheckpointError, inspect_checkpoint, load_dit_state_dict
from lightforcing.lightforcing_core.files.output import OutputError
from lightforcing.lightforcing_core.files.tensors import stream_tensors
from lightforcing.lightforcing_core.fp8.export import write_fp8_checkpoint
from lightforcing.lightforcing_core.model.wan import wan_from_state_dict

from ...support.checkpoint_samples import LAYERS, assert_same, prefixed, tiny_wan


@pytest.fixture
def source(tmp_path):
    torch.save({"generator_ema": prefixed(tiny_wan(), "model.")}, tmp_path / "self_forcing_dmd.pt")
    return tmp_path / "self_forcing_dmd.pt"


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def run(*arguments):
    return CliRunner().invoke(app, ["quantize", *(str(argument) for argument in arguments)])


def test_every_published_matrix_is_fp8_with_one_scale_and_the_formats_name(source, tmp_path):
    out = tmp_path / "self_forcing_fp8.safetensors"
    written, rounding = write_fp8_checkpoint(source, out)
    stored, weights = load_file(out), tiny_wan()
    extra = {f"{layer}.{leaf}" for layer in LAYERS for leaf in ("weight_scale", "comfy_quant")}
    assert stored.keys() == weights.keys() | extra
    rest = {name: value for name, value in weights.items() if name.removesuffix(".weight") not in LAYERS}
    kept = {n: v if n.startswith("patch_embedding.") else v.bfloat16() for n, v in rest.items()}
    assert_same({name: stored[name] for name in rest}, kept)
    loaded, info = load_dit_state_dict(out)
    assert_same(loaded, stored)
    assert info.quantised == "float8_e4m3fn in ComfyUI's format, 20 layers"
    assert info.family.id == "self_forcing"
    plain, _ = load_dit_state_dict(out, dequantise_all=True)
    wan_from_state_dict(plain)
    errors, squares = {}, torch.zeros(2)
    for layer in LAYERS:
        weight, scale = weights[f"{layer}.weight"], stored[f"{layer}.weight_scale"]
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        assert scale == weight.abs().max() / 448
        assert stored[f"{layer}.weight"].dtype == torch.float8_e4m3fn
        exact = (weight / scale).to(torch.float8_e4m3fn).float()
        assert torch.equal(stored[f"{layer}.weight"].float(), exact)
        assert torch.equal(plain[f"{layer}.weight"], (exact * scale).bfloat16())
        assert json.loads(bytes(stored[f"{layer}.comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
        own = torch.stack([(exact * scale - weight).square().sum(), weight.square().sum()])
        errors[layer], squares = (own[0] / own[1]).sqrt().item(), squares + own
    worst = max(errors, key=errors.__getitem__)
    assert 0.02 < errors[worst] < 0.03
    whole = (squares[0] / squares[1]).sqrt().item()
    assert f"weights by {whole:.2%} (root mean square), at most by {errors[worst]:.2%} ({worst})" in rounding
    assert written.startswith(f"wrote {out} (0.00 → 0.00 GB")


@pytest.mark.parametrize(
    ("name", "metadata", "causal"),
    [
        ("self_forcing.safetensors", {}, True),
        ("wan2.1_t2v.safetensors", {}, False),
        ("mine.safetensors", {"config": json.dumps({"transformer": {"causal_ar": True}})}, True),
        ("krea.safetensors", {"config": json.dumps({"transformer": {"x": 1}, "y": 2}), "author": "someone"}, True),
    ],
)
def test_the_file_is_marked_as_autoregressive_only_if_that_is_known(tmp_path, name, metadata, causal):
    save_file(tiny_wan(), tmp_path / name, metadata=metadata)
    out = tmp_path / f"fp8_{name}"
    write_fp8_checkpoint(tmp_path / name, out)
    stored = metadata_of(out)
    assert inspect_checkpoint(out).causal_metadata is causal
    if name.startswith("krea"):
        assert stored["author"] == "someone"
        assert json.loads(stored["config"]) == {"transformer": {"x": 1, "causal_ar": True}, "y": 2}
    if not causal:
        assert "config" not in stored


def test_a_lora_is_merged_before_rounding(source, tmp_path):
    up, down, layer = torch.randn(128, 4), torch.randn(4, 128), "diffusion_model.blocks.1.self_attn.q"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    report = write_fp8_checkpoint(source, tmp_path / "x.safetensors", lora=tmp_path / "lora.safetensors")
    plain, _ = load_dit_state_dict(tmp_path / "x.safetensors", dequantise_all=True)
    merged = tiny_wan()["blocks.1.self_attn.q.weight"] + up @ down
    assert (plain["blocks.1.self_attn.q.weight"].float() - merged).norm() / merged.norm() < 0.03
    assert any("note: LoRA lora.safetensors added to 1 weights" in line for line in report)


def test_layers_with_unsuitable_sizes_stay_in_16_bits_and_are_noted(tmp_path):
    save_file(tiny_wan(ffn_dim=200), tmp_path / "self_forcing.safetensors")
    report = write_fp8_checkpoint(tmp_path / "self_forcing.safetensors", tmp_path / "self_forcing_fp8.safetensors")
    stored = load_file(tmp_path / "self_forcing_fp8.safetensors")
    assert stored["blocks.0.ffn.0.weight"].dtype == torch.bfloat16
    assert "blocks.0.ffn.0.comfy_quant" not in stored
    assert report[1].startswith("16 layers in FP8")
    assert report[2].startswith("note: 4 layers stay in 16 bits")


def refusals(folder):
    """{words of the message: arguments}; `folder` is filled with what they need."""
    save_file(tiny_wan(), folder / "self_forcing.safetensors")
    (folder / "there.safetensors").write_bytes(b"mine")
    fp8 = {n: v.to(torch.float8_e4m3fn) for n, v in tiny_wan().items()}
    save_file(fp8, folder / "cast.safetensors")
    save_file({"0.cond": torch.randn(1, 7, 48)}, folder / "prompts.safetensors")
    prompts = "--prompts", folder / "prompts.safetensors"
    source = folder / "self_forcing.safetensors"
    return {
        "exists already; choose another name, or replace it with --force": (source, folder / "there.safetensors"),
        "is the source itself": (source, source, "--force"),
        "no such folder": (source, folder / "absent" / "x.safetensors"),
        "use the suffix .safetensors": (source, folder / "x.pt"),
        "is quantised already (float8_e4m3fn without scales)": (folder / "cast.safetensors", folder / "x.safetensors"),
        "no such file": (folder / "absent.pt", folder / "x.safetensors"),
        "has no weights named 'ema'": (source, folder / "x.safetensors", "--weights", "ema"),
        "width of 48 and the model needs 4096": (source, folder / "x.safetensors", *prompts),
    }


def test_impossible_requests_are_refused_in_one_line_and_write_nothing(tmp_path):
    cases = refusals(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for words, arguments in cases.items():
        result = run(*arguments)
        assert result.exit_code == 1, words
        assert words in result.output
        assert result.output.count("\n") == 1
        assert "Traceback" not in result.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_is_too_small_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    save_file({"0.cond": torch.randn(1, 7, 4096)}, tmp_path / "prompts.safetensors")
    work = []
    options = {"prompts": tmp_path / "prompts.safetensors", "on_progress": lambda *step: work.append(step)}
    with pytest.raises(OutputError, match="free some space"):
        write_fp8_checkpoint(source, tmp_path / "x.safetensors", **options)
    assert work == []


def test_damaged_weights_do_not_change_an_existing_file(tmp_path):
    weights = tiny_wan()
    weights["blocks.1.ffn.2.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "self_forcing.safetensors")
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.2\.weight has values that are not finite"):
        write_fp8_checkpoint(tmp_path / "self_forcing.safetensors", tmp_path / "out.safetensors", overwrite=True)
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "self_forcing.safetensors"]


def test_the_command_reports_the_file(source, tmp_path):
    out = tmp_path / "mine.safetensors"
    result = run(source, out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out} " in result.output
    assert "20 layers in FP8; rounding changed their weights by 2.6" in result.output
    assert "rename the file to contain 'selfforcing'" in result.output
    out.write_bytes(b"old")
    assert run(source, out, "--force").exit_code == 0
    assert inspect_checkpoint(out).size.layers == 2


def test_a_streamed_file_holds_its_tensors_whatever_their_order_and_layout(tmp_path):
    tensors = {
        "b": torch.arange(7, dtype=torch.uint8),
        "a": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "c": torch.randn(2, 3, dtype=torch.bfloat16),
        "d": torch.tensor(3.5),
        "e": torch.randn(4, 6).t(),
    }
    streamed = stream_tensors(tmp_path / "s.safetensors", tensors, reversed(tensors.items()), {"k": "ü"})
    assert_same(load_file(streamed), tensors)
    assert metadata_of(streamed) == {"k": "ü"}


@pytest.mark.parametrize("tensors", [{}, {"a": torch.zeros(3)}, {"b": torch.zeros(2)}])
def test_a_stream_that_differs_from_its_layout_leaves_no_file(tmp_path, tensors):
    with pytest.raises(ValueError, match=r"differs from its layout|are missing"):
        stream_tensors(tmp_path / "s.safetensors", {"a": torch.zeros(2)}, tensors.items(), {})
    assert list(tmp_path.iterdir()) == []

"""Files that cannot be used: each raises one error with file, problem and remedy, and runs no code."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.checkpoint.load import CheckpointError, load_dit_state_dict

from ...support.checkpoint_samples import in_diffusers_names, prefixed, tiny_wan


class Malicious:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def refusal(path, **options) -> str:
    """The message of the error, which must name the file and be one paragraph."""
    with pytest.raises(CheckpointError) as caught:
        load_dit_state_dict(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) - len(str(path)) < 400
    return message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "text protocol", "renamed"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, form):
    target, path = tmp_path / "pwned", tmp_path / ("x.safetensors" if form == "renamed" else "x.pt")
    stored = {"generator_ema": tiny_wan(layers=1), "config": Malicious(target)}
    if form in ("bare", "text protocol"):
        path.write_bytes(pickle.dumps(stored, protocol=0 if form == "text protocol" else 4))
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=form != "legacy")
    message = refusal(path)
    assert not target.exists()
    if form != "text protocol":
        assert "nothing was run" in message
        assert "system" in message or form == "bare"
    pickle.loads(pickle.dumps(Malicious(target)))  # the sample works if pickles are trusted
    assert target.exists()


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.1, 0.001])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".legacy.pt"])
def test_a_truncated_file_says_so(tmp_path, suffix, kept):
    path = tmp_path / f"x{suffix}"
    weights = tiny_wan(layers=1)
    if suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=suffix == ".pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    message = refusal(path)
    assert "truncated" in message
    assert "download it again" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"prompt: a cat walks on the grass, realistic style.\n", "neither a safetensors nor a PyTorch file"),
        (b"abc", "neither a safetensors nor a PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:bdb1b475\nsize 5676220819\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>401</body></html>", "web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
        (bytes(4096), "neither a safetensors nor a PyTorch file"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_content_under_the_name_of_a_weight_file(tmp_path, content, expected, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert expected in refusal(path)


def test_only_regular_files_are_opened_and_the_files_of_a_folder_are_listed(tmp_path):
    assert "holds no weight file" in refusal(tmp_path / "x.pt")
    for name in ("b.safetensors", "a.safetensors", "model-00001-of-00003.safetensors"):
        save_file(tiny_wan(layers=1), tmp_path / name)
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "nowhere.pt")
    (tmp_path / "folder.safetensors").mkdir()
    listed = "a.safetensors, b.safetensors"
    for name, reason in {
        "nowhere/x.pt": "no such file",
        "x.pt": listed,
        "": listed,
        "pipe.safetensors": "a pipe or device, not a file",
        "dangling.pt": "no such file",
        "folder.safetensors": "has no weight file",
        "x" * 260: "File name too long",
        "model-00001-of-00003.safetensors": "2 of its 3 shards are missing (model-00002-of-00003.safetensors",
    }.items():
        assert reason in refusal(tmp_path / name)


def test_a_link_to_nothing_is_no_second_model(tmp_path):
    save_file(tiny_wan(), tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").symlink_to(tmp_path / "nowhere")
    assert load_dit_state_dict(tmp_path)[1].size.layers == 2


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("not json", "not an index"),
        ("[]", "not an index"),
        (json.dumps({"weight_map": {"a": "../../etc/passwd"}}), "outside its folder"),
        (json.dumps({"weight_map": {"a": "gone.safetensors"}}), "1 of its 1 shards are missing"),
        (json.dumps({"weight_map": {}}), "shards are missing"),
        (json.dumps({"weight_map": {"a": 3}}), "outside its folder"),
    ],
)
def test_an_index_without_usable_shards(tmp_path, index, expected):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    assert expected in refusal(path)


def wan_with(extra=None, **sizes):
    return tiny_wan(layers=1, **sizes) | {name: torch.zeros(shape) for name, shape in (extra or {}).items()}


IMAGE = {"img_emb.proj.0.bias": (8,), "blocks.0.cross_attn.k_img.weight": (128, 128)}
OTHER_KINDS = {
    "Wan 2.1 I2V": wan_with(IMAGE, in_dim=36),
    "Wan 2.1 FLF2V": wan_with(IMAGE | {"img_emb.emb_pos": (1, 514, 8)}, in_dim=36),
    "Wan 2.2 I2V A14B": wan_with(in_dim=36),
    "Wan VACE": wan_with(
        {"vace_patch_embedding.weight": (128, 96, 1, 2, 2), "vace_blocks.0.self_attn.q.weight": (1, 1)}
    ),
    "Wan Fun Camera": wan_with({"control_adapter.conv.weight": (8, 8)} | IMAGE, in_dim=32),
    "Wan Fun Control": wan_with({"ref_conv.weight": (8, 8)} | IMAGE, in_dim=48),
    "Wan 2.2 S2V": wan_with({"casual_audio_encoder.encoder.final_linear.weight": (8, 8)}),
    "HuMo": wan_with({"audio_proj.audio_proj_glob_1.layer.bias": (8,)}, in_dim=36),
    "Wan 2.2 Animate": wan_with({"face_adapter.fuser_blocks.0.k_norm.weight": (8,)}, in_dim=36),
    "SCAIL": wan_with({"patch_embedding_pose.weight": (8, 8)}),
    "Wan 2.2 TI2V 5B": wan_with(in_dim=48, out_dim=48),
    "a Wan with 20 input": wan_with(in_dim=20),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("stored_as", ["original", "self_forcing", "diffusers"])
def test_other_kinds_of_wan_are_refused_by_name(tmp_path, kind, stored_as):
    weights = OTHER_KINDS[kind]
    if stored_as == "self_forcing":
        weights = {"generator_ema": prefixed(weights, "model.")}
    elif stored_as == "diffusers":
        weights = in_diffusers_names(weights)
    torch.save(weights, tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert f"this is {kind}" in message
    assert "text-to-video checkpoint" in message


def test_missing_weights_are_counted_and_the_first_named(tmp_path):
    weights = tiny_wan()
    for name in ("blocks.1.ffn.0.weight", "blocks.1.ffn.2.bias", "head.head.bias", "patch_embedding.bias"):
        del weights[name]
    torch.save({"generator_ema": weights, "generator": tiny_wan()}, tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert (
        "4 of 69 weights are missing (blocks.1.ffn.0.weight, blocks.1.ffn.2.bias, head.head.bias and 1 more)" in message
    )
    assert "other sets of weights in this file: generator" in message


@pytest.mark.parametrize("absent", ["head.modulation", "blocks.0.", "text_embedding.", "a huge number", "thousands"])
def test_a_part_of_a_model_is_called_incomplete_and_does_not_fill_memory(tmp_path, absent):
    weights = {name: value for name, value in tiny_wan().items() if not name.startswith(absent)}
    if absent == "a huge number":
        weights["blocks.987654321.modulation"] = torch.zeros(1)
    if absent == "thousands":
        weights |= {f"blocks.{number}.modulation": torch.zeros(0) for number in range(5000)}
    save_file(weights, tmp_path / "x.safetensors")
    assert "incomplete" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"transformer": {"text_dim": 32}}, 32),
        ({"transformer": {"text_dim": 64}}, 64),
        *((config, 4096) for config in ({"transformer": {"text_dim": "32"}}, {"transformer": []}, [1])),
    ],
)
def test_the_metadata_may_state_another_text_width(tmp_path, config, width):
    save_file(tiny_wan(text_dim=32), tmp_path / "x.safetensors", metadata={"config": json.dumps(config)})
    if width == 32:
        assert load_dit_state_dict(tmp_path / "x.safetensors")[1].size.text_dim == 32
    else:
        message = f"text_embedding.0.weight has shape (128, 32) and not Wan 2.1's (128, {width})"
        assert message in refusal(tmp_path / "x.safetensors")


def zeros_of(*names):
    return {name: torch.zeros(2, 2) for name in names}


def marked(text):
    """A model one of whose layers has a mark of ComfyUI's."""
    return WAN | {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}


WAN = tiny_wan()
SHARED = {str(number): {} for number in range(1000)}
for _ in range(3):
    SHARED = {str(number): SHARED for number in range(1000)}
NO_FORMAT = "blocks.0.ffn.0.comfy_quant does not name a format"


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (zeros_of("decoder.middle.0.residual.0.gamma", "encoder.conv1.weight"), "a VAE; load it with Load VAE"),
        (zeros_of("token_embedding.weight", "blocks.0.attn.q.weight"), "a text encoder"),
        (zeros_of("double_blocks.0.img_attn.qkv.weight"), "a Flux or HunyuanVideo model"),
        (zeros_of("model.diffusion_model.input_blocks.0.0.weight"), "a Stable Diffusion UNet"),
        (zeros_of("net.blocks.0.self_attn.q_proj.weight"), "no Wan transformer (1 weights, such as net.blocks"),
        (zeros_of("layers.0.weight"), "contains no Wan transformer (1 weights, such as layers.0.weight"),
        (zeros_of("emb_params"), "contains no Wan transformer"),
        ([torch.zeros(3)], "contains a list, not a dict"),
        ({"step": 3, "generator": None}, "contains no weights"),
        ({"critic": WAN}, "contains no weights of a model, only critic"),
        (prefixed(WAN, "student.") | prefixed(WAN, "average."), "2 models, with the prefixes average., student."),
        (WAN | zeros_of("blocks.0.cam_encoder.weight"), "blocks.0.cam_encoder.weight"),
        (WAN | {"blocks.1.ffn.0.weight": torch.zeros(192, 64)}, "blocks.1.ffn.0.weight has shape (192, 64)"),
        (WAN | {"head.modulation": torch.zeros(())}, "not head.modulation"),
        (WAN | {"head.modulation": torch.zeros(1, 2, 100)}, "dim 100 is not a multiple"),
        (WAN | {"text_embedding.0.weight": torch.zeros(128, 2048)}, "text_embedding.0.weight has shape"),
        # Small files that would become large in memory.
        (WAN | {"head.head.bias": torch.zeros(()).expand(1_000_000_000)}, "without all of its elements"),
        (SHARED, "more than 50000 entries"),
        (WAN | zeros_of("a." * 1000), "a name of 2000 letters"),
        *((marked(text), NO_FORMAT) for text in (b"[1]", b"{}", b'{"format": ["a"]}', b'{"format": null}')),
        (WAN | {"blocks.0.ffn.0.comfy_quant": torch.tensor([0.5, 0.25])}, NO_FORMAT),
        (marked(b'{"format": "float8_e4m3fn"}'), "blocks.0.ffn.0 is marked as float8_e4m3fn but has no scale"),
    ],
)
def test_contents_of_another_kind_are_refused(tmp_path, stored, message):
    torch.save(stored, tmp_path / "x.pt")
    assert message in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_file_too_large_for_memory_says_so(tmp_path, monkeypatch, error):
    torch.save(tiny_wan(layers=1), tmp_path / "x.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    assert "memory ran out" in refusal(tmp_path / "x.pt")


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"a.b": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert "it is compressed" in refusal(tmp_path / "x.pt")


ONE_LAYER = '{"layers": {"blocks.0.ffn.0": %s}}'


@pytest.mark.parametrize(
    "text",
    ["broken", "[" * 2000 + "]" * 2000, "[]", ONE_LAYER % "1", ONE_LAYER % "{}", ONE_LAYER % '{"format": {"a": 1}}'],
)
def test_metadata_beyond_the_limits_is_refused(tmp_path, text):
    save_file(tiny_wan(), tmp_path / "x.safetensors", metadata={"_quantization_metadata": text})
    assert "_quantization_metadata is not readable" in refusal(tmp_path / "x.safetensors")
    save_file(tiny_wan(), tmp_path / "x.safetensors", metadata={"config": text})
    assert not load_dit_state_dict(tmp_path / "x.safetensors")[1].causal_metadata


def test_names_that_are_numbers_are_left_out(tmp_path):
    weights = tiny_wan()
    stored = {"generator": {**weights, 7: torch.zeros(1)}, "optimizer": {"state": {0: {"step": torch.zeros(())}}}, 3: 4}
    torch.save(stored, tmp_path / "x.pt")
    assert load_dit_state_dict(tmp_path / "x.pt")[0].keys() == weights.keys()


def test_several_unnamed_sets_of_weights_need_a_choice(tmp_path):
    torch.save({"first": tiny_wan(layers=1), "second": tiny_wan(layers=1)}, tmp_path / "x.pt")
    assert "first, second; choose one with weights=" in refusal(tmp_path / "x.pt")
    assert "'first', 'second'" in refusal(tmp_path / "x.pt", weights="third")
    assert load_dit_state_dict(tmp_path / "x.pt", weights="second")[1].weights == "second"


def test_the_error_of_a_lora_passed_as_a_model_says_how_to_use_it(tmp_path):
    pair = {
        "blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 128),
        "blocks.0.self_attn.q.lora_B.weight": torch.zeros(128, 4),
    }
    torch.save({"generator_lora": prefixed(pair, "base_model.model.")}, tmp_path / "lora.pt")
    save_file(prefixed(pair, "diffusion_model."), tmp_path / "lora.safetensors")
    for name in ("lora.pt", "lora.safetensors"):
        message = refusal(tmp_path / name)
        assert "this is a LoRA" in message
        assert "lora=" in message


@pytest.mark.filterwarnings("ignore")  # torch 2.13 calls its own TorchScript deprecated
def test_a_compiled_program_is_not_a_checkpoint(tmp_path):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as entries:  # torch compresses what it knows of the source
        entries.writestr("archive/code/x.debug_pkl", b"0" * 100_000)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    assert "TorchScript" in refusal(tmp_path / "x.pt")

"""Every published layout gives the same tensors under Wan's own names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.checkpoint.load import inspect_checkpoint, load_dit_state_dict

from ...support.checkpoint_samples import assert_same, fsdp_wrapped, in_diffusers_names, prefixed, tiny_wan

WRAPPINGS = {
    "original": lambda w: w,
    "self_forcing": lambda w: prefixed(w, "model."),
    "fsdp": fsdp_wrapped,
    "torch_compile": lambda w: prefixed(w, "model._orig_mod."),
    "activation_checkpointing": lambda w: {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): value for name, value in w.items()
    },
    "data_parallel": lambda w: prefixed(w, "module."),
    "compiled_data_parallel_fsdp": lambda w: prefixed(fsdp_wrapped(w), "_orig_mod.module."),
    "comfyui_checkpoint": lambda w: prefixed(w, "model.diffusion_model."),
    "comfyui_diffusion_model": lambda w: prefixed(w, "diffusion_model."),
    "comfyui_model_model": lambda w: prefixed(w, "model.model."),
    "comfyui_net": lambda w: prefixed(w, "net."),
    "diffusers": in_diffusers_names,
    "diffusers_prefixed": lambda w: prefixed(in_diffusers_names(w), "transformer."),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_naming_gives_wans_own_names(tmp_path, wrapping, suffix):
    weights = tiny_wan()
    path = tmp_path / f"weights{suffix}"
    stored = WRAPPINGS[wrapping](weights)
    save_file(stored, path) if suffix == ".safetensors" else torch.save(stored, path)
    loaded, info = load_dit_state_dict(path)
    assert_same(loaded, weights)
    size = info.size
    assert (size.dim, size.ffn_dim, size.layers, size.text_dim) == (128, 192, 2, 4096)
    assert info.weights == ""
    assert not any("skipped" in note for note in info.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("container", ["generator_ema", "student", "generator.state_dict"])
def test_a_single_container_is_opened_whatever_its_name_and_dtype(tmp_path, container, dtype):
    weights = tiny_wan(dtype=dtype, layers=1)
    stored = prefixed(weights, "model.")
    for name in reversed(container.split(".")):
        stored = {name: stored, "step": 3000, "other": None}
    torch.save(stored, tmp_path / "x.pt")
    loaded, info = load_dit_state_dict(tmp_path / "x.pt")
    assert_same(loaded, weights)
    assert info.weights == container
    assert info.dtypes == (str(dtype).removeprefix("torch."),)


@pytest.mark.parametrize(
    ("file_name", "options", "expected"),
    [
        ("self_forcing_dmd.pt", {}, "generator_ema"),
        ("short_video_gen.pt", {}, "generator_ema"),
        ("something.pt", {}, "generator_ema"),
        ("something.pt", {"prefer_ema": False}, "generator"),
        ("longlive_base.pt", {}, "generator"),
        ("longlive_base.pt", {"weights": "generator_ema"}, "generator_ema"),
        ("longlive_base.pt", {"weights": "ema"}, "generator_ema"),
        ("causal_forcing.pt", {}, "generator"),
        ("framewise-2step.pt", {}, "generator_ema"),
        ("one_forcing.pt", {}, "generator"),
        ("rolling_forcing_dmd.pt", {}, "generator_ema"),
    ],
)
def test_each_family_runs_the_weights_it_is_published_to_run(tmp_path, file_name, options, expected):
    sets = {"generator": tiny_wan(seed=1, layers=1), "generator_ema": tiny_wan(seed=2, layers=1)}
    stored = {name: prefixed(weights, "model.") for name, weights in sets.items()}
    critic = {"model.blocks.0.self_attn.q.weight": torch.zeros(2, 2)}
    torch.save({"critic": critic, **stored}, tmp_path / file_name)
    loaded, info = load_dit_state_dict(tmp_path / file_name, **options)
    assert_same(loaded, sets[expected])
    assert info.weights == expected
    assert info.other_weights == tuple(name for name in sets if name != expected)


def test_sets_that_a_flat_file_names_in_its_keys_are_separated(tmp_path):
    sets = {"generator": tiny_wan(seed=1, layers=1), "generator_ema": tiny_wan(seed=2, layers=1)}
    flat = {"critic.model.blocks.0.self_attn.q.weight": torch.zeros(2, 2)}
    for name, weights in sets.items():
        flat |= prefixed(weights, f"{name}.model.")
    save_file(flat, tmp_path / "longlive_base.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "longlive_base.safetensors")
    assert_same(loaded, sets["generator"])
    assert (info.weights, info.layout) == ("generator", "original names, prefix model.")
    assert info.other_weights == ("generator_ema",)


def test_parameters_and_the_old_pickle_format_load_as_plain_tensors_under_any_suffix(tmp_path):
    weights = tiny_wan(layers=1)
    stored = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    torch.save({"generator": stored}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    torch.save(weights, tmp_path / "x.safetensors")
    save_file(weights, tmp_path / "y.pt")
    for name in ("x.pt", "x.safetensors", "y.pt"):
        loaded, _ = load_dit_state_dict(tmp_path / name)
        assert_same(loaded, weights)
        assert not any(value.requires_grad or isinstance(value, torch.nn.Parameter) for value in loaded.values())


def save_shards(weights, folder, stem="diffusion_pytorch_model", count=3):
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    weight_map = {}
    for i in range(count):
        shard = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        part = names[i::count]
        save_file({name: weights[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_load_from_repository_folder_index_or_any_shard(tmp_path):
    weights = tiny_wan()
    repository = tmp_path / "krea-realtime-video"
    folder = repository / "transformer"
    save_shards(prefixed(weights, "model."), folder)
    index = "diffusion_pytorch_model.safetensors.index.json"
    for path in (repository, folder, folder / index, folder / "diffusion_pytorch_model-00002-of-00003.safetensors"):
        loaded, info = load_dit_state_dict(path)
        assert_same(loaded, weights)
        assert info.family.id == "krea_realtime", path
        assert info.file_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    (folder / index).unlink()
    torch.save({"decoder.conv1.weight": torch.zeros(1)}, folder / "Wan2.1_VAE.pth")  # left aside
    assert_same(load_dit_state_dict(folder)[0], weights)


def test_a_family_that_the_name_does_not_settle_is_noted(tmp_path):
    (tmp_path / "framewise").mkdir()
    for folder, frames, noted in (
        (tmp_path / "framewise", 1, "family read from the folder name framewise"),
        (tmp_path, 3, "assumed to be Causal Forcing, chunk by chunk"),
    ):
        torch.save({"generator": tiny_wan(layers=1)}, folder / "causal_forcing.pt")
        info = inspect_checkpoint(folder / "causal_forcing.pt")
        assert info.family.frames_per_chunk == frames
        assert noted in info.notes[0]


def test_other_weights_in_the_file_are_skipped_and_named(tmp_path):
    weights = tiny_wan(layers=1)
    extra = {"first_stage_model.decoder.conv.weight": torch.zeros(1), "freqs": torch.zeros(3)}
    save_file(prefixed(weights, "model.diffusion_model.") | extra, tmp_path / "all.safetensors")
    loaded, info = load_dit_state_dict(tmp_path / "all.safetensors")
    assert_same(loaded, weights)
    assert any("first_stage_model" in note and note.startswith("1 weights") for note in info.notes)


def test_an_unknown_name_is_noted_unless_the_metadata_say_that_it_is_autoregressive(tmp_path):
    weights = tiny_wan(layers=1)
    save_file(weights, tmp_path / "wan2.1_t2v_1.3B_bf16.safetensors")
    (note,) = inspect_checkpoint(tmp_path / "wan2.1_t2v_1.3B_bf16.safetensors").notes
    assert "the name of plain Wan 2.1" in note
    assert "the same keys and shapes" in note
    config = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    save_file(weights, tmp_path / "mine.safetensors", metadata=config)
    info = inspect_checkpoint(tmp_path / "mine.safetensors")
    assert info.causal_metadata
    assert info.metadata == config
    assert info.notes == ()


def test_loaded_weights_survive_the_file_and_writing_to_them_does_not_change_it(tmp_path):
    for name, save in (("x.pt", torch.save), ("x.safetensors", save_file)):
        weights = tiny_wan(layers=1)
        save(weights, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        loaded, _ = load_dit_state_dict(tmp_path / name)
        loaded["blocks.0.ffn.0.bias"].add_(1)
        assert (tmp_path / name).read_bytes() == before
        (tmp_path / name).unlink()
        loaded["blocks.0.ffn.0.bias"].sub_(1)
        assert torch.allclose(loaded["blocks.0.ffn.0.bias"], weights["blocks.0.ffn.0.bias"], atol=1e-5)

"""Fixtures that need a ComfyUI checkout: a running server, tiny weights in its folders, and scripts inside it.

`COMFYUI_PATH` is the checkout, `COMFYUI_PYTHON` a Python with its requirements; without them these tests skip.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightforcing.lightforcing_core.model.wan import random_state_dict
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict

from ..support.comfy_server import ComfyServer, environment
from ..support.graphs import EMBEDS, OTHER_EMBEDS
from ..support.tiny_demo import write_tiny_demo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TEXT_DIM = 4096


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a ComfyUI these tests skip, one line per file."""
    if os.environ.get("COMFYUI_PATH") and os.environ.get("COMFYUI_PYTHON"):
        return
    skip = pytest.mark.skip(reason="COMFYUI_PATH and COMFYUI_PYTHON are not set: no ComfyUI to test in")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def comfyui() -> tuple[Path, str]:
    """The checkout and the Python that runs it."""
    return Path(os.environ["COMFYUI_PATH"]), os.environ["COMFYUI_PYTHON"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory whose models/ holds tiny weights in the published layouts."""
    base = tmp_path_factory.mktemp("comfy")
    folders = {name: base / "models" / name for name in ("diffusion_models", "vae", "loras", "text_embeds")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    dit = random_state_dict(dim=256, ffn_dim=512, layers=2, text_dim=TEXT_DIM, seed=1)
    save_file(dit, folders["diffusion_models"] / "tiny_wan.safetensors")
    causal = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    save_file(dit, folders["diffusion_models"] / "tiny_causal.safetensors", metadata=causal)
    plain = random_state_dict(dim=256, ffn_dim=512, layers=2, text_dim=TEXT_DIM, seed=2)
    container = {"generator": _prefixed("model.", plain), "generator_ema": _prefixed("model.", dit)}
    torch.save(container, folders["diffusion_models"] / "self_forcing_dmd.pt")
    torch.save({"generator_ema": container["generator_ema"]}, folders["diffusion_models"] / "long_video_gen.pt")
    save_file(dit, folders["diffusion_models"] / "causal_forcing-framewise.safetensors")
    i2v = random_state_dict(dim=256, ffn_dim=512, layers=2, text_dim=TEXT_DIM, seed=1)
    i2v["patch_embedding.weight"] = torch.randn(256, 36, 1, 2, 2) * 0.1
    save_file(i2v, folders["diffusion_models"] / "wan_i2v.safetensors")
    save_file({"a.weight": torch.zeros(4, 4)}, folders["diffusion_models"] / "no_wan.safetensors")
    save_file(random_vae_state_dict(dim=8, seed=3), folders["vae"] / "tiny_lightvae.safetensors")
    metadata = {"format": "light_forcing_text_embeds", "entries": json.dumps([{"pooled_output": None}])}
    for seed, name in ((5, EMBEDS), (6, OTHER_EMBEDS)):
        cond = torch.randn(1, 12, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
        save_file({"0.cond": cond}, folders["text_embeds"] / name, metadata=metadata)
    generator = torch.Generator().manual_seed(4)
    lora = {}
    for layer in range(2):
        for name in ("q", "k", "v", "o"):
            key = f"diffusion_model.blocks.{layer}.self_attn.{name}"
            lora[f"{key}.lora_A.weight"] = torch.randn(4, 256, generator=generator) * 0.2
            lora[f"{key}.lora_B.weight"] = torch.randn(256, 4, generator=generator) * 0.2
    save_file(lora, folders["loras"] / "tiny_lora.safetensors")
    write_tiny_demo(base / "models")
    return base


def _prefixed(prefix: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in state_dict.items()}


@pytest.fixture(scope="session")
def server(comfyui: tuple[Path, str], models: Path) -> Iterator[ComfyServer]:
    """A running server with the pack linked under a folder name that means nothing."""
    checkout, python = comfyui
    running = ComfyServer(python, checkout, models, ROOT, "Renamed_pack-2")
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def run_inside(comfyui: tuple[Path, str], models: Path) -> Callable[..., Any]:
    """Run in_comfy/SCRIPT.py under ComfyUI's Python; the JSON value on its last line, unless `returns` is false."""
    scripts = HERE / "in_comfy"  # with `comfyui`, which all of them import
    checkout, python = comfyui

    def run(script: str, *arguments: str, returns: bool = True) -> Any:
        done = subprocess.run(
            [python, str(scripts / f"{script}.py"), str(checkout), str(ROOT), str(models), *arguments],
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=300,
            env={**environment(), "PYTHONPATH": str(scripts)},
        )
        assert done.returncode == 0, f"{script} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return json.loads(done.stdout.strip().splitlines()[-1]) if returns else None

    return run

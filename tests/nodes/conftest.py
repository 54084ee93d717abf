"""Fixtures that need a ComfyUI checkout: a running server, tiny weights in its folders, and scripts inside it.

`COMFYUI_PATH` is the checkout, `COMFYUI_PYTHON` a Python with its requirements; without them these tests skip.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lightforcing.lightforcing_core.files.tensors import write_tensors
from lightforcing.lightforcing_core.files.video import VideoWriter
from lightforcing.lightforcing_core.model.wan import random_state_dict
from lightforcing.lightforcing_core.rollout.text_embeds import save_embeds
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict

from ..support.checkpoint_samples import prefixed
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
    """A base directory whose models/ holds tiny weights in the published layouts, and input/ a picture and a clip."""
    base = write_tiny_demo(tmp_path_factory.mktemp("comfy") / "models").parent
    folder = base / "models" / "diffusion_models"
    dit, plain = (random_state_dict(dim=256, ffn_dim=512, layers=2, text_dim=TEXT_DIM, seed=seed) for seed in (1, 2))
    causal = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    for name, stored, metadata in (
        ("tiny_wan", dit, None),
        ("tiny_causal", dit, causal),
        ("causal_forcing-framewise", dit, None),
        ("wan_i2v", dit | {"patch_embedding.weight": torch.randn(256, 36, 1, 2, 2) * 0.1}, None),
    ):
        save_file(stored, folder / f"{name}.safetensors", metadata=metadata)
    ema = {"generator_ema": prefixed(dit, "model.")}
    torch.save(ema | {"generator": prefixed(plain, "model.")}, folder / "self_forcing_dmd.pt")
    torch.save(ema, folder / "long_video_gen.pt")
    write_tensors(base / "models" / "vae" / "tiny_lightvae.safetensors", random_vae_state_dict(dim=8, seed=3), {})
    generator = torch.Generator().manual_seed(4)
    lora = {}
    for key in (f"diffusion_model.blocks.{layer}.self_attn.{name}" for layer in range(2) for name in "qkvo"):
        lora[f"{key}.lora_A.weight"] = torch.randn(4, 256, generator=generator) * 0.2
        lora[f"{key}.lora_B.weight"] = torch.randn(256, 4, generator=generator) * 0.2
    write_tensors(base / "models" / "loras" / "tiny_lora.safetensors", lora, {})
    for seed, name in ((5, EMBEDS), (6, OTHER_EMBEDS)):
        cond = torch.randn(1, 12, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
        save_embeds(base / "models" / "text_embeds" / name, [[cond, {"pooled_output": None}]])
    pixels = np.random.default_rng(0).integers(0, 256, (9, 90, 120, 3), dtype=np.uint8)
    with VideoWriter(base / "input" / "example.mp4", height=90, width=120, fps=16) as video:
        video.write(pixels)
    Image.fromarray(pixels[0]).save(base / "input" / "example.png")
    return base


@pytest.fixture(scope="session")
def start_server(comfyui: tuple[Path, str]) -> Callable[..., Any]:
    """Start ComfyUI on a base directory with the pack linked under a folder name, until the end of the block."""

    @contextmanager
    def start(base: Path, pack_folder: str) -> Iterator[ComfyServer]:
        checkout, python = comfyui
        running = ComfyServer(python, checkout, base, ROOT, pack_folder)
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.stop()

    return start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Any], models: Path) -> Iterator[ComfyServer]:
    """A running server with the pack linked under a folder name that means nothing."""
    with start_server(models, "Renamed_pack-2") as running:
        yield running


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

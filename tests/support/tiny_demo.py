"""A demo model of a few thousand numbers, untrained, in the files that a trained one has."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from laboratory.training.export import new_table
from lightforcing.lightforcing_core.demo.captions import VOCABULARY
from lightforcing.lightforcing_core.demo.model import ABOUT, DIT, TEXT, VAE, DemoVideo
from lightforcing.lightforcing_core.files.tensors import write_tensors
from lightforcing.lightforcing_core.model.wan import random_state_dict
from lightforcing.lightforcing_core.vae.wan_vae import random_vae_state_dict

TEXT_DIM = 32
TINY_VIDEO = DemoVideo(height=32, width=48, frames=33, frames_per_chunk=3, block=16, level="simple")


def write_tiny_demo(folder: Path, video: DemoVideo = TINY_VIDEO, layers: int = 2) -> Path:
    """The three files in `folder`, as laboratory/training exports them."""
    config = {"config": json.dumps({"transformer": {"causal_ar": True, "text_dim": TEXT_DIM}})}
    dit = random_state_dict(dim=128, ffn_dim=64, layers=layers, text_dim=TEXT_DIM, seed=1)
    files = {
        DIT: (dit, config | {ABOUT: json.dumps(asdict(video))}),
        VAE: (random_vae_state_dict(dim=2, seed=2), {}),
        TEXT: (new_table(TEXT_DIM, 3), {"vocabulary": json.dumps(VOCABULARY)}),
    }
    for name, (tensors, metadata) in files.items():
        halved = {key: x.to(torch.bfloat16).contiguous() for key, x in tensors.items()}
        write_tensors(folder / name, halved, metadata)
    return folder

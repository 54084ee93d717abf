"""Write the trained models as files that this pack and ComfyUI's own loaders read; refuse to exceed 24 MB.

Names and layouts are the published ones. The DiT's text width is not Wan's; ComfyUI reads it from the metadata.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from lightforcing.lightforcing_core.demo.captions import SLOTS, VOCABULARY
from lightforcing.lightforcing_core.demo.model import ABOUT, DIT, TEXT, VAE, DemoVideo
from lightforcing.lightforcing_core.files.tensors import write_tensors
from lightforcing.lightforcing_core.model.wan import Wan
from lightforcing.lightforcing_core.vae.wan_vae import WanVAE

MOST_BYTES = 24_000_000


def new_table(text_dim: int, seed: int) -> dict[str, Tensor]:
    """Random, hence nearly orthogonal, rows in bfloat16: words [vocabulary, text_dim] and slots [SLOTS, text_dim]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"words": len(VOCABULARY), "slots": SLOTS}
    return {name: torch.randn(rows, text_dim, generator=generator).bfloat16() for name, rows in sizes.items()}


def export(folder: Path, dit: Wan, vae: WanVAE, table: dict[str, Tensor], video: DemoVideo) -> list[Path]:
    """The three files in `folder`, bfloat16. Raises ValueError when they are larger than the repository may carry."""
    transformer = {"causal_ar": True, "text_dim": dit.text_embedding[0].in_features}
    files = {
        DIT: (_bfloat16(dit), {"config": json.dumps({"transformer": transformer}), ABOUT: json.dumps(asdict(video))}),
        VAE: (_bfloat16(vae), {}),
        TEXT: (table, {"vocabulary": json.dumps(VOCABULARY)}),
    }
    total = sum(tensor.nbytes for tensors, _ in files.values() for tensor in tensors.values())
    if total > MOST_BYTES:
        raise ValueError(f"the models take {total / 1e6:.1f} MB of {MOST_BYTES / 1e6:.0f}; use fewer layers")
    return [write_tensors(folder / name, tensors, metadata) for name, (tensors, metadata) in files.items()]


def _bfloat16(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in module.state_dict().items()}

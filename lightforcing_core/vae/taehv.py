"""The tiny autoencoders of Wan 2.1, taew2_1 and lighttaew2_1, and their latents.

ComfyUI brings the module tree; `streaming.py` drives it. Both files' tensors have the same names and shapes.
"""

import re
from pathlib import PurePath
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from .wan_vae import check_channels

# The latents that a TAE decodes: the DiT's normalised ones (taew2_1), or the VAE's own (lighttaew2_1).
TaeLatents: TypeAlias = Literal["normalised", "raw"]

_GET_THE_FILE = "use taew2_1 or lighttaew2_1"


def tae_latents_of(file_name: str, stored_dtype: torch.dtype | None) -> TaeLatents:
    """The latents that a TAE file decodes: its name decides, else its stored dtype.

    `lighttae…` takes raw latents and `taew…` normalised ones. Without a telling name float16, in which taew2_1 is
    published, means normalised, any other dtype raw (lighttaew2_1 is published in bfloat16). Raises ValueError for
    a file whose name belongs to another video model.
    """
    stem = PurePath(file_name).stem.lower()
    if "lighttae" in stem:
        return "raw"
    if re.search(r"taew(?:an)?_?2", stem):
        return "normalised"
    if "taehv" in stem and "wan" not in stem:
        raise ValueError(f"{PurePath(file_name or '').name} is the TAE of HunyuanVideo; {_GET_THE_FILE}")
    return "normalised" if stored_dtype == torch.float16 else "raw"


def is_tae(module: nn.Module) -> bool:
    """Whether a module tree is a TAE of any video model."""
    layers = getattr(module, "decoder", None)
    return isinstance(layers, nn.Sequential) and any(is_mem_block(layer) for layer in layers)


def check_tae(tae: Any) -> None:
    convolutions = [layer for layer in tae.decoder if isinstance(layer, nn.Conv2d)]
    check_channels("TAE", convolutions[0].in_channels, convolutions[-1].out_channels, _GET_THE_FILE)


def is_mem_block(layer: nn.Module) -> bool:
    """Whether a layer also takes the previous frame."""
    return hasattr(layer, "skip")

"""Load the demo model: three small files made by `laboratory/training`.

    diffusion_models/light_forcing_demo.safetensors    Wan layout; ComfyUI and `DemoVideo` read its metadata
    vae/light_forcing_demo_vae.safetensors             Wan VAE layout
    light_forcing_demo_text.safetensors                embeddings of captions, with their vocabulary in the metadata

The folders are named like ComfyUI's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..checkpoint.load import inspect_checkpoint, load_dit_state_dict
from ..files.json import read_json
from ..files.tensors import read_tensors
from ..model.wan import Wan, wan_from_state_dict
from ..rollout.schedule import latent_frames_of
from ..vae.wan_vae import WanVAE, vae_from_state_dict
from .captions import VOCABULARY, parse

SHIPPED = Path(__file__).resolve().parents[2] / "workflows" / "models"
DIT = "diffusion_models/light_forcing_demo.safetensors"
VAE = "vae/light_forcing_demo_vae.safetensors"
TEXT = "light_forcing_demo_text.safetensors"
ABOUT = "light_forcing_demo"  # the metadata entry that holds a DemoVideo as JSON
FPS = 16
DEFAULT_CAPTION = "on a plain background a red circle moves right slowly"  # every demo model was trained on it

# The training data. simple: one thing that starts near the middle of a plain background; pillar: the same, passing
# behind a pillar that no caption mentions; full: one or two things on any background.
Level = Literal["simple", "pillar", "full"]


@dataclass(frozen=True)
class DemoVideo:
    """The videos that a demo model was trained on, and their block size.

    height, width: pixels.
    frames: video frames, 1 + 4k.
    frames_per_chunk: latent frames.
    block: tokens per attention block, small enough for frames of this size.
    """

    height: int
    width: int
    frames: int
    frames_per_chunk: int
    block: int
    level: Level

    @property
    def latent_frames(self) -> int:
        return latent_frames_of(self.frames)

    def check(self, caption: str) -> None:
        """ValueError for a caption outside the grammar, and for one that the model was not trained to draw."""
        scene = parse(caption)
        if self.level == "full":
            return
        drawn = "this model draws one thing on a plain background"
        if scene.background != "plain":
            raise ValueError(f"{drawn}, not on a {scene.background} one; write plain")
        if len(scene.things) > 1:
            raise ValueError(f"{drawn}, not two; leave one out")


@dataclass(frozen=True)
class DemoModel:
    """A loaded demo model. table: embeddings, as `captions.context_of` takes them."""

    dit: Wan
    vae: WanVAE
    table: dict[str, Tensor]
    video: DemoVideo


def demo_video(folder: Path) -> DemoVideo:
    """The videos of the demo model in `folder`; raises as `load_demo_model` does."""
    if missing := [name for name in (DIT, VAE, TEXT) if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} has no demo model: {', '.join(missing)} is missing; reinstall the pack, which contains one, or "
            "pass the folder `models` that the training wrote (laboratory/training/README.md)"
        )
    about = inspect_checkpoint(folder / DIT).metadata.get(ABOUT, "")
    try:
        return DemoVideo(**read_json(about))
    except (TypeError, ValueError) as error:
        problem = f"its metadata {ABOUT} is missing or damaged ({error})"
        raise ValueError(f"{folder / DIT}: {problem}; download it, or export it again") from error


def load_demo_model(folder: Path, device: torch.device | str = "cpu") -> DemoModel:
    """Load the demo model in `folder`: bfloat16 on GPUs; on CPUs the DiT in float32, the VAE in its fastest dtype.

    Raises ValueError if files are missing or unusable.
    """
    device, video = torch.device(device), demo_video(folder)
    dtype = vae_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # On a CPU, torch does not vectorise small float32 3-D convolutions; bfloat16 ones take a tenth of the time.
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        vae_dtype = torch.bfloat16
    state_dict, _ = load_dit_state_dict(folder / DIT)
    vae = vae_from_state_dict(_read(folder / VAE)[0], dtype=vae_dtype, device=device)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):  # their fastest memory layout
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return DemoModel(
        wan_from_state_dict(state_dict, dtype=dtype, device=device),
        vae,
        {name: tensor.to(device) for name, tensor in load_table(folder / TEXT).items()},
        video,
    )


def load_table(path: Path) -> dict[str, Tensor]:
    """Load the embeddings of captions. Raises ValueError for a file of another kind or another vocabulary."""
    table, metadata = _read(path)
    if metadata.get("vocabulary") != json.dumps(VOCABULARY) or set(table) != {"words", "slots"}:
        raise ValueError(f"{path} has no embeddings for these captions; use the file that is shipped with the pack")
    return table


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return read_tensors(path, copy=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; download it again") from error

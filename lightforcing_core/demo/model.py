"""The demo model: three small files that the repository ships, and how they become modules and context.

    diffusion_models/light_forcing_demo.safetensors    Wan layout; its metadata hold what ComfyUI and `DemoVideo` read
    vae/light_forcing_demo_vae.safetensors             Wan VAE layout
    light_forcing_demo_text.safetensors                the embeddings of captions, their vocabulary in the metadata

The folders have the names of ComfyUI's own. `laboratory/training` makes all three.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint.load import inspect_checkpoint, load_dit_state_dict
from ..model.wan import Wan, wan_from_state_dict
from ..rollout.schedule import latent_frames_of
from ..vae.wan_vae import WanVAE, vae_from_state_dict
from .captions import VOCABULARY

SHIPPED = Path(__file__).resolve().parents[2] / "workflows" / "models"
DIT = "diffusion_models/light_forcing_demo.safetensors"
VAE = "vae/light_forcing_demo_vae.safetensors"
TEXT = "light_forcing_demo_text.safetensors"
ABOUT = "light_forcing_demo"  # the metadata entry that holds a DemoVideo
FPS = 16
DEFAULT_CAPTION = "on a plain background a red circle moves right slowly"  # within what every demo model has learnt

# What the model has seen; simple: one thing, plain background, starting near the middle; pillar: the same, passing
# behind a pillar that no caption mentions; full: one or two things on any background.
Level = Literal["simple", "pillar", "full"]


@dataclass(frozen=True)
class DemoVideo:
    """The videos that a demo model was trained on, and what suits them.

    height, width: pixels. frames: of the videos, 1 + 4k; frames_per_chunk: latent ones. block: tokens per attention
    block, small enough for frames this small.
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

    @property
    def tokens_per_frame(self) -> int:
        return (self.height // 16) * (self.width // 16)

    def metadata(self) -> dict[str, str]:
        """What the model's file says of it."""
        return {ABOUT: json.dumps(asdict(self))}


@dataclass(frozen=True)
class DemoModel:
    """A demo model, ready to run. table: as `demo_captions.context_of` reads it."""

    dit: Wan
    vae: WanVAE
    table: dict[str, Tensor]
    video: DemoVideo


def is_complete(folder: Path) -> bool:
    """Whether all three files are in `folder`."""
    return all((folder / name).is_file() for name in (DIT, VAE, TEXT))


def demo_video(folder: Path) -> DemoVideo:
    """What the demo model in `folder` makes, without loading it. Raises ValueError as `load_demo_model` does."""
    missing = [name for name in (DIT, VAE, TEXT) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} holds no demo model: {', '.join(missing)} is missing; name the folder `models` that "
            f"the training wrote, or train one (laboratory/training/README.md)"
        )
    about = inspect_checkpoint(folder / DIT).metadata.get(ABOUT)
    if about is None:
        raise ValueError(f"{folder / DIT} does not say what videos it makes; export it again with laboratory/training")
    return DemoVideo(**json.loads(about))


def load_demo_model(folder: Path, device: torch.device | str = "cpu") -> DemoModel:
    """The demo model in `folder`: the DiT in bfloat16 on GPUs and in float32 on CPUs, the VAE in `vae_dtype`.

    Raises ValueError where files are missing or are not what they should be.
    """
    device, video = torch.device(device), demo_video(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    state_dict, _ = load_dit_state_dict(folder / DIT)
    vae = vae_from_state_dict(load_file(folder / VAE), dtype=vae_dtype(device), device=device)
    return DemoModel(
        wan_from_state_dict(state_dict, dtype=dtype, device=device),
        fast_convolutions(vae),
        {name: tensor.to(device) for name, tensor in load_table(folder / TEXT).items()},
        video,
    )


def load_table(path: Path) -> dict[str, Tensor]:
    """A demo model's text table. Raises ValueError for a file of another kind or for another grammar."""
    try:
        with safe_open(path, framework="pt") as file:
            words = json.loads((file.metadata() or {}).get("vocabulary", "null"))
            # Copies, since tensors lie in the file at any address, and how a matrix product rounds can depend on it.
            table = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; get the file again") from error
    if words != list(VOCABULARY) or set(table) != {"words", "slots"}:
        raise ValueError(f"{path} is no text table for this grammar of captions; get the one that came with the pack")
    return table


def vae_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where convolutions are fast in it: on GPUs, and on CPUs with AVX-512.

    On a CPU, torch runs small float32 3-D convolutions unvectorised; those in bfloat16 take a tenth of the time.
    """
    fast = device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if fast else torch.float32


def fast_convolutions(vae: WanVAE) -> WanVAE:
    """The VAE with the memory layout that its 3-D convolutions are fastest in."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae

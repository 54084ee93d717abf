"""The Wan 2.1 text-to-video module tree without ComfyUI, in the published layout.

The tree holds weights and small submodules only; `causal.predict` drives it, as it drives ComfyUI's own tree.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

HEAD_DIM = 128
EPS = 1e-6


class Attention(nn.Module):
    """Projections of attention; q and k are normalised before heads are split."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = dim // HEAD_DIM
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, EPS), nn.RMSNorm(dim, EPS)


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.self_attn = Attention(dim)
        self.norm3 = nn.LayerNorm(dim, EPS)
        self.cross_attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))


class Head(nn.Module):
    """The output projection and its modulation."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))


class Wan(nn.Module):
    """Wan 2.1 T2V of any size. The layers compute in `dtype`; the patch embedding stays float32."""

    patch_size = (1, 2, 2)

    def __init__(
        self,
        *,
        dim: int,
        ffn_dim: int,
        num_layers: int,
        in_dim: int = 16,
        out_dim: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.freq_dim, self.out_dim = dim, dim // HEAD_DIM, freq_dim, out_dim
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim) for _ in range(num_layers))
        self.head = Head(dim, 4 * out_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.head.weight.dtype


def wan_from_state_dict(
    state_dict: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Wan:
    """Build the module tree that a state dict describes.

    Names are Wan's original ones, see `checkpoint.load`; sizes are read from the tensors. `dtype` is the weights' own
    by default. Raises ValueError if a tensor is missing, left over or of the wrong shape, or if the width is not a
    multiple of 128 (Wan's head width).
    """
    try:
        dim, in_dim = state_dict["patch_embedding.weight"].shape[:2]
        sizes = {
            "dim": dim,
            "in_dim": in_dim,
            "out_dim": state_dict["head.head.weight"].shape[0] // 4,
            "ffn_dim": state_dict["blocks.0.ffn.0.weight"].shape[0],
            "text_dim": state_dict["text_embedding.0.weight"].shape[1],
            "freq_dim": state_dict["time_embedding.0.weight"].shape[1],
            "num_layers": 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
        }
    except KeyError as missing:
        raise ValueError(f"{missing.args[0]} is missing; load files with checkpoint.load_dit_state_dict") from None
    if dim % HEAD_DIM:
        raise ValueError(f"width {dim} is not a multiple of {HEAD_DIM}, Wan's head width")
    with torch.device("meta"):
        model = Wan(**sizes)

    def placed(key: str, tensor: Tensor) -> Tensor:
        wanted = torch.float32 if key.startswith("patch_embedding.") else dtype or tensor.dtype
        return tensor.to(device=device, dtype=wanted)

    weights = {key: placed(key, tensor) for key, tensor in state_dict.items()}  # memory may run out here
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the tensors do not fit Wan 2.1 T2V: {str(error).splitlines()[1].strip():.300}") from None
    return model.requires_grad_(False).eval()


def random_state_dict(
    *,
    dim: int = 256,
    ffn_dim: int = 512,
    layers: int = 2,
    text_dim: int = 4096,
    freq_dim: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A random model in the published layout, with stable activations."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Wan(dim=dim, ffn_dim=ffn_dim, num_layers=layers, text_dim=text_dim, freq_dim=freq_dim)
    weights = {}
    for key, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if "norm" in key and key.endswith("weight"):
            values = 1.0 + 0.1 * values
        elif tensor.ndim > 1 and "modulation" not in key:
            values = values / tensor[0].numel() ** 0.5
        else:
            values = 0.1 * values
        weights[key] = values.to(dtype)
    return weights

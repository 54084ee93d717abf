"""The interface of an attention backend, and the call that every backend takes."""

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ....kernels.layer_memory import LayerMemory
from ...fast_path import FastPath
from ..blocks import FrameBlocks
from ..quantised import STORED
from ..selection import BlockSelection

EIGHT_BIT = tuple(STORED.values())

# Dense attention over [B, L, H, D], as ComfyUI or torch computes it.
DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One attention call with matching tensors; shapes are enough to choose a backend.

    q: [B, Lq, H, D].
    k, v: [B, Lk, H, D], in q's dtype, int8 or float8_e4m3fn.
    q_layout, k_layout: the blocks of either side.
    selection: the key blocks that each query block reads; None only while a backend is chosen.
    scale: multiplies the scores, 1/√D if None.
    scales: those of 8-bit k and v, float32 [B, k_blocks, H] each.
    tail: the block means of k and v, [B, k_blocks, H, D] each, that replace the blocks that are not read.
    uneven: query blocks may read different numbers of key blocks.
    dense: the function that `Dense` runs; torch's own attention if None.
    whole: the memory of all slots, of which k, v, scales and tail are the first, and int32 numbers on the device, the
    last of which is k_blocks; for a backend whose launches then are the same for every k_blocks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_layout: FrameBlocks
    k_layout: FrameBlocks
    selection: BlockSelection | None = None
    scale: float | None = None
    scales: tuple[Tensor, Tensor] | None = None
    tail: tuple[Tensor, Tensor] | None = None
    uneven: bool = False
    dense: DenseAttention | None = None
    whole: tuple[LayerMemory, Tensor] | None = None

    @property
    def block(self) -> tuple[int, int]:
        """(query, key) tokens per block."""
        return self.q_layout.block, self.k_layout.block

    @property
    def q_blocks(self) -> int:
        return self.q_layout.frames(self.q.shape[1]) * self.q_layout.per_frame

    @property
    def k_blocks(self) -> int:
        return self.k_layout.frames(self.k.shape[1]) * self.k_layout.per_frame

    @property
    def score_scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5) if self.scale is None else self.scale

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    @property
    def blocks_read(self) -> BlockSelection:
        """The selection; RuntimeError in a call that was made to choose a backend."""
        if self.selection is None:
            raise RuntimeError("this call has no selection, so only its shapes can be used; pass one to run it")
        return self.selection

    def path(self, kind: str) -> FastPath:
        detail = (self.k.dtype, self.tail is not None)
        return FastPath(f"attention: {kind}", self.q.device, self.q.dtype, self.block, self.q.shape[-1], detail)

    def heads(self, heads: slice) -> "Call":
        def cut(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if pair is None else (pair[0][:, :, heads], pair[1][:, :, heads])

        blocks, counts = self.blocks_read
        return replace(
            self,
            q=self.q[:, :, heads],
            k=self.k[:, :, heads],
            v=self.v[:, :, heads],
            selection=BlockSelection(blocks[:, heads], counts[:, heads]),
            scales=cut(self.scales),
            tail=cut(self.tail),
        )


class Backend(ABC):
    """One way to compute block-sparse attention."""

    name: ClassVar[str]
    automatic: ClassVar[bool] = True  # whether "auto" may choose it; others run when named
    pads_frames: ClassVar[bool] = False  # whether it reads keys and values in whole blocks only

    @abstractmethod
    def why_not(self, call: Call) -> str | None:
        """One sentence of why this backend cannot run `call`, or None."""

    def why_not_auto(self, call: Call) -> str | None:
        """Why "auto" does not choose this backend although it can run `call`, or None."""
        return None

    @abstractmethod
    def workspace(self, call: Call) -> int:
        """Bytes that `run` allocates besides its output, at most."""

    @abstractmethod
    def run(self, call: Call) -> Tensor:
        """Compute `call`, for which `why_not` returned None: [B, Lq, H, D] in q's dtype."""


def why_not_package(
    call: Call, name: str, package: str, blocks: Mapping[int, tuple[int, int]], head_dims: tuple[int, ...]
) -> str | None:
    """Why another project's kernel for 16-bit inference cannot run `call`, or None.

    package: what pip installs. blocks: (query, key) tokens per block that it takes, by major compute capability.
    """
    q = call.q
    if call.needs_grad:
        return f"{name} is not set up for gradients"
    if call.tail is not None:
        return f"{name} is not set up for a pooled tail"
    if call.k.dtype != q.dtype:
        return f"{name} is not set up for {call.k.dtype} keys"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{name} takes bfloat16 or float16, not {q.dtype}"
    if q.shape[-1] not in head_dims:
        return f"{name} takes head dims of {' or '.join(map(str, head_dims))}, not {q.shape[-1]}"
    if q.device.type != "cuda" or torch.version.hip:
        return f"{name} runs on NVIDIA GPUs, not on {'AMD GPUs' if torch.version.hip else q.device.type}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if major not in blocks:
        chips = " and ".join(f"sm_{capability}x" for capability in blocks)
        return f"{name} has block sparsity on {chips}, not on sm_{major}{minor}"
    if call.block != blocks[major]:
        return f"{name} takes (query, key) blocks of {blocks[major]} on sm_{major}{minor}, not {call.block}"
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed; install it with `pip install --pre {package}`"
    return None

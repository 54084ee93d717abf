"""A video's tokens in frames, and a frame's tokens in attention blocks.

Blocks never straddle frames; a frame's last block may be ragged. At 512×768 (1536 tokens) and blocks of 64 or 128 this
is exactly the published layout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def block_pair(block: object) -> tuple[int, int]:
    """`block` as (query, key) tokens per block; ValueError for anything else."""
    if not isinstance(block, tuple | list) or len(block) != 2 or not all(isinstance(size, int) for size in block):
        raise ValueError(f"block {block!r} is not a pair of (query, key) tokens per block; use one like (64, 64)")
    return block[0], block[1]


def tile_order(height: int, width: int, block: int) -> Tensor:
    """The order of tokens in which runs of `block` are patches: int64 [tokens].

    Entry i is the row-by-row index of the token that comes i-th. The frame is cut into strips as high as the side of
    a square of `block` tokens, and each strip is read column by column; so no size needs padding.
    """
    side = max(1, round(block**0.5))
    rows, columns = torch.arange(height), torch.arange(width)
    strip, within = rows // side, rows % side
    # Sorted by strip, then column, then the row inside the strip.
    key: Tensor = (strip[:, None] * width + columns) * side + within[:, None]
    return key.flatten().argsort()


@dataclass(frozen=True)
class FrameBlocks:
    """The block layout of one side of attention, in tokens.

    padded: in memory every frame takes whole blocks of rows, the last ones zeros.
    """

    tokens_per_frame: int
    block: int
    padded: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens_per_frame", "block"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} {value} is not positive")

    @property
    def per_frame(self) -> int:
        """Blocks in one frame, the ragged last one included."""
        return -(-self.tokens_per_frame // self.block)

    @property
    def ragged(self) -> bool:
        """Whether the last block of each frame holds fewer than `block` tokens."""
        return self.tokens_per_frame % self.block != 0

    @property
    def padded_tokens_per_frame(self) -> int:
        return self.per_frame * self.block

    @property
    def rows_per_frame(self) -> int:
        """Rows that a frame takes in memory."""
        return self.padded_tokens_per_frame if self.padded else self.tokens_per_frame

    def frames(self, tokens: int) -> int:
        """Whole frames in `tokens` rows; ValueError if the last one is cut."""
        frames, rest = divmod(tokens, self.rows_per_frame)
        if rest or not frames:
            raise ValueError(f"{tokens} tokens are not whole frames of {self.rows_per_frame} tokens; pass whole frames")
        return frames

    def block_lengths(self, frames: int, device: torch.device | str | None = None) -> Tensor:
        """Real tokens of every block of `frames` frames: int64 [frames · per_frame]."""
        one = torch.full((self.per_frame,), self.block, dtype=torch.int64, device=device)
        # fill_ and not an assignment, which would copy a number to the device and wait for it.
        one[-1:].fill_(self.tokens_per_frame - (self.per_frame - 1) * self.block)
        return one.repeat(frames)

    def block_of_token(self, frames: int, device: torch.device | str | None = None) -> Tensor:
        """The block id of every token of `frames` frames: int64 [tokens]."""
        token = torch.arange(frames * self.tokens_per_frame, device=device)
        frame, within = token // self.tokens_per_frame, token % self.tokens_per_frame
        return frame * self.per_frame + within // self.block

    def pad(self, x: Tensor) -> Tensor:
        """[B, L, H, D] with L whole frames → [B, frames · padded_tokens_per_frame, H, D], zeros in the padding."""
        if not self.ragged or self.padded:
            return x
        batch, tokens, heads, dim = x.shape
        # A buffer of its own and no view, because torch.compile also guards on the shape of a view's base.
        padded = x.new_zeros(batch, self.frames(tokens) * self.padded_tokens_per_frame, heads, dim)
        framed = padded.unflatten(1, (-1, self.padded_tokens_per_frame))
        framed[:, :, : self.tokens_per_frame] = x.unflatten(1, (-1, self.tokens_per_frame))
        return padded

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`: [B, frames · padded_tokens_per_frame, H, D] → [B, frames · tokens_per_frame, H, D]."""
        if not self.ragged:
            return x
        framed: Tensor = x.unflatten(1, (-1, self.padded_tokens_per_frame))
        return framed[:, :, : self.tokens_per_frame].flatten(1, 2)

    def real(self, x: Tensor) -> Tensor:
        """The rows of real tokens, of x [B, frames · rows_per_frame, H, D]."""
        return self.unpad(x) if self.padded else x

    def block_means(self, x: Tensor) -> Tensor:
        """Mean over the real tokens of each block, accumulated in float32, in x's dtype.

        x: [B, frames · tokens_per_frame, H, D] → [B, frames · per_frame, H, D].
        """
        blocks: Tensor = self.pad(x).unflatten(1, (-1, self.block))
        sums = blocks.sum(2, dtype=torch.promote_types(x.dtype, torch.float32))
        lengths = self.block_lengths(x.shape[1] // self.tokens_per_frame, x.device)
        return (sums / lengths[None, :, None, None]).to(x.dtype)

    def self_similarity(self, x: Tensor) -> Tensor:
        """Mean cosine of all pairs of tokens in each block, themselves included.

        x: [B, frames · tokens_per_frame, H, D] → float32 [B, H, frames · per_frame].
        """
        return self.block_means(torch.nn.functional.normalize(x.float(), dim=-1)).square().sum(-1).transpose(1, 2)

    def frame_means(self, block_means: Tensor) -> Tensor:
        """Mean over the real tokens of each frame, from its weighted block means.

        block_means: [B, frames · per_frame, H, D] → [B, frames, H, D]. For unragged frames this is the published
        mean of the frame's pooled blocks.
        """
        wide = torch.promote_types(block_means.dtype, torch.float32)
        weights = self.block_lengths(1, block_means.device).to(wide) / self.tokens_per_frame
        framed: Tensor = block_means.unflatten(1, (-1, self.per_frame)).to(wide)
        return (framed * weights[None, None, :, None, None]).sum(2).to(block_means.dtype)

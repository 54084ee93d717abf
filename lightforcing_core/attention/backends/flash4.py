"""Block-sparse attention by FlashAttention-4, as of flash-attn-4 4.0.0b36."""

import torch
from torch import Tensor

from .base import Backend, Call, why_not_package

# What its block-sparse forward takes, by major compute capability: (query, key) tokens per block.
BLOCKS = {9: (128, 128), 10: (256, 128)}


class Flash4(Backend):
    """FlashAttention-4's kernel on sm_90 and sm_100, for blocks that divide a frame."""

    name = "flash4"
    automatic = False  # its speed has not been measured here

    def why_not(self, call: Call) -> str | None:
        if reason := why_not_package(call, "FlashAttention-4", "flash-attn-4", BLOCKS, (64, 128)):
            return reason
        if call.q_layout.ragged or call.k_layout.ragged:
            tokens = call.q_layout.tokens_per_frame
            return f"flash4 has no ragged blocks, and {tokens} tokens per frame are no multiple of {call.block}"
        return None

    def workspace(self, call: Call) -> int:
        return 0

    def run(self, call: Call) -> Tensor:
        """Every listed block is a full one, so no mask is needed."""
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        blocks, counts = call.blocks_read
        none = torch.zeros_like(counts)
        lists = BlockSparseTensorsTorch(
            mask_block_cnt=none,
            mask_block_idx=none[..., None],
            full_block_cnt=counts,
            full_block_idx=blocks.contiguous(),
            block_size=call.block,
        )
        with torch.cuda.device(call.q.device):  # it launches on the current one
            out: Tensor = flash_attn_func(
                call.q, call.k, call.v, softmax_scale=call.score_scale, block_sparse_tensors=lists
            )[0]
        return out

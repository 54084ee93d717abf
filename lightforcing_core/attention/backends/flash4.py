"""Block-sparse attention by FlashAttention-4, as of flash-attn-4 4.0.0b36."""

import importlib.metadata

import torch
from torch import Tensor

from .base import Backend, Call

# What its block-sparse forward takes, by major compute capability: (query, key) tokens per block.
BLOCKS = {9: (128, 128), 10: (256, 128)}


class Flash4(Backend):
    """FlashAttention-4's kernel on sm_90 and sm_100, for blocks that divide a frame."""

    name = "flash4"
    automatic = False  # its speed has not been measured here

    def why_not(self, call: Call) -> str | None:
        q = call.q
        if call.needs_grad:
            return "flash4 is not set up for gradients"
        if call.tail is not None:
            return "flash4 is not set up for a pooled tail"
        if call.k.dtype != q.dtype:
            return f"flash4 is not set up for {call.k.dtype} keys"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"FlashAttention-4 takes bfloat16 or float16, not {q.dtype}"
        if q.shape[-1] not in (64, 128):
            return f"flash4 takes head dims of 64 or 128, not {q.shape[-1]}"
        if q.device.type != "cuda":
            return f"FlashAttention-4 runs on NVIDIA GPUs, not on {q.device.type}"
        major, minor = torch.cuda.get_device_capability(q.device)
        if major not in BLOCKS:
            return f"FlashAttention-4 has block sparsity on sm_90, sm_100 and sm_103, not on sm_{major}{minor}"
        if call.block != BLOCKS[major]:
            wanted = BLOCKS[major]
            return f"FlashAttention-4 takes (query, key) blocks of {wanted} on sm_{major}{minor}, not {call.block}"
        if call.q_layout.ragged or call.k_layout.ragged:
            tokens = call.q_layout.tokens_per_frame
            return f"flash4 has no ragged blocks, and {tokens} tokens per frame are no multiple of {call.block}"
        try:
            importlib.metadata.version("flash-attn-4")
        except importlib.metadata.PackageNotFoundError:
            return "FlashAttention-4 is not installed; install it with `pip install --pre flash-attn-4`"
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

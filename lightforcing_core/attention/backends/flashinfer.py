"""Block-sparse attention by FlashInfer's kernels for Blackwell GPUs, as of flashinfer-python 0.7."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .base import Backend, Call, why_not_package

BLOCK = (64, 64)
SPARSE = "flashinfer.cute_dsl.sparse"
# By major compute capability: module, function, dtypes.
KERNELS = {
    10: ("bsa_attn_sm100_blk64", "bsa_attn_sm100_blk64_fwd", (torch.bfloat16,)),
    12: ("bsa_attn_sm120", "bsa_attn_sm120_blk64_fwd", (torch.bfloat16, torch.float16)),
}


class FlashInfer(Backend):
    """Kernels that read our lists as they are; they plan nothing on the CPU and wait for nothing.

    Their blocks start at multiples of 64 tokens: frames with a ragged last block are padded, keys and values best in
    the cache.
    """

    name = "flashinfer"
    automatic = False  # its speed has not been measured here
    pads_frames = True

    def why_not(self, call: Call) -> str | None:
        if reason := why_not_package(call, "FlashInfer", "flashinfer-python", dict.fromkeys(KERNELS, BLOCK), (128,)):
            return reason
        major = torch.cuda.get_device_capability(call.q.device)[0]
        dtypes = KERNELS[major][2]
        if call.q.dtype not in dtypes:
            return f"FlashInfer's kernel for sm_{major}x takes {' or '.join(map(str, dtypes))}, not {call.q.dtype}"
        try:
            _kernel(major)
        except (ImportError, AttributeError, OSError) as error:
            return f"the installed FlashInfer has no kernel for blocks of 64 here ({error}); update flashinfer-python"
        return None

    def workspace(self, call: Call) -> int:
        """The output with heads first; padded queries, keys, values and output."""
        batch, _, heads, dim = call.q.shape
        row = batch * heads * dim * call.q.dtype.itemsize
        queries, keys = call.q_blocks * BLOCK[0], call.k_blocks * BLOCK[1]
        return row * (
            queries + call.q_layout.ragged * 2 * queries + (call.k_layout.rows_per_frame % BLOCK[1] > 0) * 2 * keys
        )

    def run(self, call: Call) -> Tensor:
        blocks, counts = call.blocks_read
        frames = call.k_blocks // call.k_layout.per_frame
        with torch.cuda.device(call.q.device):  # it launches on the current one
            out: Tensor = _kernel(torch.cuda.get_device_capability(call.q.device)[0])(
                call.q_layout.pad(call.q),
                call.k_layout.pad(call.k),
                call.k_layout.pad(call.v),
                blocks.contiguous(),
                blocks.shape[-1],
                block_sizes=call.k_layout.block_lengths(frames, call.q.device).to(torch.int32),
                q2k_block_nums=counts.contiguous(),
                softmax_scale=call.score_scale,
            )[0]
        return call.q_layout.unpad(out)


def _kernel(major: int) -> Any:
    module, function, _ = KERNELS[major]
    return getattr(import_module(f"{SPARSE}.{module}"), function)

"""Block-sparse attention by our Triton kernel, on NVIDIA GPUs from sm_80 on."""

from torch import Tensor

from ... import machine
from ...fast_path import why_no_kernels
from .base import Backend, Call


class Triton(Backend):
    """The kernel in `kernels/block_sparse.py`, which reads 8-bit keys and values."""

    name = "triton"

    def why_not(self, call: Call) -> str | None:
        if reason := why_no_kernels():
            return reason
        if call.needs_grad:
            return "the Triton kernel has no backward pass; run under torch.no_grad()"
        from ....kernels import block_sparse

        return block_sparse.why_not(call.q, call.block, call.k.dtype)

    def why_not_auto(self, call: Call) -> str | None:
        if call.q.device.type != "cuda":
            return "Triton's interpreter is only for tests and must be named"
        return None

    def workspace(self, call: Call) -> int:
        """The tail's bias: one float32 per query block and key block."""
        return 4 * call.q.shape[0] * call.q.shape[2] * call.q_blocks * call.k_blocks if call.tail else 0

    def run(self, call: Call) -> Tensor:
        """Without a selection every block is read."""
        from ....kernels import block_sparse

        k, v, scales, tail, numbers = call.k, call.v, call.scales, call.tail, None
        if call.whole is not None:
            memory, numbers = call.whole
            k, v, scales, tail = memory.keys, memory.values, memory.scales, memory.tail if tail else None
        return block_sparse.block_sparse_attention(
            call.q,
            k,
            v,
            *(call.selection or (None, None)),
            tokens_per_frame=call.q_layout.tokens_per_frame,
            block_q=call.q_layout.block,
            block_k=call.k_layout.block,
            scale=call.scale,
            scales=scales,
            tail=tail,
            uneven=call.uneven,
            used=None if numbers is None else numbers[-1:],
            machine=machine,
        )

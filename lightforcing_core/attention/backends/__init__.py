"""Attention backends, one object each. The order of `BACKENDS` is the order in which "auto" prefers them.

- `triton`: our kernel, on NVIDIA GPUs from sm_80 on.
- `flex`: `torch.nn.attention.flex_attention`, compiled; any GPU with Triton, x86 CPUs with a C++ compiler.
- `flash4`: FlashAttention-4's block-sparse kernel, only when named.
- `reference`: plain PyTorch everywhere, when named or if nothing else runs on a CPU.

If none of them runs on another device, "auto" takes `DENSE`.
"""

from .base import Backend, Call, DenseAttention, Result
from .dense import Dense, sdpa
from .flash4 import Flash4
from .flex import Flex
from .reference import Reference
from .triton import Triton

TRITON = Triton()
REFERENCE = Reference()
DENSE = Dense()
BACKENDS: tuple[Backend, ...] = (TRITON, Flex(), Flash4(), REFERENCE)
BACKEND_NAMES = tuple(backend.name for backend in BACKENDS)

__all__ = [
    "BACKENDS",
    "BACKEND_NAMES",
    "DENSE",
    "REFERENCE",
    "TRITON",
    "Backend",
    "Call",
    "DenseAttention",
    "Result",
    "sdpa",
]

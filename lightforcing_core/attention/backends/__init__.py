"""Attention backends, one object each, in the order in which "auto" prefers them.

If none of them runs on a device other than a CPU, "auto" takes `DENSE`.
"""

from .base import Backend
from .dense import Dense
from .flash4 import Flash4
from .flashinfer import FlashInfer
from .flex import Flex
from .reference import Reference
from .triton import Triton

TRITON = Triton()
REFERENCE = Reference()
DENSE = Dense()
BACKENDS: tuple[Backend, ...] = (TRITON, Flex(), FlashInfer(), Flash4(), REFERENCE)
BACKEND_NAMES = tuple(backend.name for backend in BACKENDS)

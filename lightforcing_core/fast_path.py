"""Optional fast paths: try one, remember its failure for this run, log it once.

Two kinds of failure are still raised as errors: running out of memory, which says nothing about the path, and a CUDA
error that makes the device unusable.
"""

import contextlib
import functools
import importlib.util
import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")

# Out-of-memory messages of CUDA, Triton's driver and cuBLAS that torch does not raise as OutOfMemoryError.
_OUT_OF_MEMORY = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "can't allocate memory")
# CUDA errors that leave the process without a usable context: every later call on the device fails too.
_CONTEXT_LOST = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "device-side assert triggered",  # other errors of torch mention device-side assertions
    "unspecified launch failure",
    "hardware stack error",
    "invalid program counter",
    "invalid address space",
    "launch timed out",
    "uncorrectable ecc error",
    "context is destroyed",
)

MIN_TRITON = (3, 3)  # that of torch 2.7; older ones order the attention's loads wrongly

_log = logging.getLogger(__name__)
_thread = threading.local()
_failures: dict["FastPath", str] = {}
_said: set[str] = set()
_notes: dict[str, list[str]] = {}
_of_a_run: list[Any] = [_failures, _said, _notes]


class DeviceLost(RuntimeError):
    """A CUDA error after which nothing runs until the process is restarted."""


class FastPath(NamedTuple):
    """One way to do one kind of work; each kind, size and device fails by itself.

    kind: the name that a warning shows, such as "fused store".
    block: (query, key) tokens per attention block, None if the work has no blocks.
    detail: anything else that selects different code.
    """

    kind: str
    device: torch.device
    dtype: torch.dtype
    block: tuple[int, int] | None = None
    head_dim: int | None = None
    detail: Hashable = None

    @property
    def failure(self) -> str | None:
        return _failures.get(self)

    def attempt(self, run: Callable[[], T], instead: str) -> T | None:
        """Return `run()`, or None if it fails now or has failed in this run.

        `instead` ends the warning with the replacement, such as "running the modules". Raises
        torch.OutOfMemoryError if memory runs out, `DeviceLost` if the device is unusable, and the error itself
        while a graph is recorded: that fails the recording only.
        """
        if _failures and self in _failures:  # hashing takes longer than asking whether there are any
            return None
        try:
            return run()
        except Exception as error:
            raise_if_fatal(error)
            if is_recording():
                raise
            size = f", blocks {self.block}" if self.block else ""
            size += f", head dim {self.head_dim}" if self.head_dim else ""
            reason = f"{self.kind} failed on {self.device} in {self.dtype}{size} ({one_line(error)})"
            _failures[self] = reason
            _log.warning("[Light Forcing] %s; %s until the next run", reason, instead)
            return None


def begin_run() -> None:
    """Forget all failures, messages and kept values: a new run tries every fast path again."""
    for memory in _of_a_run:
        memory.clear()


def say_once(level: int, text: str, *, about: str) -> None:
    """Log `text` unless something was logged under `about` in this run."""
    if about not in _said:
        _said.add(about)
        _log.log(level, "%s", text)


def note(about: str, text: str) -> None:
    """Log `text` once in this run and keep it for the run's record: a fast path is not used, and why."""
    texts = _notes.setdefault(about, [])
    if text not in texts:
        texts.append(text)
        _log.info("[Light Forcing] %s: %s", about, text)


def notes() -> dict[str, str]:
    """What was noted in this run, by subject."""
    return {about: "; ".join(texts) for about, texts in _notes.items()}


def kept_for_a_run() -> dict[Hashable, Any]:
    """A new dict that every run begins with empty."""
    kept: dict[Hashable, Any] = {}
    _of_a_run.append(kept)
    return kept


def raise_if_fatal(error: BaseException) -> None:
    """Raise torch.OutOfMemoryError or `DeviceLost` if `error` means either."""
    if isinstance(error, torch.OutOfMemoryError | DeviceLost):
        raise error
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        raise torch.OutOfMemoryError(one_line(error)) from error
    if any(sign in text for sign in _CONTEXT_LOST):
        raise DeviceLost(
            f"the GPU cannot recover from an error ({one_line(error)}); restart ComfyUI or Python"
        ) from error


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Mark this thread as recording a CUDA graph."""
    _thread.recording = True
    try:
        yield
    finally:
        _thread.recording = False


def is_recording() -> bool:
    return getattr(_thread, "recording", False)


@functools.cache
def why_no_kernels() -> str | None:
    """Why the modules of `kernels/` cannot be imported, or None. Import them only after this returned None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with `pip install triton` (Linux) or `pip install triton-windows`"
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
            return f"the kernels need triton 3.3 or newer, not {triton.__version__}; install torch 2.7 or newer"
        from ..kernels import block_sparse, modulation, selection, store  # noqa: F401
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # a triton that is broken or too old
        return f"triton is installed but does not import ({one_line(error)}); reinstall it"
    return None

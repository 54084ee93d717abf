"""The ground floor's door: a kernel's module, or the reason why it cannot be imported here."""

import functools
import importlib
import importlib.util
import threading
from types import ModuleType

recording_thread = threading.local()


def is_recording() -> bool:
    """Whether this thread is recording a CUDA graph: a kernel that fails now fails only the recording."""
    return getattr(recording_thread, "recording", False)


@functools.cache
def kernel_module(name: str) -> ModuleType | str:
    """`kernels/<name>.py`, or one sentence of why it cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with `pip install triton` (Linux) or `pip install triton-windows`"
    try:
        return importlib.import_module(f"....kernels.{name}", __name__)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:  # a triton that is broken or too old
        return f"triton is installed but does not import ({type(error).__name__}: {error}); reinstall it"

"""What a chip and this Triton can do, asked once for all kernels."""

import functools

import torch
import triton
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = (8, 0)
MIN_CAPABILITY_FLOAT8 = (8, 9)  # older chips have no instruction that widens float8_e4m3fn


@triton.jit
def _nothing() -> None:
    pass


# Whether TRITON_INTERPRET was set when kernels were first imported: then they run on any device, slowly.
INTERPRETED = not isinstance(_nothing, triton.JITFunction)
IS_INTERPRETED = tl.constexpr(INTERPRETED)  # for device code


def why_not(kernel: str, x: torch.Tensor, *, float8: bool = False) -> str | None:
    """Why a kernel cannot compute in the dtype of x and on its device, or None.

    kernel: begins the sentence, such as "the fused store". float8: whether it reads or writes float8_e4m3fn.
    """
    device = x.device
    if x.dtype not in DTYPES:
        return f"{kernel} takes bfloat16, float16 or float32, not {x.dtype}"
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip:
        found = "on an AMD GPU" if torch.version.hip else f"on {device.type}"
        return f"{kernel} needs an NVIDIA GPU (or TRITON_INTERPRET=1); the tensors are {found}"
    capability = torch.cuda.get_device_capability(device)
    chip = f"sm_{capability[0]}{capability[1]}"
    if capability < MIN_CAPABILITY:
        return f"{kernel} needs an sm_80 GPU or newer, this one is {chip}"
    if float8 and capability < MIN_CAPABILITY_FLOAT8:
        return f"Triton has no float8_e4m3fn on {chip}; keep the cache in int8 there"
    return None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU; 1 for a CPU, so that the interpreter runs few programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def require(name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if x.shape != shape or x.dtype != dtype or x.device != device:
        raise ValueError(f"{name} must be {dtype} {shape} on {device}, not {x.dtype} {tuple(x.shape)} on {x.device}")

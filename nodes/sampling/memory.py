"""The memory plan of a run on a device that ComfyUI manages."""

import math
from collections.abc import Sequence
from dataclasses import replace

import comfy.model_management
import torch
from comfy.cli_args import PerformanceFeature, args
from comfy.model_management import VRAMState
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ...lightforcing_core.attention.dispatch import choose_backend
from ...lightforcing_core.memory.estimate import MemoryEstimate, ModelSize, estimate
from ...lightforcing_core.memory.plan import LADDER, MemoryPlan, plan_memory
from ...lightforcing_core.model.kv_storage import KVOptions
from ...lightforcing_core.model.wan import HEAD_DIM
from ...lightforcing_core.rollout.state import RunState
from ..comfy import memory_for_a_run
from ..decode import FrameDecoder

# How the widget names the ways to keep the KV cache; auto chooses.
KV_CACHES: dict[str, KVOptions | None] = {
    "auto": None,
    "full": KVOptions(),
    "int8": KVOptions("int8"),
    "fp8": KVOptions("fp8"),
    "host": KVOptions(host=True),
    "int8_host": KVOptions("int8", host=True),
}
# Whole videos of latents that sampling can keep elsewhere: the result, the noisy one, and a preview's copy.
LATENT_COPIES = 3


def kv_cache_input() -> io.Input:
    """The widget of both sampling nodes."""
    return io.Combo.Input(
        "kv_cache",
        options=list(KV_CACHES),
        default="auto",
        optional=True,
        advanced=True,
        tooltip="How the keys and values of past frames are kept. auto: in full if they fit, else in 8 bits (half the "
        "memory, nearly the same video), else in CPU memory (slower); the node shows which. int8, fp8: 8 bits. host: "
        "in CPU memory, copied one layer ahead. int8_host: both.",
    )


def plan_of(
    model: ModelPatcher, run: RunState, kv: KVOptions | None, decoder: FrameDecoder | None, *, saved: bool
) -> MemoryPlan:
    """How `run` is kept in the card's memory. kv: how the KV cache shall be kept; None chooses.

    saved: the run goes on with the precision that it began with; only the place of its cache is open.
    """
    base, device = model.model, model.load_device
    dtype = base.get_dtype_inference()
    recipe = run.recipe
    batch, _, frames, height, width = recipe.latent_shape
    size = ModelSize.of_module(model.get_model_object("diffusion_model"))
    # With --novram weights are only on the card while they are used.
    leaves = comfy.model_management.vram_state == VRAMState.NO_VRAM
    size = replace(size, weight_bytes=0 if leaves else model.model_size())
    tokens = height * width // 4
    visible = min(recipe.window or frames, frames)
    q, k = (
        torch.empty(1, dtype=dtype, device=device).expand(batch, length * tokens, size.dim // HEAD_DIM, HEAD_DIM)
        for length in (max(recipe.chunk_lengths()), visible)
    )
    attention = recipe.attention
    backend = choose_backend(q, k, tokens_per_frame=tokens, block=attention.block, backend=attention.backend).name

    def estimate_of(kv: KVOptions, tiles: int) -> MemoryEstimate:
        with torch.inference_mode(False):  # inference mode hides the smaller operations inside an operation
            needed = estimate(size, recipe, kv=kv, backend=backend, dtype=dtype)
        return needed if decoder is None else replace(needed, **decoder.bytes_of(tiles))

    ladder: Sequence[KVOptions] = LADDER
    if saved:
        ladder = [KVOptions(run.kv_dtype), KVOptions(run.kv_dtype, host=True)]
    elif kv is not None:
        ladder = [kv]
    on_device, is_cuda = device.type != "cpu", device.type == "cuda"
    return plan_memory(
        estimate_of,
        memory_for_a_run(device),
        ladder=ladder if on_device else ladder[: max(1, sum(not options.host for options in ladder))],
        most_tiles=1 if decoder is None else decoder.most_tiles,
        latents=LATENT_COPIES * 4 * math.prod(recipe.latent_shape) if on_device else 0,
        overlap=is_cuda and decoder is not None and decoder.can_run_beside,
        # Nobody has measured them yet: only where the host was started with --fast, which asks for such things. They
        # read weights where they lie, which DynamicVRAM may change.
        cuda_graph=is_cuda and PerformanceFeature.AutoTune in args.fast and not model.is_dynamic(),
    )

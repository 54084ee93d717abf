"""Measure every quantised layer's largest input, for stored activation scales.

On GPUs with FP8 units, ComfyUI 0.27 multiplies such a layer in FP8: it divides activations by `input_scale`, or by 1
without one, and clips them at ±448. On other devices, or with a LoRA that it applies at run time, it multiplies the
dequantised weights. A short video with real prompts shows the layers whose inputs exceed 448 or are so small that e4m3
loses digits.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.files import CheckpointError, open_weights
from ..families import Family
from ..model.fp8 import LARGEST, LAYER_LINEARS, SMALLEST
from ..model.wan import wan_from_state_dict
from ..rollout.loop import rollout
from ..rollout.recipe import Recipe, few_step_sigmas
from ..rollout.runtime import Runtime, StepEvent

CHUNKS = 2  # so that a clean pass runs, and a chunk reads the cache
HEADROOM = 2.0  # other prompts may give larger inputs; e4m3 is a floating-point format, so it loses no digits by this


def read_prompts(path: str | Path, text_dim: int) -> list[Tensor]:
    """Read embeddings [1, tokens, text_dim] from Light Forcing Save Text Embeds; CheckpointError if there are none."""
    contents, *_ = open_weights(path)
    prompts = [value for name, value in sorted(contents.items()) if name.endswith(".cond")]
    if not prompts or any(not isinstance(prompt, Tensor) or prompt.ndim != 3 for prompt in prompts):
        raise CheckpointError(f"{path}: contains no text embeddings; save a prompt with Light Forcing Save Text Embeds")
    if odd := {prompt.shape[-1] for prompt in prompts} - {text_dim}:
        raise CheckpointError(
            f"{path}: its embeddings have a width of {min(odd)} and the model needs {text_dim}; encode the prompt with "
            "the model's own text encoder, umT5 for Wan"
        )
    return prompts


def input_scales(
    state_dict: Mapping[str, Tensor], prompts: Sequence[Tensor], family: Family, on_step: Callable[[int, int], None]
) -> dict[str, float]:
    """The divisor of each layer's inputs with which twice the largest fits e4m3, found on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dit = wan_from_state_dict(state_dict, dtype=torch.bfloat16, device=device)
    prompts = [prompt.to(device, torch.bfloat16) for prompt in prompts]
    largest = largest_inputs(dit, prompts, family, on_step=on_step)
    return {name: HEADROOM * max(value, SMALLEST) / LARGEST for name, value in largest.items()}


def largest_inputs(
    dit: nn.Module,
    prompts: Sequence[Tensor],
    family: Family,
    *,
    latent_size: tuple[int, int] = (32, 56),
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Layer → its largest input magnitude, over a dense two-chunk video per prompt.

    dit: a Wan tree (see `wan.py`), which runs on its own device. prompts: [1, tokens, text_dim] each.
    latent_size: (h, w) of the latents; by default those of 256×448 pixels.
    on_step: called with the number of finished denoising steps and their total.

    Raises NotFinite with the first chunk that is not finite, as it is after any input that is not.
    """
    blocks: Any = dit.blocks
    device = next(dit.parameters()).device
    names = [f"blocks.{i}.{name}" for i in range(len(blocks)) for name in LAYER_LINEARS]
    largest = {name: torch.zeros((), device=device) for name in names}

    def record(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        torch.maximum(largest[name], inputs[0].abs().amax().float(), out=largest[name])

    def stepped(before: int, event: StepEvent) -> None:
        if on_step:
            on_step(before * event.total + event.done, len(prompts) * event.total)

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(dit.get_submodule(name).register_forward_pre_hook(partial(record, name)).remove)
        for index, prompt in enumerate(prompts):
            recipe = Recipe(
                latent_shape=(1, 16, CHUNKS * family.frames_per_chunk, *latent_size),
                frames_per_chunk=family.frames_per_chunk,
                sigmas=few_step_sigmas(family.denoising_steps, family.shift),
                context=prompt,
                seed=index,
            )
            for _ in rollout(dit, recipe, Runtime(on_step=partial(stepped, index))):
                pass
    return {name: value.item() for name, value in largest.items()}

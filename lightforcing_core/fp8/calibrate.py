"""How large the inputs of each quantised layer become, for FP8 formats that fix an activation's scale in the file.

ComfyUI's FP8 divides activations by `input_scale`, 1 without one, and cuts them off at ±448. One short video with real
prompts tells where 448 is not enough, or where inputs are so small that e4m3 loses digits.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.files import CheckpointError, open_weights
from ..families import Family
from ..rollout.rollout import StepEvent, few_step_sigmas, rollout
from .linear import LARGEST, LAYER_LINEARS, SMALLEST

CHUNKS = 2  # the second one reads a cache, and between them lies a clean pass
HEADROOM = 2.0  # other prompts may go higher; e4m3 is a floating format, so room above costs it no digits
_LATENT_HEIGHT, _LATENT_WIDTH = 32, 56  # 256×448 pixels


def read_prompts(path: str | Path) -> list[Tensor]:
    """The text embeddings [1, tokens, text_dim] in a file of Light Forcing Save Text Embeds.

    Raises CheckpointError, which names the file, where there are none.
    """
    contents = open_weights(path).contents
    prompts = [value for name, value in sorted(contents.items()) if name.endswith(".cond")]
    if not prompts or any(not isinstance(prompt, Tensor) or prompt.ndim != 3 for prompt in prompts):
        raise CheckpointError(
            f"{path}: holds no text embeddings; encode a prompt in ComfyUI and save it with Light Forcing Save Text "
            "Embeds"
        )
    return prompts


def largest_inputs(
    dit: nn.Module,
    prompts: Sequence[Tensor],
    family: Family,
    *,
    latent_size: tuple[int, int] = (_LATENT_HEIGHT, _LATENT_WIDTH),
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Layer → the largest magnitude that went into it while a video of two chunks was made for each prompt.

    dit: a Wan tree (see `wan.py`); it runs where its weights lie, dense, with the family's chunks and steps. prompts:
    [1, tokens, text_dim] each. latent_size: h, w of the latents. on_step: called with the number of denoising steps
    done and their total. Raises ValueError where an input is not finite.
    """
    blocks: Any = dit.blocks
    device = next(dit.parameters()).device
    names = [f"blocks.{i}.{name}" for i in range(len(blocks)) for name in LAYER_LINEARS]
    largest = {name: torch.zeros((), device=device) for name in names}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
            torch.maximum(largest[name], inputs[0].abs().amax().float(), out=largest[name])

        return see

    hooks = [dit.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        for index, prompt in enumerate(prompts):

            def stepped(event: StepEvent, before: int = index) -> None:
                if on_step:
                    on_step(before * event.total + event.done, len(prompts) * event.total)

            chunks = rollout(
                dit,
                prompt,
                latent_shape=(1, 16, CHUNKS * family.frames_per_chunk, *latent_size),
                frames_per_chunk=family.frames_per_chunk,
                sigmas=few_step_sigmas(family.denoising_steps, family.shift),
                seed=index,
                on_step=stepped,
            )
            for _ in chunks:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: value.item() for name, value in largest.items()}
    if broken := [name for name, value in found.items() if not value < float("inf")]:
        raise ValueError(f"the inputs of {broken[0]} are not finite; the weights or the prompt are damaged")
    return found


def input_scales(largest: Mapping[str, float]) -> dict[str, float]:
    """What to divide each layer's inputs by, so that twice the largest one seen still fits e4m3."""
    return {name: HEADROOM * max(value, SMALLEST) / LARGEST for name, value in largest.items()}

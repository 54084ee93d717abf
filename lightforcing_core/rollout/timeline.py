"""Prompts that change while the video runs: which text each chunk follows, and what a change does to the past."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Switch = Literal["hard", "soft", "blend"]


@dataclass(frozen=True)
class Prompt:
    """A text that holds from chunk `start_chunk` on.

    context: [B or 1, tokens, text_dim]. `switch` says what its start does: "hard" recomputes the visible past under
    the new text (LongLive's KV re-cache), "soft" changes the text only, so the picture follows gradually, and
    "blend" moves from the old text to the new one over `blend_chunks` chunks, each of them a soft change.
    """

    context: Tensor
    start_chunk: int = 0
    switch: Switch = "hard"
    blend_chunks: int = 1

    def __post_init__(self) -> None:
        if self.context.ndim != 3 or not self.context.shape[1]:
            shape = tuple(self.context.shape)
            raise ValueError(f"context has shape {shape}; expected [batch, tokens, text_dim] with tokens")
        if self.start_chunk < 0:
            raise ValueError(f"start_chunk {self.start_chunk} is negative; the video starts at chunk 0")
        if self.switch not in get_args(Switch):
            raise ValueError(f"switch {self.switch!r} is not known; use one of {', '.join(get_args(Switch))}")
        if self.blend_chunks < 1:
            raise ValueError(f"blend_chunks {self.blend_chunks} is not positive; 1 switches at once")


class Timeline:
    """The prompts of one video in order of their start; the first one holds from the beginning."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = sorted(prompts, key=lambda prompt: prompt.start_chunk)
        if not self.prompts or self.prompts[0].start_chunk:
            first = self.prompts[0].start_chunk if self.prompts else None
            raise ValueError(f"no prompt starts at chunk 0 (the first starts at {first}); the video needs one there")
        for one, other in zip(self.prompts, self.prompts[1:], strict=False):
            if one.start_chunk == other.start_chunk:
                raise ValueError(f"two prompts start at chunk {one.start_chunk}; move one of them")
            if one.context.shape[2] != other.context.shape[2]:
                widths = one.context.shape[2], other.context.shape[2]
                raise ValueError(f"prompts have text widths {widths[0]} and {widths[1]}; use one text encoder for all")

    def text(self, chunk: int) -> Tensor:
        """The context that chunk `chunk` follows, [B or 1, tokens, text_dim]."""
        index = self._index(chunk)
        prompt = self.prompts[index]
        step = chunk - prompt.start_chunk + 1
        if index == 0 or prompt.switch != "blend" or step >= prompt.blend_chunks:
            return prompt.context
        old, new = _same_length(self.prompts[index - 1].context, prompt.context)
        return torch.lerp(old, new, step / prompt.blend_chunks)

    def changes_at(self, chunk: int) -> Switch | None:
        """What happens to the text when chunk `chunk` begins, None when it stays."""
        index = self._index(chunk)
        prompt = self.prompts[index]
        if index == 0:
            return None
        if prompt.switch == "blend":
            return "soft" if chunk - prompt.start_chunk < prompt.blend_chunks else None
        return prompt.switch if chunk == prompt.start_chunk else None

    def _index(self, chunk: int) -> int:
        return max(i for i, prompt in enumerate(self.prompts) if prompt.start_chunk <= chunk)


def _same_length(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both contexts padded with zeros to the longer one's tokens; Wan reads zeros as "no more text"."""
    tokens = max(one.shape[1], other.shape[1])

    def padded(context: Tensor) -> Tensor:
        return torch.nn.functional.pad(context, (0, 0, 0, tokens - context.shape[1]))

    return padded(one), padded(other)

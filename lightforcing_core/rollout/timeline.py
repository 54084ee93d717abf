"""Prompts that change while the video runs: the text of each chunk, and how the past follows a change."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..refusal import Refusal, check_choice, check_finite

Switch = Literal["hard", "soft", "blend", "cut"]
FARTHEST = 1000  # latent frames of a cut


@dataclass(frozen=True)
class Prompt:
    """A text that holds from chunk `start_chunk` on.

    context: [B or 1, tokens, text_dim].
    switch: "hard" recomputes the visible past under the new text (LongLive's KV re-cache), "soft" changes the text
        only, so the picture follows gradually, "blend" moves from the old text to the new one over `blend_chunks`
        chunks, each of them a soft change, and "cut" begins a new scene: the text changes, and so does the time.
    jump: latent frames by which a cut moves its chunk and all later ones ahead of the past, see `KVCache.jump`.
    pin: first latent frames of a cut's chunk that stay visible until the next such cut.

    Raises Refusal for anything else.
    """

    context: Tensor
    start_chunk: int = 0
    switch: Switch = "hard"
    blend_chunks: int = 1
    jump: int = 42
    pin: int = 0

    def __post_init__(self) -> None:
        check_text("context", self.context)
        if self.start_chunk < 0:
            raise Refusal("start_chunk", f"{self.start_chunk} is negative", "the video starts at chunk 0")
        check_choice("switch", self.switch, Switch)
        if self.blend_chunks < 1:
            raise Refusal("blend_chunks", f"{self.blend_chunks} is not positive", "1 switches at once")
        for name in ("jump", "pin"):
            if not 0 <= getattr(self, name) <= FARTHEST:
                problem = f"{getattr(self, name)} is outside 0 to {FARTHEST} latent frames"
                raise Refusal(name, problem, "use 42 and 0 for checkpoints of 5 s, 8 and 8 for those trained with cuts")


def check_text(field: str, context: Tensor) -> None:
    """Refusal unless a prompt's embedding is [batch, tokens, text_dim] with at least one token, and finite."""
    if context.ndim != 3 or not context.numel():
        expected = "pass [batch, tokens, text_dim] with at least one token"
        raise Refusal(field, f"has shape {list(context.shape)}", expected)
    check_finite(field, context, "encode the text again")


class Timeline:
    """A video's prompts in order of start, the first from the beginning; Refusal if they make no timeline."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = sorted(prompts, key=lambda prompt: prompt.start_chunk)
        if not self.prompts or self.prompts[0].start_chunk:
            first = f"; the first starts at chunk {self.prompts[0].start_chunk}" if self.prompts else ""
            raise Refusal("context", f"has no prompt that starts at chunk 0{first}", "let one start there")
        for one, other in pairwise(self.prompts):
            if one.start_chunk == other.start_chunk:
                raise Refusal("context", f"has two prompts that start at chunk {one.start_chunk}", "move one of them")
            if one.context.shape[2] != other.context.shape[2]:
                widths = f"{one.context.shape[2]} and {other.context.shape[2]}"
                raise Refusal("context", f"has prompts of text widths {widths}", "use one text encoder for all")

    def text(self, chunk: int) -> Tensor:
        """The context that chunk `chunk` follows, [B or 1, tokens, text_dim]."""
        index = self._index(chunk)
        prompt = self.prompts[index]
        step = chunk - prompt.start_chunk + 1
        if index == 0 or prompt.switch != "blend" or step >= prompt.blend_chunks:
            return prompt.context
        # Padded to the longer one's tokens; Wan reads zeros as "no more text".
        both = self.prompts[index - 1].context.to(prompt.context.device), prompt.context
        tokens, wide = max(context.shape[1] for context in both), torch.promote_types(*(x.dtype for x in both))
        old, new = (pad(context.to(wide), (0, 0, 0, tokens - context.shape[1])) for context in both)
        return torch.lerp(old, new, step / prompt.blend_chunks)

    def changes_at(self, chunk: int) -> Switch | None:
        """How the text changes when chunk `chunk` begins; None if it stays."""
        prompt = self.prompts[self._index(chunk)]
        blends = prompt.switch == "blend"
        if not prompt.start_chunk or chunk - prompt.start_chunk >= (prompt.blend_chunks if blends else 1):
            return None
        return "soft" if blends else prompt.switch

    def cut_at(self, chunk: int) -> Prompt | None:
        """The prompt whose cut chunk `chunk` begins with."""
        prompt = self.prompts[self._index(chunk)]
        return prompt if prompt.switch == "cut" and prompt.start_chunk == chunk > 0 else None

    def _index(self, chunk: int) -> int:
        return max(i for i, prompt in enumerate(self.prompts) if prompt.start_chunk <= chunk)

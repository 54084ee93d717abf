"""Cache rules: which frames stay visible, and where."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...refusal import Refusal

WINDOW = 21  # latent frames: what checkpoints for videos of five seconds were trained to see


@dataclass(frozen=True)
class RollingSink:
    """Bring the video's first frames back, backwards and forwards in turn, for all past frames but the last chunk's.

    So a model sees no distance in time that it was not trained for, and no past that has drifted.
    anchors: the number of first frames that come back; 0: all that a window holds without the current chunk.

    Source: Rolling Sink, arXiv 2602.07775; with 12 anchors they come in the order of Echo-Forcing, arXiv 2605.16003.
    """

    anchors: int = 0
    memory = 0  # chunks between the anchors and the last one

    def __post_init__(self) -> None:
        if self.anchors < 0:
            raise ValueError(f"anchors {self.anchors} is negative; use 0 for as many as fit")

    def fitted(self, window: int, longest_chunk: int) -> "RollingSink":
        """The rule with its number of anchors for a window of latent frames. Raises Refusal if it cannot work."""
        chunks = 2 + self.memory
        least, most = chunks * longest_chunk + 1, window - (1 + 2 * self.memory) * longest_chunk
        if window < least:
            problem = f"{window} has no place for first frames before {chunks} chunks of {longest_chunk}"
            raise Refusal("window", problem, f"use at least {least} latent frames")
        if self.anchors > most:
            problem = f"{self.anchors} do not fit a window of {window} with a chunk of {longest_chunk}"
            raise Refusal("anchors", problem, f"use at most {most}, or 0 for as many as fit")
        return replace(self, anchors=int(self.anchors) or most)

    def moves(
        self, held: Sequence[int], committed: Sequence[int], window: int, first: int = 0
    ) -> list[tuple[int, int, int]]:
        """The slots that get an anchor once a chunk is committed: (slot, anchor, the frame at which it then stands).

        held: the frame of each slot. committed: the chunk's frames. window: slots in all. first: the frame of anchor 0.
        """
        start, length = committed[0], len(committed)
        past = first + window - (1 + 2 * self.memory) * length  # the first frame whose place an anchor takes
        due = range(max(past, start - (1 + self.memory) * length), start - self.memory * length)
        steps = {frame: (frame - past + self.anchors) % (2 * self.anchors) for frame in due}
        return [
            (slot, min(steps[frame], 2 * self.anchors - 1 - steps[frame]), frame)
            for slot, frame in enumerate(held)
            if frame in steps
        ]

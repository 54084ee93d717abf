"""Text widgets that hold one number per chunk: `3: 0.5, 7: 0.8`, or a plain list that starts at chunk 0."""

from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def numbers_per_chunk(text: str, name: str, number: Callable[[str], Number], *, lists: bool) -> dict[int, Number]:
    """Chunk index → number. `lists`: whether plain numbers, chunk 0 first, may stand for `index: number`.

    Raises ValueError naming the part of input `name` that cannot be read.
    """
    found: dict[int, Number] = {}
    for place, part in enumerate(piece.strip() for piece in text.replace("\n", ",").split(",") if piece.strip()):
        index, colon, value = part.rpartition(":")
        try:
            chunk = int(index) if colon or not lists else place
            found_before, found[chunk] = chunk in found, number(value)
        except ValueError:
            example = "0, 0.3, 0.5 or 3: 0.5, 7: 0.8" if lists else "4: 123, 7: 99"
            raise ValueError(f"{name} holds {part!r}, no chunk and its number; write it like {example}") from None
        if chunk < 0 or found_before:
            problem = "is named twice" if found_before else "is negative; the first chunk is 0"
            raise ValueError(f"{name} holds {part!r}, but chunk {chunk} {problem}")
    return found

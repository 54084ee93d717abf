"""The captions of the demo model: scene ⇄ caption → word ids → context tokens.

    on a <background> background a <colour> <shape> moves <direction> <speed> [and a <colour> <shape> moves …]

Cross-attention ignores order, so a context token is the sum of a word's embedding and its slot's. The embeddings are
fixed random rows; the model was trained with them, and they are shipped with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {  # unit steps in the picture, y pointing down
    "right": (1, 0),
    "down-right": (1, 1),
    "down": (0, 1),
    "down-left": (-1, 1),
    "left": (-1, 0),
    "up-left": (-1, -1),
    "up": (0, -1),
    "up-right": (1, -1),
}
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = ("plain", "striped", "checkered", "cloudy")

PADDING = "<pad>"
GRAMMAR = ("on", "a", "an", "background", "moves", "and")
VOCABULARY = (PADDING, *GRAMMAR, *COLOURS, *SHAPES, *DIRECTIONS, *SPEEDS, *BACKGROUNDS)
SLOTS = 18  # the longest caption has 17 words, so that at least one slot is padding
_THING = (("a", "an"), COLOURS, SHAPES, ("moves",), tuple(DIRECTIONS), SPEEDS)
_IDS = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Thing:
    """One moving object, in the grammar's words."""

    colour: str
    shape: str
    direction: str
    speed: str


@dataclass(frozen=True)
class Scene:
    """The content of a video: a background and one or two things of different colours, the first one behind."""

    background: str
    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        colours = [thing.colour for thing in self.things]
        if len(set(colours)) < len(colours):
            raise ValueError(f"two things are {colours[0]}; give each another colour, which distinguishes them")


def caption_of(scene: Scene) -> str:
    """The caption of a scene; the inverse of `parse`."""
    things = " and ".join(f"a {t.colour} {t.shape} moves {t.direction} {t.speed}" for t in scene.things)
    return f"on a {scene.background} background {things}".replace("a orange", "an orange")


def parse(caption: str) -> Scene:
    """The scene that a caption describes; case, commas and full stops do not matter.

    Raises ValueError, which names the first wrong word and the words that are allowed there.
    """
    words = caption.lower().replace(",", " ").replace(".", " ").split(maxsplit=64)  # no caption has as many
    grammar = [("on",), ("a",), BACKGROUNDS, ("background",), *_THING]
    if len(words) > len(grammar):
        grammar += [("and",), *_THING]
    for place, allowed in enumerate(grammar):
        found = words[place] if place < len(words) else "the end"
        if found not in allowed:
            raise ValueError(f"word {place + 1} of the caption is {found!r:.80}; use {' or '.join(allowed)}")
    if extra := words[len(grammar) :]:
        raise ValueError(f"the caption continues with {extra[0]!r} after two things; end it there")
    things = (words[start : start + len(_THING)] for start in range(4, len(grammar), len(_THING) + 1))
    return Scene(words[2], tuple(Thing(*thing[1:3], *thing[4:]) for thing in things))


def word_ids(caption: str) -> list[int]:
    """`SLOTS` ids into `VOCABULARY`, padded at the end; raises as `parse` does."""
    words = caption_of(parse(caption)).split()
    return [_IDS[word] for word in words] + [_IDS[PADDING]] * (SLOTS - len(words))


def context_of(table: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Word ids [B, SLOTS] → context [B, SLOTS, text_dim], float32."""
    return table["words"].float()[ids] + table["slots"].float()


def context_of_caption(table: dict[str, Tensor], caption: str) -> Tensor:
    """A caption → context [1, SLOTS, text_dim], float32; raises as `parse` does."""
    return context_of(table, torch.tensor([word_ids(caption)], device=table["words"].device))

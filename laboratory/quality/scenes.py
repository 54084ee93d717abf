"""The prompts of the laboratory: a fixed list of scenes in which all words come equally often."""

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from lightforcing.lightforcing_core.demo.captions import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    Scene,
    Thing,
)
from lightforcing.lightforcing_core.demo.model import Level

from ..training.shapes import PASSING

PROMPTS = 64  # seed i uses prompt i, modulo this

T = TypeVar("T")


def prompt_scenes(level: Level, count: int = PROMPTS) -> list[Scene]:
    """The first scenes of a level: at "full" every second has two things, at "pillar" each passes behind the pillar."""
    dice = random.Random("light forcing quality laboratory")

    def dealt(words: Sequence[T]) -> Iterator[T]:
        while True:
            yield from dice.sample(list(words), len(words))

    decks = [dealt(words) for words in (COLOURS, SHAPES, tuple(DIRECTIONS), SPEEDS)]
    backgrounds, passing = dealt(BACKGROUNDS), dealt(PASSING)
    scenes = []
    for index in range(count):
        things = [Thing(*(next(deck) for deck in decks))]
        if level == "pillar":
            things = [Thing(things[0].colour, things[0].shape, *next(passing))]
        if level == "full" and index % 2:
            second = Thing(*(next(deck) for deck in decks))
            while second.colour == things[0].colour:
                second = Thing(next(decks[0]), second.shape, second.direction, second.speed)
            things.append(second)
        scenes.append(Scene(next(backgrounds) if level == "full" else "plain", tuple(things)))
    return scenes

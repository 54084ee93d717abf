"""Procedural videos of moving coloured shapes, a function of (seed, index) alone.

Lengths are in units of the picture's height, times in seconds. A shape bounces when its outline meets an edge, and
runs freely for at least its first second, so that a caption's direction can be seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightforcing.lightforcing_core.demo.captions import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    Scene,
    Thing,
)
from lightforcing.lightforcing_core.demo.model import FPS, Level

# Moves that take a shape behind a pillar in the middle of the picture and out again once within five seconds.
PASSING = (
    ("right", "slowly"),
    ("left", "slowly"),
    ("down-right", "quickly"),
    ("down-left", "quickly"),
    ("up-left", "quickly"),
    ("up-right", "quickly"),
)
FREE_RUN = 1.0  # seconds before the first bounce and before any occlusion
HEIGHTS_PER_SECOND = {"slowly": 0.2, "quickly": 0.4}
RADII = (0.11, 0.15)  # of the circle; the other shapes have nearly its area
RGB = {
    "red": (0.86, 0.13, 0.13),
    "orange": (0.98, 0.49, 0.04),
    "yellow": (0.94, 0.90, 0.16),
    "green": (0.16, 0.67, 0.24),
    "cyan": (0.16, 0.82, 0.86),
    "blue": (0.16, 0.27, 0.88),
    "purple": (0.55, 0.18, 0.80),
    "pink": (0.96, 0.45, 0.72),
}
SIMPLE_SPREAD = 0.25  # of the start positions; a small model that must choose among all of them blurs its choices
CANDIDATES = 48  # start positions tried for a clip with two things
PILLAR = 0.32  # width, in the middle of the picture
PILLAR_SHADE = 0.6  # of the background
BEFORE_PILLAR = 0.75  # seconds until a thing reaches it
WAVES = 6  # plane waves in a background


@dataclass(frozen=True)
class Clip:
    """One clip: the scene of its caption, and the numbers that the caption leaves open.

    radii: of each thing. starts, velocities: [things, 2] as (x, y) and per second. aspect: width / height.
    ground: RGB of the background's mean; waves: [WAVES, 4] as amplitude, x and y frequency in cycles, phase.
    pillar: whether a pillar covers the middle of the picture.
    """

    scene: Scene
    aspect: float
    radii: np.ndarray
    starts: np.ndarray
    velocities: np.ndarray
    ground: np.ndarray
    waves: np.ndarray
    pillar: bool = False


def extents(shape: str, radius: float) -> tuple[float, float, float, float]:
    """The reach of an outline from its centre: left, right, up, down."""
    if shape == "circle":
        return radius, radius, radius, radius
    if shape == "square":
        half = 0.886 * radius
        return half, half, half, half
    corner = 1.4 * radius  # distance of an equilateral triangle's corners from its centre
    half = corner * math.sqrt(3) / 2
    return half, half, corner, corner / 2


def draw_clip(seed: int, index: int, *, aspect: float = 1.5, level: Level = "full", frames: int = 81) -> Clip:
    """Clip `index` of the endless list of `seed`. frames: the length within which occlusions should happen."""
    rng = np.random.default_rng([seed, index])
    if level == "pillar":
        return _passing_clip(rng, aspect)
    full = level == "full"
    count = 1 + int(rng.random() < 0.4) if full else 1
    colours = rng.permutation(COLOURS)[:count]
    things = tuple(
        Thing(str(colour), *(str(rng.choice(words)) for words in (SHAPES, list(DIRECTIONS), SPEEDS)))
        for colour in colours
    )
    background = str(rng.choice(BACKGROUNDS)) if full else "plain"
    spread = 1.0 if full else SIMPLE_SPREAD
    return place_scene(Scene(background, things), rng, aspect=aspect, frames=frames, spread=spread)


def _passing_clip(rng: np.random.Generator, aspect: float) -> Clip:
    """One thing that passes behind a pillar."""
    direction, speed = PASSING[rng.integers(len(PASSING))]
    thing = Thing(str(rng.choice(COLOURS)), str(rng.choice(SHAPES)), direction, speed)
    clip = place_scene(Scene("plain", (thing,)), rng, aspect=aspect, spread=SIMPLE_SPREAD)
    velocity = clip.velocities[0, 0]
    left, right, _, _ = extents(thing.shape, float(clip.radii[0]))
    gap = PILLAR / 2 + BEFORE_PILLAR * abs(velocity)
    low, high = _bounds(clip.scene, clip.radii, aspect)
    start = aspect / 2 - gap - right if velocity > 0 else aspect / 2 + gap + left
    clip.starts[0, 0] = np.clip(start, low[0, 0], high[0, 0])
    return replace(clip, pillar=True)


def place_scene(
    scene: Scene, rng: np.random.Generator, *, aspect: float = 1.5, frames: int = 81, spread: float = 1.0
) -> Clip:
    """A clip of `scene`; two things that can cross do so in about half of the clips, and else keep apart.

    spread: the part of all start positions that is used, around their middle; 1 is all.
    """
    count = len(scene.things)
    radii = rng.uniform(*RADII, count)
    steps = [np.array(DIRECTIONS[thing.direction], float) for thing in scene.things]
    speeds = [HEIGHTS_PER_SECOND[thing.speed] for thing in scene.things]
    velocities = np.stack([speed * step / np.linalg.norm(step) for speed, step in zip(speeds, steps, strict=True)])
    low, high = _bounds(scene, radii, aspect)
    first = np.where(velocities < 0, low - FREE_RUN * velocities, low)
    last = np.where(velocities > 0, high - FREE_RUN * velocities, high)
    middle = (first + last) / 2
    starts = middle + spread * (rng.uniform(first, last, (CANDIDATES, count, 2)) - middle)
    crosses = rng.random() < 0.5
    chosen = 0
    if count == 2:
        times = np.arange(frames)[:, None, None, None] / FPS
        paths = _reflect(starts + times * velocities, low, high)
        apart = np.linalg.norm(paths[..., 0, :] - paths[..., 1, :], axis=-1) / radii.sum()
        early, nearest = apart[: round(FREE_RUN * FPS)].min(axis=0), apart.min(axis=0)
        score = np.where(early > 1.5, nearest, 10.0) if crosses else -nearest
        chosen = int(score.argmin())
    ground = np.clip(rng.uniform(0.3, 0.7) + rng.uniform(-0.03, 0.03, 3), 0, 1)
    return Clip(scene, aspect, radii, starts[chosen], velocities, ground, _waves(scene.background, rng))


def paths_of(clip: Clip, frames: int, start: int = 0) -> np.ndarray:
    """Centres of the things in `frames` frames from frame `start` on: [things, frames, 2] as (x, y)."""
    times = np.arange(start, start + frames)[:, None] / FPS
    low, high = _bounds(clip.scene, clip.radii, clip.aspect)
    return _reflect(clip.starts[:, None] + times * clip.velocities[:, None], low[:, None], high[:, None])


def render(
    clips: Sequence[Clip], frames: int, height: int, width: int, *, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Videos of `clips` from frame `start` on, anti-aliased: [B, frames, height, width, 3] in 0…1, float32."""
    x = (torch.arange(width, device=device) + 0.5) / height
    y = (torch.arange(height, device=device) + 0.5) / height
    video = torch.empty(len(clips), frames, height, width, 3, device=device)
    for out, clip in zip(video, clips, strict=True):
        picture = _background(clip, x, y)
        planes = picture[:, None].expand(-1, frames, -1, -1)
        paths = torch.from_numpy(paths_of(clip, frames, start)).to(device, torch.float32)
        for thing, radius, path in zip(clip.scene.things, clip.radii, paths, strict=True):
            dx, dy = x - path[:, :1], y - path[:, 1:]
            inside = (0.5 - _distance(thing.shape, float(radius), dx[:, None], dy[..., None]) * height).clamp(0, 1)
            colour = torch.tensor(RGB[thing.colour], device=device).view(3, 1, 1, 1)
            planes = torch.lerp(planes, colour.expand_as(planes), inside.expand_as(planes))
        if clip.pillar:
            covered = (0.5 + (PILLAR / 2 - (x - clip.aspect / 2).abs()) * height).clamp(0, 1)
            planes = torch.lerp(planes, PILLAR_SHADE * picture[:, None], covered)
        out.copy_(planes.permute(1, 2, 3, 0))
    return video


def _bounds(scene: Scene, radii: np.ndarray, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest centres, [things, 2] each."""
    reach = np.array([extents(t.shape, float(radius)) for t, radius in zip(scene.things, radii, strict=True)])
    return reach[:, [0, 2]], np.array([aspect, 1.0]) - reach[:, [1, 3]]


def _reflect(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """x reflected back and forth between low and high."""
    span = high - low
    return low + span - np.abs((x - low) % (2 * span) - span)


def _distance(shape: str, radius: float, dx: Tensor, dy: Tensor) -> Tensor:
    """Distance outside (positive) or inside (negative) of the outline."""
    if shape == "circle":
        return torch.sqrt(dx.square() + dy.square()) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - extents(shape, radius)[0]
    base = extents(shape, radius)[3]
    return torch.maximum(dy - base, (math.sqrt(3) / 2) * dx.abs() - 0.5 * dy - base)


def _waves(background: str, rng: np.random.Generator) -> np.ndarray:
    """A background's plane waves; those that it does not need have amplitude 0."""
    waves = np.zeros((WAVES, 4))
    waves[:, 3] = rng.uniform(0, 2 * math.pi, WAVES)
    contrast = rng.uniform(0.05, 0.1)
    if background == "striped":
        angle, frequency = rng.uniform(0, math.pi), rng.uniform(3, 6)
        waves[0, :3] = contrast, frequency * math.cos(angle), frequency * math.sin(angle)
    elif background == "checkered":
        frequency = rng.uniform(2, 4)
        waves[:2, :3] = (contrast, frequency, 0), (contrast, 0, frequency)
    elif background == "cloudy":
        angles, frequencies = rng.uniform(0, math.pi, WAVES), rng.uniform(0.4, 1.6, WAVES)
        waves[:, 0] = 0.6 * contrast
        waves[:, 1], waves[:, 2] = frequencies * np.cos(angles), frequencies * np.sin(angles)
    return waves


def _background(clip: Clip, x: Tensor, y: Tensor) -> Tensor:
    """[3, H, W]. A checkerboard is a product of two waves, everything else a sum."""
    waves = torch.from_numpy(clip.waves).to(x)
    amplitude, fx, fy, phase = waves.view(WAVES, 4, 1, 1).unbind(1)
    each = torch.sin(2 * math.pi * (fx * x + fy * y[:, None]) + phase)
    if clip.scene.background == "plain":
        pattern = torch.zeros_like(each[0])
    elif clip.scene.background == "checkered":
        pattern = amplitude[0] * torch.tanh(4 * each[0] * each[1])
    else:
        pattern = (amplitude * each).sum(0)
    return (torch.from_numpy(clip.ground).to(x).view(3, 1, 1) + pattern).clamp(0, 1)

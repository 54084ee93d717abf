"""Detect the things in a video of moving shapes, from its pixels alone, and judge the video against a caption.

A thing is a patch of one saturated hue. Its mean outline gives its shape, the centre of its patch its motion. Lengths
are in units of the picture's height, times in seconds.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lightforcing.lightforcing_core.demo.captions import DIRECTIONS, SHAPES, Scene, Thing

HUES = {  # degrees on the colour wheel
    "red": 0.0,
    "orange": 29.0,
    "yellow": 57.0,
    "green": 129.0,
    "cyan": 183.0,
    "blue": 231.0,
    "purple": 276.0,
    "pink": 328.0,
}
SATURATED = 0.22  # least difference between a pixel's strongest and weakest channel
SMALLEST = 0.012  # least area of a thing, in squared heights
PRESENT = 0.6  # least share of frames that show a thing
WHOLE = 0.85  # a thing with this share of its usual area is not covered by another
PACES = {"slowly": 0.2, "quickly": 0.4}  # heights per second that a caption promises
STILL = 0.08  # heights per second below which a thing does not move
BETWEEN_SPEEDS = 0.28  # heights per second between "slowly" and "quickly"
FASTEST, LEAP = 0.6, 0.1  # a thing's greatest speed, heights per second, and a tolerance for covered outlines
OPENING = 13 / 16  # seconds over which the direction is judged
OUTLINE = 33  # grid of the mean outline
BLUR = 1.155  # pixels, standard deviation of the two blurs in `_colours`; patterns are blurred by as much
COPY = 0.5  # a second thing of a colour has at least this share of the first one's usual area
NEAR = 0.25  # heights around a centre within which pixels belong to the same thing


@dataclass(frozen=True)
class Seen:
    """One thing in a video.

    path: [frames, 2] centres as (x, y). visible, whole: [frames], whether any of it is seen, and all of it.
    velocity: (x, y) over the opening. radius: of a circle of its area. copies: the share of frames in which at least
    half as much of its colour is elsewhere.
    """

    colour: str
    shape: str
    direction: str | None
    speed: str
    path: Tensor
    visible: Tensor
    whole: Tensor
    velocity: tuple[float, float]
    radius: float
    copies: float


@dataclass(frozen=True)
class ThingVerdict:
    """One promised thing in the video. Errors are means over the frames in which it is whole, None if it is absent.

    position_error: distance, in heights, from the path that the caption promises from the thing's first place on;
    position_errors: the same frame by frame, NaN if it is not whole. identity: it is whole again in the last quarter of
    the video, and never, covered stretches included, has it moved further than a thing can. copies: the share of frames
    that show a second thing of its colour.
    """

    present: bool
    shape_right: bool
    direction_right: bool
    speed_right: bool
    identity: bool
    position_error: float | None
    velocity_error: float | None
    copies: float | None
    position_errors: Tensor | None


@dataclass(frozen=True)
class Verdict:
    """A video against its caption. strangers: things of colours that the caption does not name."""

    things: tuple[ThingVerdict, ...]
    strangers: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the promised things, and no others, are there in their colours and shapes and move their ways."""
        return not self.strangers and all(t.present and t.shape_right and t.direction_right for t in self.things)


@torch.no_grad()
def look(video: Tensor, *, fps: float = 16.0) -> list[Seen]:
    """The things in `video`, [frames, H, W, 3] in 0…1, largest first."""
    colours, chroma = _colours(video)
    pixel = 1.0 / colours.shape[1] ** 2
    found = []
    for index, colour in enumerate(HUES):
        mask = (colours == index).float()
        if (mask.flatten(1).sum(1) * pixel > SMALLEST).float().mean() >= PRESENT:
            found.append(_thing(colour, mask, chroma, fps))
    return sorted((seen for seen in found if seen is not None), key=lambda seen: -seen.radius)


def judge(video: Tensor, scene: Scene, *, fps: float = 16.0) -> Verdict:
    """Judge `video`, [frames, H, W, 3] in 0…1, against its caption."""
    return compare(look(video, fps=fps), scene, aspect=video.shape[2] / video.shape[1], fps=fps)


def compare(found: list[Seen], scene: Scene, *, aspect: float, fps: float = 16.0) -> Verdict:
    """Judge the things that `look` found against the caption. aspect: the picture's width / height."""
    seen = {thing.colour: thing for thing in found}
    verdicts = tuple(_verdict(seen.get(thing.colour), thing, aspect, fps) for thing in scene.things)
    return Verdict(verdicts, tuple(sorted(seen.keys() - {thing.colour for thing in scene.things})))


def _colours(video: Tensor) -> tuple[Tensor, Tensor]:
    """The colour of each pixel, as its index in `HUES`, −1 for none, and its saturation.

    Both [frames, h, w], no side far above 64.
    """
    planes = video.float().permute(0, 3, 1, 2)
    if shrink := video.shape[1] // 64:
        planes = F.avg_pool2d(planes, shrink)
    for axis in (2, 3, 2, 3):  # against noise
        planes = _blurred(planes, axis)
    red, green, blue = planes.unbind(1)
    chroma = planes.amax(1) - planes.amin(1)
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))
    # HUES rises around the wheel, so the borders between neighbours do too.
    centres = [*HUES.values(), 360.0]
    borders = torch.tensor([(a + b) / 2 for a, b in pairwise(centres)], device=video.device)
    index = torch.bucketize(hue % 360, borders) % len(HUES)
    return torch.where(chroma > SATURATED, index, -1), chroma


def _blurred(x: Tensor, axis: int) -> Tensor:
    """The mean of three neighbours along an axis; the edges repeat."""
    last = x.shape[axis] - 1
    before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, last)], axis)
    after = torch.cat([x.narrow(axis, 1, last), x.narrow(axis, last, 1)], axis)
    return (before + x + after) / 3


def _crowd(mask: Tensor, half: int) -> Tensor:
    """The share of set pixels in the square of side 2 · half + 1 around each pixel of mask [frames, h, w]."""
    side = 2 * half + 1
    sums = F.pad(mask, (half + 1, half, half + 1, half)).cumsum(1).cumsum(2)
    rows = sums[:, side:] - sums[:, :-side]
    return (rows[:, :, side:] - rows[:, :, :-side]) / side**2


def _thing(colour: str, mask: Tensor, chroma: Tensor, fps: float) -> Seen | None:
    """The thing that a colour's pixels [frames, H, W] show, or None if they are only scattered or a rim.

    chroma: the saturation of each pixel.
    """
    height, width = mask.shape[1:]
    crowd = _crowd(mask, height // 12)
    top = crowd.flatten(1).argmax(1)
    y = (torch.arange(height, device=mask.device) + 0.5) / height
    x = (torch.arange(width, device=mask.device) + 0.5) / height
    path = torch.stack([x[top % width], y[top // width]], dim=1)
    for _ in range(3):
        dx, dy = x - path[:, :1], y - path[:, 1:]
        near = (dx[:, None].square() + dy[..., None].square() < NEAR**2) * mask
        weight = near.flatten(1).sum(1)
        centre = torch.stack([(near.sum(1) * x).sum(1), (near.sum(2) * y).sum(1)], 1) / weight.clamp(min=1)[:, None]
        path = torch.where(weight[:, None] > 0, centre, path)
    area = weight / height**2
    usual = float(area.quantile(0.8))
    compact = float(crowd.flatten(1).amax(1).quantile(0.8))
    if usual < SMALLEST or compact < 0.7:
        return None
    visible, whole = area > 0.25 * usual, area > WHOLE * usual
    velocity = _opening_velocity(path, whole, visible, fps)
    speed = math.hypot(*velocity)
    radius = math.sqrt(usual / math.pi)
    shape = _shape(_inside(mask * near, chroma), path, whole)
    pace = "slowly" if speed < BETWEEN_SPEEDS else "quickly"
    elsewhere = mask.flatten(1).sum(1) / height**2 - area
    copies = float((elsewhere > COPY * usual).float().mean())
    places = path.cpu(), visible.cpu(), whole.cpu()
    return Seen(colour, shape, _direction(velocity), pace, *places, velocity, radius, copies)


def _opening_velocity(path: Tensor, whole: Tensor, visible: Tensor, fps: float) -> tuple[float, float]:
    """Heights per second over the opening: the median slope between frames far enough apart."""
    count = min(len(path), max(2, round(OPENING * fps)))
    index = whole[:count].nonzero()[:, 0]
    if len(index) < 4:
        index = visible[:count].nonzero()[:, 0]
    if len(index) < 2:
        return 0.0, 0.0
    half = len(index) // 2
    first, second = index[: len(index) - half], index[half:]
    steps = (path[second] - path[first]) / (second - first)[:, None] * fps
    vx, vy = steps.median(0).values.tolist()
    return vx, vy


def _direction(velocity: tuple[float, float]) -> str | None:
    """The nearest of the eight directions, or None for a thing that hardly moves."""
    if math.hypot(*velocity) < STILL:
        return None
    angle = math.atan2(velocity[1], velocity[0])
    return max(DIRECTIONS, key=lambda name: math.cos(angle - math.atan2(*reversed(DIRECTIONS[name]))))


def _inside(mask: Tensor, chroma: Tensor) -> Tensor:
    """The pixels of mask [frames, h, w] that are at least half as saturated as the thing.

    A thing ends at the middle of its soft edge; a lower level would make it larger and its corners rounder.
    """
    own = torch.stack([c[m > 0].quantile(0.8) if m.any() else c.amax() for c, m in zip(chroma, mask, strict=True)])
    return mask * (chroma > own[:, None, None] / 2)


def _shape(mask: Tensor, path: Tensor, whole: Tensor) -> str:
    """The shape whose outline of the same area is nearest to the mean outline over the frames that show all of it."""
    index = whole.nonzero()[:, 0] if whole.any() else torch.arange(len(path), device=mask.device)
    index = index[:: max(1, len(index) // 24)]
    height, width = mask.shape[1:]
    radius = math.sqrt(float(mask[index].flatten(1).sum(1).median()) / math.pi) / height
    line = torch.linspace(-1.8, 1.8, OUTLINE, device=mask.device)
    gy, gx = torch.meshgrid(line, line, indexing="ij")
    at_x = (path[index, 0, None, None] + radius * gx) * height / width * 2 - 1
    at_y = (path[index, 1, None, None] + radius * gy) * 2 - 1
    sampled = F.grid_sample(mask[index, None], torch.stack([at_x, at_y], -1), align_corners=False)[:, 0]
    mean = sampled.mean(0)
    # Each pattern has the area of a unit circle, its centre of mass in the middle.
    half, corner = math.sqrt(math.pi) / 2, math.sqrt(4 * math.pi / (3 * math.sqrt(3)))
    distances = {
        "circle": torch.sqrt(gx.square() + gy.square()) - 1,
        "square": torch.maximum(gx.abs(), gy.abs()) - half,
        "triangle": torch.maximum(gy, (math.sqrt(3) / 2) * gx.abs() - 0.5 * gy) - corner / 2,
    }
    blur = _softness(line, BLUR / (radius * height))
    errors = {}
    for name, distance in distances.items():
        seen = blur @ (0.5 - distance / 0.1).clamp(0, 1) @ blur.T
        errors[name] = float((mean - (0.5 + (seen - 0.5) / 0.4).clamp(0, 1)).square().sum())
    return min(SHAPES, key=errors.__getitem__)


def _softness(line: Tensor, width: float) -> Tensor:
    """The matrix that blurs along `line` with a Gaussian of this standard deviation."""
    weights = torch.exp(-0.5 * ((line - line[:, None]) / width).square())
    return weights / weights.sum(1, keepdim=True)


def _verdict(seen: Seen | None, thing: Thing, aspect: float, fps: float) -> ThingVerdict:
    if seen is None:
        return ThingVerdict(False, False, False, False, False, None, None, None, None)
    step = torch.tensor(DIRECTIONS[thing.direction], dtype=torch.float32)
    promised = step / step.norm() * PACES[thing.speed]
    path = seen.path.float()
    start = _first_place(path, seen.whole, promised, fps)
    low, high = _reach(thing.shape, seen.radius, aspect)
    times = torch.arange(len(path))[:, None] / fps
    expected = _bounce(start + times * promised, low, high)
    errors = (path - expected).norm(dim=1)
    errors[~seen.whole] = torch.nan
    gap = torch.tensor(seen.velocity) - promised
    index = seen.whole.nonzero()[:, 0]
    leaps = (path[index[1:]] - path[index[:-1]]).norm(dim=1) - (index[1:] - index[:-1]) / fps * FASTEST
    return ThingVerdict(
        present=True,
        shape_right=seen.shape == thing.shape,
        direction_right=seen.direction == thing.direction,
        speed_right=seen.speed == thing.speed,
        identity=bool(seen.whole[-max(1, len(path) // 4) :].any() and not (leaps > LEAP).any()),
        position_error=float(errors.nanmean()),
        velocity_error=float(gap.norm()),
        copies=seen.copies,
        position_errors=errors,
    )


def _first_place(path: Tensor, whole: Tensor, promised: Tensor, fps: float) -> Tensor:
    """The thing's place in the first frame, from the frames of the first quarter second that show all of it."""
    index = whole.nonzero()[:4, 0] if whole.any() else torch.arange(1)
    return (path[index] - index[:, None] / fps * promised).median(0).values


def _reach(shape: str, radius: float, aspect: float) -> tuple[Tensor, Tensor]:
    """The lowest and highest centres (x, y) of an outline whose area is a circle's of `radius`."""
    if shape == "circle":
        reach = (radius,) * 4
    elif shape == "square":
        reach = (math.sqrt(math.pi) / 2 * radius,) * 4
    else:
        corner = math.sqrt(4 * math.pi / (3 * math.sqrt(3))) * radius
        reach = (corner * math.sqrt(3) / 2,) * 2 + (corner, corner / 2)
    left, right, up, down = reach
    return torch.tensor([left, up]), torch.tensor([aspect - right, 1 - down])


def _bounce(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Straight lines folded between two mirrors."""
    span = high - low
    return low + span - ((x - low).remainder(2 * span) - span).abs()

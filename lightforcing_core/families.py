"""Published families of autoregressive Wan checkpoints, and the defaults of each."""

import re
from dataclasses import dataclass
from itertools import islice, product, takewhile
from pathlib import PurePath
from typing import Any, Literal

SinkRope = Literal["fixed", "follow", "average", "average_float32"]
Weights = Literal["generator", "generator_ema"]

_MODEL_FOLDERS = ("models", "diffusion_models", "unet", "checkpoints")  # ComfyUI's: folders above name no family
# Based on Wan 2.2 TI2V 5B, so no family here.
_LONGLIVE_2 = re.compile(r"longlive[\W_]*(v2(?!\d)|2[._]0|2[\W_]+5b|2(\.[a-z]+)?$)")


@dataclass(frozen=True)
class SparseDefaults:
    """Defaults of sparse attention, see `AttentionOptions`; estimator and tail suit models trained without it.

    reference: latent frames of the video over which Chunk-Aware Growth meets the family's target.
    block: tokens per attention block.
    """

    keep_frames: int = 6
    keep_sink: int = 1
    keep_near: int = 2
    estimator: Literal["mean", "lse"] = "lse"
    tail: bool = True
    policy: str = "light_forcing"
    reference: int = 21
    block: int = 64


@dataclass(frozen=True)
class Family:
    """Facts and defaults of one checkpoint family. frames_per_chunk, window, sink_frames: as in `Recipe`.

    sink_rope: the positions of sink keys after the window has moved: "fixed" keeps their original ones (LongLive),
        "follow" puts them directly before the window (Infinite Forcing, Light Forcing long), and "average" does too and
        adds a thousandth of each chunk that leaves the window (Reward Forcing); "average_float32" does not round that
        to the model's dtype, in which most of it is lost.
    denoising_steps: the few-step list on the 1000-step scale, before the shift.
    first_denoising_steps: another list for the first chunk of the video (Causal Forcing++).
    shift: the flow shift of the noise levels.
    target, base: parameters of Chunk-Aware Growth; the defaults suit models that were trained without sparse attention.
    name_hints: fragments of published names, in lower case without separators; after a space, fragments that must be
        somewhere in the path too.
    weights: the set of weights that the published configuration uses if a file has both.
    """

    id: str
    title: str
    frames_per_chunk: int = 3
    window: int | None = None
    sink_frames: int = 0
    sink_rope: SinkRope = "fixed"
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_denoising_steps: tuple[int, ...] | None = None
    shift: float = 5.0
    target: float = 0.7
    base: float = 0.8
    sparse: SparseDefaults = SparseDefaults()
    name_hints: tuple[str, ...] = ()
    weights: Weights = "generator_ema"


# Settings that several families share.
_FOLLOWING_SINKS: dict[str, Any] = {"window": 21, "sink_frames": 3, "sink_rope": "follow"}
_FIVE_STEPS = _FOLLOWING_SINKS | {"denoising_steps": (1000, 800, 600, 400, 200)}
_TWO_STEPS: dict[str, Any] = {"denoising_steps": (1000, 500), "first_denoising_steps": (1000, 750, 500, 250)}
_ONE_STEP = _TWO_STEPS | {"denoising_steps": (1000,)}

# The first family with a hint in the name is chosen, so the order matters.
FAMILIES: dict[str, Family] = {
    family.id: family
    for family in (
        Family(
            "demo",
            "the demo model of this pack",
            sparse=SparseDefaults(block=16),  # a frame has 54 tokens
            name_hints=("lightforcingdemo",),
        ),
        Family(
            "light_forcing_long",
            "Light Forcing, long video",
            window=12,
            sink_frames=1,
            sink_rope="follow",
            target=0.85,
            base=0.95,
            sparse=SparseDefaults(keep_frames=3, keep_sink=1, keep_near=1, estimator="mean", tail=False, reference=63),
            name_hints=("longvideogen", "lightforcinglong"),
        ),
        Family(
            "light_forcing_short",
            "Light Forcing, 5 s video",
            target=0.88,
            base=0.98,
            sparse=SparseDefaults(estimator="mean", tail=False),
            name_hints=("shortvideogen", "lightforcing"),
        ),
        Family("longlive", "LongLive", window=12, sink_frames=3, name_hints=("longlive",), weights="generator"),
        Family("memflow", "MemFlow", window=12, sink_frames=3, name_hints=("memflow",), weights="generator"),
        Family(
            "reward_forcing",
            "Reward Forcing",
            name_hints=("rewardforcing",),
            **(_FOLLOWING_SINKS | {"window": 9, "sink_rope": "average"}),
        ),
        Family(
            "infinite_forcing",
            "Infinite Forcing",
            window=6,
            sink_frames=1,
            sink_rope="follow",
            sparse=SparseDefaults(keep_frames=2, keep_sink=1, keep_near=1),
            name_hints=("infiniteforcing",),
        ),
        Family(
            "rolling_forcing",
            "Rolling Forcing",
            name_hints=("rollingforcing", "causalforcinglong", "longvideo chunkwise", "longvideo causalforcing"),
            sparse=SparseDefaults(policy="rolling_forcing"),
            **_FIVE_STEPS,
        ),
        Family("wave_forcing_4step", "WaveForcing, 4 steps", name_hints=("waveforcing 4step",), **_FOLLOWING_SINKS),
        Family("wave_forcing_5step", "WaveForcing, 5 steps", name_hints=("waveforcing",), **_FIVE_STEPS),
        Family("one_forcing", "One-Forcing", 1, name_hints=("oneforcing",), weights="generator", **_ONE_STEP),
        Family("causal_forcing_2step", "Causal Forcing++, 2 steps", 1, name_hints=("framewise2step",), **_TWO_STEPS),
        Family("causal_forcing_1step", "Causal Forcing++, 1 step", 1, name_hints=("framewise1step",), **_ONE_STEP),
        Family(
            "causal_forcing_framewise",
            "Causal Forcing, frame by frame",
            frames_per_chunk=1,
            name_hints=("framewise", "causalforcing framewise"),
        ),
        Family(
            "causal_forcing",
            "Causal Forcing, chunk by chunk",
            name_hints=("causalforcing", "chunkwise"),
            weights="generator",
        ),
        Family("krea_realtime", "Krea Realtime 14B", window=6, name_hints=("krea",)),
        Family("self_forcing", "Self Forcing", name_hints=("selfforcing",)),
        Family("unknown", "another autoregressive Wan 2.1 checkpoint"),
    )
}

# Families of one file name: the assumed one → the fragments of the path that decide for it, and for the other.
_ONE_NAME = {"causal_forcing": ("chunkwise", "framewise"), "wave_forcing_5step": ("5step", "4step")}


def family_of(path: str | PurePath) -> tuple[Family, str]:
    """The family that a checkpoint's path suggests, and the part of the path that suggests it ("" if nothing does).

    The file name is read first, then up to three folders that contain it, the nearest first. Case and separators do
    not matter: `Self-Forcing`, `self forcing` and `selfforcing` are equal. The weights do not show the family: all have
    the keys and shapes of plain Wan 2.1 T2V.
    """
    names = _names(path)
    for name, family in product(names, FAMILIES.values()):
        for first, *others in map(str.split, family.name_hints):
            found = [next((where for where in names if other in names[where]), "") for other in others]
            if first in names[name] and "" not in found:
                return family, [name, *found][-1]
    return FAMILIES["unknown"], ""


def doubt_of(path: str | PurePath, family: Family) -> str | None:
    """Why `path` suggests `family` without deciding for it; None if it decides."""
    own, other = _ONE_NAME.get(family.id, ("", ""))
    if not own or any(own in name for name in _names(path).values()):
        return None
    return (
        f"assumed to be {family.title}, but files of another family have the same name: set the family, or put {own} "
        f"or {other} into the name of the file or its folder"
    )


def _names(path: str | PurePath) -> dict[str, str]:
    """The parts of a path that may name the family, the file first → the same in lower case without separators."""
    path = PurePath(path)
    folders = takewhile(lambda name: name not in _MODEL_FOLDERS, (folder.name for folder in path.parents))
    names = takewhile(lambda name: not _LONGLIVE_2.search(name.lower()), (path.name, *islice(folders, 3)))
    return {name: re.sub(r"[\W_]", "", name.lower()) for name in names}

"""Published families of autoregressive Wan checkpoints, and the defaults of each."""

import re
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePath
from typing import Literal

SinkRope = Literal["fixed", "follow"]
Weights = Literal["generator", "generator_ema"]

_MODEL_FOLDERS = ("models", "diffusion_models", "unet", "checkpoints")  # ComfyUI's: folders above name no family


@dataclass(frozen=True)
class SparseDefaults:
    """Defaults of sparse attention.

    keep_frames, keep_sink, keep_near: parameters of the frame selection.
    estimator: the estimate of a block's attention mass.
    tail: whether skipped blocks count as their mean.

    The defaults of estimator and tail suit models that were trained without sparse attention.
    """

    keep_frames: int = 6
    keep_sink: int = 1
    keep_near: int = 2
    estimator: Literal["mean", "lse"] = "lse"
    tail: bool = True


@dataclass(frozen=True)
class Family:
    """Facts and defaults of one checkpoint family.

    frames_per_chunk, sink_frames: latent frames.
    window: latent frames, sinks and current chunk included; None keeps every frame.
    sink_rope: the positions of sink keys after the window has moved: "fixed" keeps their original ones (LongLive),
        "follow" puts them directly before the window (Infinite Forcing, Light Forcing long).
    denoising_steps: the few-step list on the 1000-step scale, before the shift.
    first_denoising_steps: another list for the first chunk of the video (Causal Forcing++).
    shift: the flow shift of the noise levels.
    target, base: parameters of Chunk-Aware Growth; the defaults suit models that were trained without sparse attention.
    sparse: defaults of sparse attention.
    name_hints: fragments of published names, in lower case without separators.
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
    target: float = 0.6
    base: float = 0.7
    sparse: SparseDefaults = SparseDefaults()
    name_hints: tuple[str, ...] = ()
    weights: Weights = "generator_ema"


# The first family with a hint in the name is chosen, so the order matters.
FAMILIES: dict[str, Family] = {
    family.id: family
    for family in (
        Family("demo", "the demo model of this pack", name_hints=("lightforcingdemo",)),
        Family(
            "light_forcing_long",
            "Light Forcing, long video",
            window=12,
            sink_frames=1,
            sink_rope="follow",
            target=0.85,
            base=0.95,
            sparse=SparseDefaults(keep_frames=3, keep_sink=1, keep_near=1, estimator="mean", tail=False),
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
            "causal_forcing_2step",
            "Causal Forcing++, frame by frame, 2 steps",
            frames_per_chunk=1,
            denoising_steps=(1000, 500),
            first_denoising_steps=(1000, 750, 500, 250),
            name_hints=("framewise2step",),
        ),
        Family(
            "causal_forcing_1step",
            "Causal Forcing++, frame by frame, 1 step",
            frames_per_chunk=1,
            denoising_steps=(1000,),
            first_denoising_steps=(1000, 750, 500, 250),
            name_hints=("framewise1step",),
        ),
        Family(
            "causal_forcing_framewise", "Causal Forcing, frame by frame", frames_per_chunk=1, name_hints=("framewise",)
        ),
        Family(
            "causal_forcing",
            "Causal Forcing, chunk by chunk",
            name_hints=("causalforcing", "chunkwise"),
            weights="generator",
        ),
        Family("krea_realtime", "Krea Realtime 14B", name_hints=("krea",)),
        Family("self_forcing", "Self Forcing", name_hints=("selfforcing",)),
        Family("unknown", "another autoregressive Wan 2.1 checkpoint"),
    )
}


def family_of(path: str | PurePath) -> tuple[Family, str]:
    """The family that a checkpoint's path suggests, and the part of the path that suggests it ("" if nothing does).

    The file name is read first, then up to three folders that contain it, the nearest first. Case and separators do
    not matter: `Self-Forcing`, `self forcing` and `selfforcing` are equal. Causal Forcing publishes one file name in
    the folders `chunkwise` and `framewise`, so there the folder decides. The weights do not show the family: all have
    the keys and shapes of plain Wan 2.1 T2V.
    """
    path = PurePath(path)
    own = _family_in(path.name)
    folders = list(takewhile(lambda name: name not in _MODEL_FOLDERS, (folder.name for folder in path.parents)))[:3]
    above, folder = next(((found, name) for name in folders if (found := _family_in(name))), (None, ""))
    if above and (own is None or (own.id, above.id) == ("causal_forcing", "causal_forcing_framewise")):
        return above, folder
    return (own, path.name) if own else (FAMILIES["unknown"], "")


def _family_in(name: str) -> Family | None:
    plain = re.sub(r"[\W_]", "", name.lower())
    return next((family for family in FAMILIES.values() if any(hint in plain for hint in family.name_hints)), None)

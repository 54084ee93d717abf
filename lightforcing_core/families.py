"""What is known of each published family of autoregressive Wan checkpoints, and the defaults that follow."""

from dataclasses import dataclass
from typing import Literal

SinkRope = Literal["fixed", "follow"]
Weights = Literal["generator", "generator_ema"]


@dataclass(frozen=True)
class Family:
    """Facts and defaults of one checkpoint family.

    `frames_per_chunk`, `window` and `sink_frames` count latent frames; `window` includes the sinks and the
    current chunk, None keeps every frame. `sink_rope` says where sink keys stand once the window has moved on:
    "fixed" at their first positions (LongLive), "follow" directly before the window (Infinite Forcing,
    Light Forcing long). `denoising_steps` are the unwarped few-step list on the 1000-step scale,
    `first_denoising_steps` another one for the video's first chunk (Causal Forcing++). `target` and
    `base` parametrise Chunk-Aware Growth; `keep_frames`, `keep_sink` and `keep_near` parametrise the frame
    selection, `estimator` is what guesses a block's worth, `tail` whether skipped blocks count as their mean.
    `filename_hints` are lower-case fragments of the published file names. `weights` is the part that the family's own
    configuration runs where a file holds both.

    The defaults of `target`, `base`, `estimator` and `tail` are for models that never saw sparse attention while they
    were trained, as the laboratory recommends.
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
    keep_frames: int = 6
    keep_sink: int = 1
    keep_near: int = 2
    estimator: Literal["mean", "lse"] = "lse"
    tail: bool = True
    filename_hints: tuple[str, ...] = ()
    weights: Weights = "generator_ema"


# Order matters: the first family whose hint occurs in a file name is the guess.
FAMILIES: dict[str, Family] = {
    family.id: family
    for family in (
        Family("demo", "the demo model of this pack", filename_hints=("light_forcing_demo",)),
        Family(
            "light_forcing_long",
            "Light Forcing, long video",
            window=12,
            sink_frames=1,
            sink_rope="follow",
            target=0.85,
            base=0.95,
            keep_frames=3,
            keep_sink=1,
            keep_near=1,
            estimator="mean",
            tail=False,
            filename_hints=("long_video_gen", "light_forcing_long", "light-forcing-long", "lightforcing_long"),
        ),
        Family(
            "light_forcing_short",
            "Light Forcing, 5 s video",
            target=0.88,
            base=0.98,
            estimator="mean",
            tail=False,
            filename_hints=("short_video_gen", "light_forcing", "light-forcing", "lightforcing"),
        ),
        Family(
            "longlive",
            "LongLive",
            window=12,
            sink_frames=3,
            filename_hints=("longlive",),
            weights="generator",
        ),
        Family(
            "infinite_forcing",
            "Infinite Forcing",
            window=6,
            sink_frames=1,
            sink_rope="follow",
            keep_frames=2,
            keep_sink=1,
            keep_near=1,
            filename_hints=("infinite_forcing", "infinite-forcing", "infiniteforcing"),
        ),
        Family(
            "causal_forcing_2step",
            "Causal Forcing++, frame by frame, 2 steps",
            frames_per_chunk=1,
            denoising_steps=(1000, 500),
            first_denoising_steps=(1000, 750, 500, 250),
            filename_hints=("framewise-2step", "framewise_2step", "framewise2step"),
        ),
        Family(
            "causal_forcing_1step",
            "Causal Forcing++, frame by frame, 1 step",
            frames_per_chunk=1,
            denoising_steps=(1000,),
            first_denoising_steps=(1000, 750, 500, 250),
            filename_hints=("framewise-1step", "framewise_1step", "framewise1step"),
        ),
        Family(
            "causal_forcing_framewise",
            "Causal Forcing, frame by frame",
            frames_per_chunk=1,
            filename_hints=("causal_forcing-framewise", "causal_forcing_framewise", "framewise"),
        ),
        Family(
            "causal_forcing",
            "Causal Forcing, chunk by chunk",
            filename_hints=("causal_forcing", "causal-forcing", "chunkwise"),
            weights="generator",
        ),
        Family(
            "krea_realtime",
            "Krea Realtime 14B",
            filename_hints=("krea",),
        ),
        Family(
            "self_forcing",
            "Self Forcing",
            filename_hints=("self_forcing", "self-forcing", "selfforcing"),
        ),
        Family("unknown", "another autoregressive Wan 2.1 checkpoint"),
    )
}


def guess_family(file_name: str) -> Family:
    """The family whose published file names resemble `file_name`, else "unknown".

    Only names can tell: the weights of every family have the same keys and shapes as plain Wan 2.1 T2V.
    """
    lowered = file_name.lower()
    for family in FAMILIES.values():
        if any(hint in lowered for hint in family.filename_hints):
            return family
    return FAMILIES["unknown"]

"""The sizes and amounts of one training run, as presets."""

from dataclasses import dataclass, replace

from lightforcing.lightforcing_core.demo.model import DemoVideo, Level

Kinds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class VAERecipe:
    """The VAE and its training, first on single pictures and then on clips.

    dim: its width. frames: of the crops that it learns on. crop: the side of their squares in pixels, None for whole
    pictures. batch: clips; of single pictures half as many as one batch of clips has frames. steps, rate: on clips;
    image_steps, image_rate: on pictures before, 0 steps for none.
    """

    dim: int = 16
    frames: int = 17
    crop: int | None = None
    image_steps: int = 0
    image_rate: float = 2e-3
    batch: int = 12
    steps: int = 20_000
    rate: float = 1.5e-3
    kl_weight: float = 1e-4


@dataclass(frozen=True)
class ModelRecipe:
    """The size of the autoregressive model."""

    dim: int = 256
    ffn_dim: int = 1024
    layers: int = 6
    text_dim: int = 256


@dataclass(frozen=True)
class Lesson:
    """One stage of the autoregressive model's training, and its clips.

    clips, openings: videos whose latents it learns on, and others, only their first chunks. phases:
    (share, kinds), the kinds of batches, (chunks, clips) each and in turn, until which share of the stage is over;
    the first chunk is the hardest to learn and the cheapest, and the first steps need no large batches.
    """

    level: Level
    clips: int
    openings: int
    steps: int
    rate: float
    phases: tuple[tuple[float, Kinds], ...]


@dataclass(frozen=True)
class History:
    """Training of the autoregressive model towards its use in four steps.

    own: how often clips of several chunks follow a history that the model made. few_share: how often a noise level is
    one of the four steps'. thing_weight: the additional weight of things in the loss; without it a model
    with few steps to spend learns backgrounds alone.
    """

    own: float = 0.0
    few_share: float = 0.0
    thing_weight: float = 0.0


@dataclass(frozen=True)
class FewRecipe:
    """The distillation into four steps; batch, chunks: clips and their length. steps: 0 for no such stage."""

    steps: int = 8_000
    rate: float = 2e-4
    batch: int = 48
    chunks: int = 7


LARGE = DemoVideo(128, 192, frames=81, frames_per_chunk=3, block=16, level="full")


@dataclass(frozen=True)
class TrainingRecipe:
    """One training run. Steps are upper limits; with a time budget a stage also ends when its share of it is spent.

    Learning rates fall with whichever comes first. video: the exported model's record of its videos; its level is
    that of the last lesson. first, second: lessons of the autoregressive model, the second on top of the first; the
    VAE learns on the first's clips. bfloat16: compute in bfloat16 on a CPU too, several times as fast if it has
    instructions for that. shares: of a time budget, for VAE, latents, first lesson, latents, second lesson and few-step
    stage; the rest is left.
    """

    video: DemoVideo = LARGE
    vae: VAERecipe = VAERecipe()
    model: ModelRecipe = ModelRecipe()
    first: Lesson = Lesson("full", clips=12_000, openings=0, steps=20_000, rate=1e-3, phases=((1.0, ((7, 64),)),))
    second: Lesson | None = None
    history: History = History()
    few: FewRecipe = FewRecipe()
    seed: int = 0
    bfloat16: bool = False
    cache_batch: int = 8
    save_every: int = 250
    held_out_clips: int = 16
    eval_captions: int = 20
    shares: tuple[float, float, float, float, float, float] = (0.32, 0.08, 0.42, 0.0, 0.0, 0.14)

    @property
    def aspect(self) -> float:
        return self.video.width / self.video.height


_CPU = TrainingRecipe(
    video=DemoVideo(96, 144, frames=81, frames_per_chunk=3, block=16, level="simple"),
    vae=VAERecipe(dim=8, crop=48, image_steps=1200, batch=2, steps=1600, rate=6e-4),
    model=ModelRecipe(layers=4),
    first=Lesson(
        "simple",
        clips=320,
        openings=3200,
        steps=10_400,
        rate=1e-3,
        phases=((0.2, ((1, 8),)), (0.5, ((1, 16),)), (0.6, ((2, 8),)), (1.0, ((7, 3), (1, 16)))),
    ),
    history=History(own=0.5, few_share=0.9, thing_weight=3.0),
    few=FewRecipe(steps=0),
    bfloat16=True,
    cache_batch=4,
    save_every=50,
    shares=(0.18, 0.09, 0.7, 0.0, 0.0, 0.0),
)

PRESETS = {
    "h200": TrainingRecipe(),
    "cpu": _CPU,
    "pillar": replace(
        _CPU,
        video=replace(_CPU.video, level="pillar"),
        second=Lesson(
            "pillar",
            clips=240,
            openings=1600,
            steps=1_500,
            rate=6e-4,
            phases=((0.25, ((1, 16),)), (1.0, ((7, 3), (7, 3), (1, 16)))),
        ),
        shares=(0.15, 0.07, 0.57, 0.04, 0.14, 0.0),
    ),
    "tiny": TrainingRecipe(
        video=DemoVideo(32, 48, frames=21, frames_per_chunk=3, block=16, level="pillar"),
        vae=VAERecipe(dim=2, frames=5, crop=32, image_steps=2, batch=1, steps=2),
        model=ModelRecipe(dim=128, ffn_dim=64, layers=1, text_dim=32),
        first=Lesson(
            "simple", clips=4, openings=3, steps=4, rate=1e-3, phases=((0.5, ((1, 4),)), (1.0, ((2, 2), (1, 2))))
        ),
        second=Lesson("pillar", clips=3, openings=2, steps=2, rate=1e-3, phases=((1.0, ((2, 2), (1, 2))),)),
        history=History(own=0.5, few_share=0.5, thing_weight=1.0),
        few=FewRecipe(steps=2, batch=2, chunks=1),
        cache_batch=2,
        save_every=2,
        held_out_clips=2,
        eval_captions=1,
    ),
}

"""What one training run makes and how large everything is, as presets."""

from dataclasses import dataclass, replace

from lightforcing.lightforcing_core.demo.model import DemoVideo, Level

Kinds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Lesson:
    """What the autoregressive model learns in one stage, and from what.

    clips, openings: videos whose latents it learns on, and others of which it knows the first chunk only. phases:
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
class Recipe:
    """Sizes of the data, the models and the batches, and how much of each stage there is.

    Steps are upper limits; with a time budget a stage also ends when its share of it is spent, and learning rates
    fall with whichever comes first. height, width: pixels. frames: of the videos, 1 + 4k. vae_frames: of the crops
    that the VAE learns on; vae_crop: the side of their squares, None for whole pictures; vae_image_steps, 0 for none:
    before them it learns on single pictures, half as many as one batch has frames.

    first, second: what the autoregressive model learns, and what it learns on top of that. The VAE learns on the
    first's clips. own_history: how often clips of several chunks stand behind history that the model made. few_share:
    how often a noise level is one that the four steps use. few_steps: 0 for no last stage; few_batch, few_chunks:
    clips and their length there. thing_weight: how much more the autoregressive model's loss counts where something is
    to be seen, 0 no more; with few steps to spend it learns backgrounds alone without. bfloat16: compute in bfloat16
    on a CPU too, several times as fast where its instructions know bfloat16.
    """

    height: int = 128
    width: int = 192
    frames: int = 81
    seed: int = 0

    vae_dim: int = 16
    vae_frames: int = 17
    vae_crop: int | None = None
    vae_image_steps: int = 0
    vae_image_rate: float = 2e-3
    vae_batch: int = 12
    vae_steps: int = 20_000
    vae_rate: float = 1.5e-3
    kl_weight: float = 1e-4
    cache_batch: int = 8

    dim: int = 256
    ffn_dim: int = 1024
    layers: int = 6
    text_dim: int = 256
    frames_per_chunk: int = 3
    first: Lesson = Lesson("full", clips=12_000, openings=0, steps=20_000, rate=1e-3, phases=((1.0, ((7, 64),)),))
    second: Lesson | None = None
    own_history: float = 0.0
    few_share: float = 0.0
    thing_weight: float = 0.0
    few_batch: int = 48
    few_steps: int = 8_000
    few_rate: float = 2e-4
    few_chunks: int = 7

    bfloat16: bool = False
    save_every: int = 250
    held_out_clips: int = 16
    eval_captions: int = 20
    block: int = 16
    # Of a time budget: VAE, latents, first lesson, latents, second lesson, few-step; the rest is left.
    shares: tuple[float, float, float, float, float, float] = (0.32, 0.08, 0.42, 0.0, 0.0, 0.14)

    @property
    def latent_frames(self) -> int:
        return self.video.latent_frames

    @property
    def video(self) -> DemoVideo:
        """What the exported model says of its videos."""
        level = (self.second or self.first).level
        return DemoVideo(self.height, self.width, self.frames, self.frames_per_chunk, self.block, level)


PRESETS = {
    "h200": Recipe(),
    "cpu": Recipe(
        height=96,
        width=144,
        vae_dim=8,
        vae_frames=17,
        vae_crop=48,
        vae_image_steps=1200,
        vae_batch=2,
        vae_steps=1600,
        vae_rate=6e-4,
        cache_batch=4,
        layers=4,
        bfloat16=True,
        first=Lesson(
            "simple",
            clips=320,
            openings=3200,
            steps=10_400,
            rate=1e-3,
            phases=((0.2, ((1, 8),)), (0.5, ((1, 16),)), (0.6, ((2, 8),)), (1.0, ((7, 3), (1, 16)))),
        ),
        own_history=0.5,
        few_share=0.9,
        thing_weight=3.0,
        few_steps=0,
        save_every=50,
        shares=(0.18, 0.09, 0.7, 0.0, 0.0, 0.0),
    ),
    "tiny": Recipe(
        height=32,
        width=48,
        frames=21,
        vae_dim=2,
        vae_frames=5,
        vae_crop=32,
        vae_image_steps=2,
        vae_batch=1,
        vae_steps=2,
        cache_batch=2,
        dim=128,
        ffn_dim=64,
        layers=1,
        text_dim=32,
        first=Lesson(
            "simple", clips=4, openings=3, steps=4, rate=1e-3, phases=((0.5, ((1, 4),)), (1.0, ((2, 2), (1, 2))))
        ),
        second=Lesson("pillar", clips=3, openings=2, steps=2, rate=1e-3, phases=((1.0, ((2, 2), (1, 2))),)),
        own_history=0.5,
        few_share=0.5,
        thing_weight=1.0,
        few_batch=2,
        few_steps=2,
        few_chunks=1,
        save_every=2,
        held_out_clips=2,
        eval_captions=1,
    ),
}
PRESETS["pillar"] = replace(
    PRESETS["cpu"],
    second=Lesson(
        "pillar",
        clips=240,
        openings=1600,
        steps=1_500,
        rate=6e-4,
        phases=((0.25, ((1, 16),)), (1.0, ((7, 3), (7, 3), (1, 16)))),
    ),
    shares=(0.15, 0.07, 0.57, 0.04, 0.14, 0.0),
)

"""The VAE: Wan's layout at a small width, trained as a causal video autoencoder, scaled to Wan's statistics.

The loss is L1 and squared error on pixels, L1 on their differences in space and time (edges and motion), and a weak
KL. At the end an affine map per latent channel is folded into the convolutions on both sides of the latents, so that
Wan's fixed normalisation brings them to mean 0 and variance 1.
"""

import math

import torch
from torch import Tensor, nn

from lightforcing.lightforcing_core.vae.wan_vae import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD, WanVAE

from .recipe import TrainingRecipe
from .shapes import Clip, draw_clip, paths_of, render
from .stage import Session, Stage, StepLoss, autocast, step_generator
from .whole_clip import decode_clip, encode_clip

FIRST_LOG_VARIANCE = -6.0
SQUARED = 10.0  # weight of the squared error
FAINTEST = 0.1  # a channel fainter than this share of the median one stays fainter, instead of growing as noise


def new_vae(dim: int, seed: int) -> WanVAE:
    """A WanVAE to be trained: weights of unit gain, quiet residual branches, latents nearly without noise.

    It starts blind to the past: each latent shows the last frame of its four. An autoencoder of pictures is then one
    of videos too, the same at every length, and learns motion on top. Random weights on past frames would be fitted to
    the few frames, and the padding before them, of the clips that it learns on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = WanVAE(dim)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data.mul_(3**0.5)  # torch's own gain is 1/√3, under which a picture fades layer by layer
        if isinstance(module, nn.Conv3d):  # makes 3-D convolutions several times faster, above all on CPUs
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
            module.weight.data[:, :, :-1] = 0
            module.weight.data[:, :, -1] *= module.kernel_size[0] ** 0.5
    for name, module in vae.named_modules():
        if name.endswith("time_conv"):
            copies = module.out_channels // module.in_channels
            module.weight.data[:, :, -1, 0, 0] = torch.eye(module.in_channels).repeat(copies, 1)
            nn.init.zeros_(module.bias)
        if hasattr(module, "residual"):
            module.residual[-1].weight.data.mul_(0.3)
    # Latents noisier than they are large would teach the decoder to ignore them.
    vae.conv1.bias.data[LATENT_CHANNELS:] = FIRST_LOG_VARIANCE
    return vae


def train_vae(recipe: TrainingRecipe, session: Session, minutes: float | None = None) -> WanVAE:
    """Train on single pictures and then on clips, continuing from the session's folder.

    Returns the averaged VAE, its statistics not yet folded.
    """
    sizes = recipe.vae
    vae = new_vae(sizes.dim, recipe.seed).to(session.device)
    parts = (
        ("vae_images", sizes.image_steps, sizes.image_rate, 1),
        ("vae", sizes.steps, sizes.rate, sizes.frames),
    )
    total = sum(steps for _, steps, _, _ in parts)
    for name, steps, rate, frames in parts:
        if not steps:
            continue
        stage = Stage(
            session,
            name,
            vae,
            rate=rate,
            steps=steps,
            minutes=None if minutes is None else minutes * steps / total,
            save_every=recipe.save_every,
        )
        vae.load_state_dict(stage.run(_loss_of(recipe, stage, frames)).state_dict())
    return vae.requires_grad_(False)


def _loss_of(recipe: TrainingRecipe, stage: Stage, frames: int) -> StepLoss:
    device = stage.session.device

    def loss_of(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        video = crops(recipe, step, device, frames)
        noise = step_generator(recipe.seed, stage.name, step, device)
        with autocast(recipe, device):
            mean, log_variance = encode_clip(stage.module, video)
            mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
            z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=noise, device=device)
            decoded = decode_clip(stage.module, z).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        error = decoded - video
        # Things cover a twentieth of a picture: absolute errors alone would settle for its background.
        pixels = error.abs().mean() + SQUARED * error.square().mean()
        axes = [axis for axis in (2, 3, 4) if video.shape[axis] > 1]
        edges = sum((decoded.diff(dim=axis) - video.diff(dim=axis)).abs().mean() for axis in axes)
        psnr = -10 * (error / 2).square().mean().log10()
        values = {"l1": error.detach().abs().mean(), "kl": kl.detach(), "psnr": psnr.detach()}
        return pixels + 0.5 * edges + recipe.vae.kl_weight * kl, values

    return loss_of


def crops(recipe: TrainingRecipe, step: int, device: torch.device, frames: int) -> Tensor:
    """The step's videos [B, 3, frames, H, W] in −1…1, cut from anywhere in their clips.

    `batch` of them; of single pictures half as many as one batch of videos has frames.
    """
    generator = step_generator(recipe.seed, "vae crops", step)
    sizes = recipe.vae
    count = sizes.batch * sizes.frames // 2 if frames == 1 < sizes.frames else sizes.batch
    start = int(torch.randint(0, recipe.video.frames - frames + 1, (1,), generator=generator))
    options = {"aspect": recipe.aspect, "level": recipe.first.level, "frames": recipe.video.frames}
    clips = [draw_clip(recipe.seed, index, **options) for index in range(step * count, (step + 1) * count)]
    video = render(clips, frames, recipe.video.height, recipe.video.width, start=start, device=device)
    if sizes.crop is not None:
        crop = (_crop(one, clip, start, sizes.crop, generator) for one, clip in zip(video, clips, strict=True))
        video = torch.stack(list(crop))
    return video.permute(0, 4, 1, 2, 3) * 2 - 1


def _crop(video: Tensor, clip: Clip, start: int, side: int, generator: torch.Generator) -> Tensor:
    """A square of [T, H, W, 3] that holds the centre of one of the clip's things half-way through."""
    _, height, width, _ = video.shape
    path = paths_of(clip, len(video), start)
    thing = int(torch.randint(0, len(path), (1,), generator=generator))
    x, y = path[thing, len(video) // 2] * height

    def first(centre: float, length: int) -> int:
        low, high = max(0, math.ceil(centre - side)), min(length - side, math.floor(centre))
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    top, left = first(y, height), first(x, width)
    return video[:, top : top + side, left : left + side]


@torch.no_grad()
def latent_statistics(vae: WanVAE, videos: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [16] of the raw latents of videos [B, 3, T, H, W] in −1…1."""
    means = torch.cat([encode_clip(vae, video[None])[0].float() for video in videos])
    return means.mean((0, 2, 3, 4)), means.transpose(0, 1).flatten(1).std(1)


@torch.no_grad()
def whole_clip_psnr(vae: WanVAE, videos: Tensor) -> float:
    """Mean PSNR in dB of videos [B, 3, T, H, W] in −1…1, encoded and decoded in one piece each."""
    errors = torch.stack(
        [
            (decode_clip(vae, encode_clip(vae, video[None])[0])[0].float().clamp(-1, 1) - video).square().mean()
            for video in videos
        ]
    )
    return float((-10 * (errors / 4).log10()).mean())


@torch.no_grad()
def fold_statistics(vae: WanVAE, mean: Tensor, std: Tensor) -> None:
    """Rescale the latents, in place, from channels of `mean` and `std` to Wan's LATENT_MEAN and LATENT_STD.

    The decoder undoes it, so an encoded and decoded video stays the same.
    """
    std = std.clamp(min=FAINTEST * float(std.median()))
    scale = mean.new_tensor(LATENT_STD) / std
    offset = mean.new_tensor(LATENT_MEAN) - mean * scale
    out, into, c = vae.conv1, vae.conv2, LATENT_CHANNELS
    into.bias -= (into.weight * (offset / scale).view(1, c, 1, 1, 1)).sum((1, 2, 3, 4))
    into.weight /= scale.view(1, c, 1, 1, 1)
    out.weight[:c] *= scale.view(c, 1, 1, 1, 1)
    out.bias[:c] = out.bias[:c] * scale + offset
    out.bias[c:] += 2 * scale.log()

"""Measures of a video: against the dense one, against its caption, and over its own time.

Videos are [frames, H, W, 3] in 0…1 on any device, latents [16, frames, h, w].
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightforcing.lightforcing_core.demo.captions import Scene
from lightforcing.lightforcing_core.demo.model import FPS

from .detector import PACES, Seen, judge, look

MOST_PSNR = 100.0  # dB, for videos that are equal
WINDOW, SIGMA = 11, 1.5  # the published SSIM's Gaussian window
K1, K2 = 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # the published MS-SSIM's, finest scale first
PATH_BINS = 8  # parts of a video in which the position error is averaged
LAST_SHARE = 4  # a long video's last part is this fraction: a quarter


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((x - truth).norm() / truth.norm())


def psnr(x: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, at most 100."""
    error = float((x - truth).square().mean())
    return MOST_PSNR if error <= 10 ** (-MOST_PSNR / 10) else -10 * math.log10(error)


def structural_similarity(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """SSIM and MS-SSIM, means over frames and colours, both 1 for equal videos.

    SSIM: Wang et al. 2004, Gaussian window of 11 with σ 1.5, K 0.01 and 0.03, no padding. MS-SSIM: Wang et al. 2003,
    with as many of its five scales as the window fits into, their weights scaled to sum to 1; negative factors
    count as 0. Raises ValueError for pictures smaller than the window.
    """
    a, b = (video.permute(0, 3, 1, 2).float() for video in (x, truth))
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"pictures of {a.shape[3]}×{a.shape[2]} are smaller than SSIM's window of {WINDOW}")
    factors, whole = [], math.nan
    for scale in range(len(SCALE_WEIGHTS)):
        if min(a.shape[2:]) < WINDOW:
            break
        luminance, contrast = _ssim_parts(a, b)
        if scale == 0:
            whole = float((luminance * contrast).mean())
        factors.append((luminance, contrast))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    weights = SCALE_WEIGHTS[: len(factors)]
    product = torch.ones(x.shape[0], 3, device=x.device)
    for place, ((luminance, contrast), weight) in enumerate(zip(factors, weights, strict=True)):
        values = contrast if place < len(factors) - 1 else luminance * contrast
        product = product * values.mean((2, 3)).clamp(min=0) ** (weight / sum(weights))
    return whole, float(product.mean())


def _ssim_parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM's luminance and its contrast-structure part of planes [frames, 3, h, w], at every place of the window."""
    line = torch.exp(-((torch.arange(WINDOW, device=a.device) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    line = (line / line.sum()).to(a.dtype)

    def blurred(planes: Tensor) -> Tensor:
        flat = planes.flatten(0, 1).unsqueeze(1)
        flat = F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
        return flat.squeeze(1).unflatten(0, planes.shape[:2])

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + K1**2) / (mean_a**2 + mean_b**2 + K1**2)
    return luminance, (2 * covariance + K2**2) / (var_a + var_b + K2**2)


def against_dense(
    latents: Tensor, video: Tensor, dense_latents: Tensor, dense_video: Tensor, lengths: Sequence[int]
) -> dict[str, Any]:
    """Errors against the dense rollout of the same noise, of the whole video and chunk by chunk.

    lengths: latent frames per chunk. SSIM and MS-SSIM use one frame per latent frame.
    """
    latent_parts = zip(latents.split(list(lengths), 1), dense_latents.split(list(lengths), 1), strict=True)
    frames = [4 * length for length in lengths]
    frames[0] -= 3
    video_parts = zip(video.split(frames), dense_video.split(frames), strict=True)
    ssim, ms_ssim = structural_similarity(video[::4], dense_video[::4])
    return {
        "latent_error": relative_error(latents, dense_latents),
        "latent_errors": [relative_error(part, truth) for part, truth in latent_parts],
        "psnr": psnr(video, dense_video),
        "psnrs": [psnr(part, truth) for part, truth in video_parts],
        "ssim": ssim,
        "ms_ssim": ms_ssim,
    }


def against_caption(video: Tensor, scene: Scene) -> dict[str, Any]:
    """The detector's verdict on the promised things: shares of them, and means over those that are there.

    `colour` means present at all, since a thing is found by its colour. Errors and copies are None if no promised thing
    is there; `position_errors` has a mean for each of 8 parts of the video, None if nothing is whole there.
    """
    verdict = judge(video, scene)
    things = verdict.things

    def share(values: Sequence[bool]) -> float:
        return sum(values) / len(values)

    def mean(values: Sequence[float | None]) -> float | None:
        numbers = [value for value in values if value is not None and not math.isnan(value)]
        return sum(numbers) / len(numbers) if numbers else None

    paths = [thing.position_errors for thing in things if thing.position_errors is not None]
    over_time: list[float | None] = [None] * PATH_BINS
    if paths:
        parts = torch.stack(paths).tensor_split(PATH_BINS, dim=1)
        over_time = [mean([float(part.nanmean())]) for part in parts]
    return {
        "right": float(verdict.right),
        "colour": share([thing.present for thing in things]),
        "shape": share([thing.shape_right for thing in things]),
        "direction": share([thing.direction_right for thing in things]),
        "speed": share([thing.speed_right for thing in things]),
        "identity": share([thing.identity for thing in things]),
        "strangers": float(len(verdict.strangers)),
        "position_error": mean([thing.position_error for thing in things]),
        "velocity_error": mean([thing.velocity_error for thing in things]),
        "copies": mean([thing.copies for thing in things]),
        "position_errors": over_time,
    }


def over_time(video: Tensor, scene: Scene, lengths: Sequence[int]) -> dict[str, Any]:
    """The drift of a long video away from its own first chunk, and the promised things that are left at its end.

    `drifts`: per chunk the root mean square, over six numbers in 0…1, of their change since the first chunk: mean
    red, green and blue, contrast (standard deviation of luma), colourfulness (mean of strongest minus weakest
    channel) and sharpness (mean absolute difference of neighbours). `drift`: its mean over the last quarter.
    `colour_late`, `shape_late`: shares of the promised things that the last quarter shows. `motion_late`: their speed
    there over the promised speed, 0 for a thing that is gone.
    """
    frames = [4 * length for length in lengths]
    frames[0] -= 3
    numbers = torch.stack([_look_numbers(part) for part in video.split(frames)])
    drifts = (numbers - numbers[0]).square().mean(1).sqrt()
    last = max(1, len(frames) // LAST_SHARE)
    late = {seen.colour: seen for seen in look(video[-sum(frames[-last:]) :])}
    things = scene.things
    kept = [(thing, late[thing.colour]) for thing in things if thing.colour in late]
    return {
        "drift": float(drifts[-last:].mean()),
        "drifts": drifts.tolist(),
        "colour_late": len(kept) / len(things),
        "shape_late": sum(seen.shape == thing.shape for thing, seen in kept) / len(things),
        "motion_late": sum(_pace(seen) / PACES[thing.speed] for thing, seen in kept) / len(things),
    }


def _pace(seen: Seen) -> float:
    """Heights per second: the median over steps of a latent frame between frames that show all of the thing."""
    whole = seen.whole[4:] & seen.whole[:-4]
    steps = (seen.path[4:] - seen.path[:-4])[whole].norm(dim=1)
    return float(steps.median()) * FPS / 4 if whole.any() else 0.0


def _look_numbers(video: Tensor) -> Tensor:
    """Mean colour, contrast, colourfulness and sharpness of a part of a video: [6]."""
    luma = video.mean(-1)
    steps = (video.diff(dim=1).abs().mean() + video.diff(dim=2).abs().mean()) / 2
    chroma = (video.amax(-1) - video.amin(-1)).mean()
    return torch.stack([*video.mean((0, 1, 2)), luma.flatten(1).std(1).mean(), chroma, steps]).cpu()

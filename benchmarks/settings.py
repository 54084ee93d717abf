"""The settings of each measurement; each field is an option with its help text.

No module is imported here that needs torch, so that the command line starts without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

if TYPE_CHECKING:
    import torch

Say = Callable[[str], object]  # shows progress
REAL_LAYERS, REAL_HEADS = 30, 12  # of Wan 2.1 1.3B
PAIR = ("dense", "sparse")


@dataclass(frozen=True)
class Machine:
    device: Annotated[str | None, "cpu or cuda; by default the GPU if torch sees one."] = None
    threads: Annotated[int | None, "CPU threads; torch's own choice by default.", 1] = None

    def prepare(self) -> torch.device:
        """Set the number of threads and return the device. Raises ValueError if it cannot be measured here."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
            raise ValueError(f"device {self.device!r} cannot be measured here; use cpu, or cuda if torch sees a GPU")
        return device


@dataclass(frozen=True)
class Place:
    """The machine and the dtype of a measurement."""

    machine: Machine = Machine()
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], "bfloat16, float16 or float32."] = "bfloat16"

    def prepare(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype, as `Machine.prepare` does."""
        import torch

        return self.machine.prepare(), getattr(torch, self.dtype)


@dataclass(frozen=True)
class Picture:
    """The size of the video and of the attention blocks in it."""

    height: Annotated[int, "Video height in pixels, a multiple of 16."] = 512
    width: Annotated[int, "Video width in pixels, a multiple of 16."] = 768
    block: Annotated[tuple[int, int], "Tokens per query and per key block."] = (64, 64)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return self.height // 16, self.width // 16

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.height // 8, self.width // 8


@dataclass(frozen=True)
class Model:
    """The size of a Wan with random weights. The 1.3B model has width 1536, feed-forward width 8960 and 30 layers."""

    dim: Annotated[int, "Model width, a multiple of 128."] = 1536
    ffn_dim: Annotated[int, "Feed-forward width."] = 8960
    layers: Annotated[int | None, "Layers; by default 30 on a GPU and 2 on a CPU."] = None


@dataclass(frozen=True)
class AttentionBench:
    """One layer's self-attention, chunk by chunk of an 81-frame video: the kernel alone and with its selection."""

    tokens_per_frame: Annotated[int, "1536 is 512x768, 1560 is 480x832."] = 1536
    heads: Annotated[int, "The 1.3B model has 12; 2 keep a CPU run short."] = 12
    block: Annotated[tuple[int, int], "Tokens per query and per key block."] = (64, 64)
    sparsity: Annotated[tuple[float, ...], "One or more for every chunk; the published growth by default."] = ()
    chunks: Annotated[tuple[int, ...], "Chunks from 2 to 7, counted from 1."] = (2, 3, 4, 5, 6, 7)
    backend: Annotated[tuple[str, ...], "Sparse backends; by default all that can run, the reference if none can."] = ()
    estimator: Annotated[str, "mean as published, or lse."] = "mean"
    tail: Annotated[bool, "Skipped blocks take part as their means."] = False
    kv: Annotated[Literal["same", "int8", "fp8"], "How keys and values are stored."] = "same"
    repeats: Annotated[int, "Rounds in which each arm runs once.", 1] = 5
    place: Place = Place()


@dataclass(frozen=True)
class PoliciesBench:
    """Every attention policy at equal FLOPs: error on the demo model's videos, time of a layer, KV cache."""

    sparsity: Annotated[float, "The share of key blocks to skip, mean of the sparse chunks."] = 0.6
    seeds: Annotated[int, "Videos of the demo model.", 1] = 8
    picture: Picture = Picture()
    heads: Annotated[int, "Of the layer that is timed; the 1.3B model has 12."] = 1
    backend: Annotated[str, "Sparse backend of the layer that is timed."] = "auto"
    repeats: Annotated[int, "Rounds in which each arm runs once.", 1] = 3
    place: Place = Place()


@dataclass(frozen=True)
class StepBench:
    """One forward of one chunk at real 1.3B shapes with random weights and a full cache, and its operations."""

    chunk: Annotated[int, "Chunk from 2 to 7, counted from 1."] = 7
    model: Model = Model()
    picture: Picture = Picture()
    backend: Annotated[str, "Sparse backend."] = "auto"
    cuda_graph: Annotated[bool, "Measure dense and sparse as CUDA graphs too."] = False
    fp8: Annotated[bool, "Measure sparse with FP8 layers too."] = False
    repeats: Annotated[int, "Rounds in which each arm runs once.", 1] = 3
    place: Place = Place()


@dataclass(frozen=True)
class DecodeBench:
    """A chunk in the middle of a clip through VAEs and a TAE with random weights."""

    vae_dims: Annotated[tuple[int, ...], "Widths of VAEs; 24 is LightVAE, 96 Wan's own."] = (24, 96)
    picture: Picture = Picture()
    repeats: Annotated[int, "Rounds in which each arm runs once.", 1] = 3
    place: Place = Place()


@dataclass(frozen=True)
class RolloutBench:
    """A whole video with random weights, tiny by default: time and peak memory of every chunk."""

    frames: Annotated[int, "Video frames, 1 + 4k: 81, 249, 961."] = 81
    arm: Annotated[tuple[str, ...], "Any of dense, sparse and even (no growth, to see constant cost)."] = PAIR
    setting: Annotated[Literal["short", "long"], "short sees every frame; long has window 12 and one sink."] = "short"
    decode: Annotated[bool, "Decode every chunk too."] = False
    overlap: Annotated[bool, "With --decode, one arm and a GPU: decode while the next chunk is sampled."] = False
    cuda_graph: Annotated[Literal["auto", "on", "off"], "A chunk's steps as one CUDA graph: auto, on or off."] = "auto"
    vae_dim: Annotated[int, "Width of the VAE; 24 is LightVAE, 96 Wan's own."] = 24
    model: Model = Model(256, 512, 2)
    picture: Picture = Picture(64, 96)
    backend: Annotated[str, "Sparse backend."] = "auto"
    rounds: Annotated[int, "Runs of each video; the seconds of a chunk are the median.", 1] = 1
    place: Place = Place()

    def __post_init__(self) -> None:
        if self.overlap and not self.decode:
            raise ValueError("overlap needs decode; use --decode too")
        if self.overlap and len(self.arm) > 1:
            raise ValueError(f"overlap cannot measure the interleaved arms {', '.join(self.arm)}; use one arm")


@dataclass(frozen=True)
class CoreBench:
    """Whole videos with random weights by ComfyUI core's sampler and ours; COMFYUI_PATH and COMFYUI_PYTHON name it."""

    frames: Annotated[int, "Video frames, 1 + 4k."] = 81
    target: Annotated[tuple[float, ...], "More targets for models trained without sparsity."] = ()
    model: Model = Model(512, 2048, 2)
    picture: Picture = Picture()
    backend: Annotated[str, "Sparse backend."] = "auto"
    rounds: Annotated[int, "Rounds in which each arm makes the video once.", 1] = 3
    threads: Annotated[int | None, "CPU threads; torch's own choice by default.", 1] = None
    quick: Annotated[bool, "33 frames in one round, for a first look."] = False


@dataclass(frozen=True)
class GpuBench:
    """Check and time everything on this machine, for a report without paths and names to paste into an issue."""

    quick: Annotated[bool, "About a minute: a covering set of checks, few rounds."] = False
    full: Annotated[bool, "About 15 minutes: 20 rounds of everything."] = False
    apply: Annotated[bool, "Try faster ways to compute, and use in later runs those that prove right and faster."] = (
        False
    )

    @property
    def level(self) -> int:
        return 2 if self.full else 0 if self.quick else 1

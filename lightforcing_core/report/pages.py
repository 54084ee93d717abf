"""A run's record as text and three 512 × 512 pictures: densities; seconds and dense reasons; the map of read blocks."""

import textwrap
from collections.abc import Sequence
from itertools import groupby
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..attention.blocks import tile_order
from ..rollout.cost import flops_ratio
from ..rollout.record import ChunkRecord, RunRecord
from ..rollout.schedule import video_frames_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, FILL, BUDGET = "#1d2733", "#d5dbe3", "#3b7dd8", "#d1495b"
SIDE = 512
MOST_FRAMES = 48  # on the block map; of more frames, evenly spaced ones are shown
STAGES = {"denoise": FILL, "clean pass": "#7fb069", "output": "#f2a541", "replay": "#8d6a9f", "recompute": BUDGET}


def describe(record: RunRecord) -> str:
    """The record as text: facts, chunks, layers if they differ, stages, reasons."""
    lines = [f"{name}: {value}" for name, value in record.facts.items()]
    lines += [_title(record), ""]
    lines.append("chunk  latent frames  sees  to skip   read  steps  seconds")
    for chunk in record.chunks:
        span = f"{chunk.start_frame}-{chunk.start_frame + chunk.frames - 1}"
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in chunk.seconds.items())
        to_skip = "–" if chunk.sparsity is None else f"{chunk.sparsity:.1%}"
        lines.append(
            f"{chunk.index:>5}  {span:>13}  {len(chunk.visible):>4}  {to_skip:>7}  {chunk.density:>5.1%}"
            f"  {chunk.steps:>5}  {stages}"
        )
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in record.seconds.items())
    lines += ["", *_layer_lines(record), *_head_lines(record), f"seconds: {stages or 'none'}", *_reasons(record)]
    return "\n".join(lines)


def pages(
    record: RunRecord,
    frames: Tensor | None = None,
    *,
    chunk: int = -1,
    layer: int | None = None,
    head: int | None = None,
) -> list[Image.Image]:
    """The three pages, RGB 512 × 512.

    frames: the first video of the run, [frames, H, W, 3] in 0…1, complete or not.
    chunk: the chunk of the block map; −1 is the last one.
    layer, head: of the block map; None is the mean over all.

    Raises ValueError for a chunk, layer or head that is not in the record.
    """
    shown = record.chunk(chunk)
    return [_density_page(record), _time_page(record), _map_page(record, frames, shown, layer, head)]


def block_share(chunk: ChunkRecord, layer: int | None, head: int | None) -> Tensor | None:
    """The share of query blocks that read each key block, float32 [frames, blocks].

    Ones if the chunk was dense, None if the record has no map of it. Raises ValueError for a layer or head that the
    model does not have.
    """
    if chunk.block_map is None:
        return torch.ones(len(chunk.visible), 1) if chunk.why_dense else None
    shares = chunk.block_map.float() / chunk.query_blocks
    for axis, (name, wanted) in enumerate((("layer", layer), ("head", head))):
        count = shares.shape[axis]
        if wanted is not None and not 0 <= wanted < count:
            raise ValueError(f"there is no {name} {wanted}; the model has {count}, so use 0 to {count - 1}")
        shares = shares.mean(axis, keepdim=True) if wanted is None else shares.narrow(axis, wanted, 1)
    return shares[0, 0]


def _title(record: RunRecord) -> str:
    if not record.chunks:
        return "no finished chunk"
    ratio = flops_ratio(chunk.cost for chunk in record.chunks)
    return f"{len(record.chunks)} chunks, {ratio:.0%} of dense attention FLOPs"


def _layer_lines(record: RunRecord) -> list[str]:
    if all(max(chunk.layer_density) - min(chunk.layer_density) < 1e-6 for chunk in record.chunks):
        return [f"all {record.layers} layers read the same share"]
    layers = enumerate(zip(*(chunk.layer_density for chunk in record.chunks), strict=True))
    rows = [f"{layer:>5}  " + " ".join(f"{share:.1%}" for share in shares) for layer, shares in layers]
    return ["read by each layer, per chunk", *rows]


def _head_lines(record: RunRecord) -> list[str]:
    """The heads that read least and most in the last chunk with a map."""
    chunk = next((one for one in reversed(record.chunks) if one.block_map is not None), None)
    if chunk is None or chunk.block_map is None:
        return []
    shares = chunk.block_map.float().mean((2, 3)) / chunk.query_blocks  # [layers, heads]
    ends = [divmod(int(place), record.heads) for place in (shares.argmin(), shares.argmax())]
    least, most = (f"{float(shares[layer, head]):.1%} (layer {layer}, head {head})" for layer, head in ends)
    return [f"heads of chunk {chunk.index} read between {least} and {most}"] if least != most else []


def _reasons(record: RunRecord) -> list[str]:
    """The sparse backends, and each reason for dense attention with its chunks."""
    chunks_of: dict[str, list[int]] = {}
    for chunk in record.chunks:
        if chunk.why_dense:
            chunks_of.setdefault(chunk.why_dense, []).append(chunk.index)
    return [
        "attention: " + ("; ".join(record.attention) or "dense in every call"),
        *(f"dense: chunk {_spans(chunks)}: {why}" for why, chunks in chunks_of.items()),
        *(f"dense: {note}" for note in record.notes),
    ]


def _spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 → "1-3, 7"."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


# matplotlib is imported in functions, because the import takes a second.
def _figure(title: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIDE / 100, SIDE / 100), dpi=100, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def _image_of(figure: "Figure") -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")


def _plain(axes: "Axes", **labels: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(**labels)
    axes.tick_params(colors=INK, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _density_page(record: RunRecord) -> Image.Image:
    """Bars of the share read and scheduled per chunk, above a picture of all layers."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure = _figure(_title(record))
    bars, layers = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
    index = [chunk.index for chunk in record.chunks]
    bars.bar(index, [chunk.density for chunk in record.chunks], width=0.8, color=FILL, label="read")
    if all(chunk.sparsity is not None for chunk in record.chunks):
        scheduled = [1 - (chunk.sparsity or 0.0) for chunk in record.chunks]
        bars.step(index, scheduled, where="mid", color=BUDGET, linewidth=1.5, linestyle="--", label="scheduled")
    bars.set_ylim(0, 1.12)
    bars.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bars.grid(axis="y", color=GRID, linewidth=0.8)
    bars.legend(fontsize=9, frameon=False, loc="upper right")
    _plain(bars, ylabel="key blocks read")
    if len(record.chunks) <= 12:
        for x, chunk in zip(index, record.chunks, strict=True):
            bars.text(x, chunk.density + 0.02, f"{chunk.density:.0%}", ha="center", fontsize=9, color=INK)
    values = np.array([chunk.layer_density for chunk in record.chunks]).T
    extent = (index[0] - 0.5, index[-1] + 0.5, record.layers - 0.5, -0.5)
    most = values[values < 1].max(initial=0.0) or 1.0
    cmap = colormaps["viridis"].with_extremes(over=GRID)
    shown = layers.imshow(values, aspect="auto", extent=extent, cmap=cmap, vmin=0, vmax=most, interpolation="nearest")
    _plain(layers, xlabel="chunk", ylabel="layer")
    layers.yaxis.set_major_locator(MaxNLocator(integer=True))
    # Dense chunks are grey, outside the scale, so that the colours separate the sparse ones.
    bar = figure.colorbar(shown, ax=layers, format=lambda value, _: f"{value:.0%}", fraction=0.05, extend="max")
    bar.ax.tick_params(labelsize=9)
    return _image_of(figure)


def _time_page(record: RunRecord) -> Image.Image:
    """Seconds per chunk, stacked by stage, above the reasons for dense attention."""
    figure = _figure(f"{sum(record.seconds.values()):.1f} seconds")
    lines = [line for reason in _reasons(record) for line in textwrap.wrap(reason, 72, subsequent_indent="   ")]
    if len(lines) > 14:
        lines[13:] = ["… the rest is in the text"]
    below = (len(lines) + 1) / 31  # a line takes a 31st of the page
    figure.set_layout_engine("constrained", rect=(0, below, 1, 1 - below))
    figure.text(0.02, below, "\n".join(lines), va="top", fontsize=9, color=INK)
    bars = figure.add_subplot()
    index = [chunk.index for chunk in record.chunks]
    bottom = np.zeros(len(index))
    for stage, colour in STAGES.items():
        seconds = np.array([chunk.seconds.get(stage, 0.0) for chunk in record.chunks])
        if seconds.any():
            bars.bar(index, seconds, 0.8, bottom, color=colour, label=f"{stage} {seconds.sum():.1f} s")
            bottom += seconds
    bars.set_ylim(0, 1.3 * max(bottom.max(), 1e-6))
    bars.grid(axis="y", color=GRID, linewidth=0.8)
    bars.legend(fontsize=9, frameon=False, ncols=3, loc="upper center", handlelength=1, columnspacing=1)
    _plain(bars, xlabel="chunk", ylabel="seconds")
    return _image_of(figure)


def _map_page(
    record: RunRecord, frames: Tensor | None, chunk: ChunkRecord, layer: int | None, head: int | None
) -> Image.Image:
    """Visible frames, key blocks coloured by the share of query blocks that read them."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scope = "all layers" if layer is None else f"layer {layer}"
    scope += ", all heads" if head is None else f", head {head}"
    figure = _figure(f"Blocks read by chunk {chunk.index} ({scope})")
    shares = block_share(chunk, layer, head)
    axes = figure.add_subplot()
    axes.axis("off")
    axes.set_anchor("N")
    if shares is None:
        kept = _spans([one.index for one in record.chunks if one.block_map is not None])
        text = f"the record has no map of this chunk;\nit has maps of chunk {kept}"
        axes.text(0.5, 0.5, text, ha="center", fontsize=11)
        return _image_of(figure)
    count = len(chunk.visible)
    places = np.linspace(0, count - 1, min(count, MOST_FRAMES)).round().astype(int)
    columns, width, height = _cells(len(places), record.grid)
    colours, scale = colormaps["inferno"], Normalize(0, max(float(shares.max()), 1e-6))
    label = 16
    page = np.ones((ceil(len(places) / columns) * (height + label), columns * (width + 4), 3))
    for number, place in enumerate(places):
        top, left = number // columns * (height + label), number % columns * (width + 4)
        heat = np.asarray(scale(_token_picture(shares[place], record.grid, chunk, (width, height))))
        frame = chunk.visible[place]
        colour = colours(heat)[..., :3]
        page[top : top + height, left : left + width] = _over_frame(colour, heat, frames, frame)
        current = frame >= chunk.start_frame
        axes.text(
            left,
            top + height + label - 4,
            f"{frame}{' now' if current else ''}: {float(shares[place].mean()):.0%}",
            fontsize=8,
            color=BUDGET if current else INK,
        )
    axes.imshow(page, interpolation="nearest")
    bar = figure.colorbar(
        ScalarMappable(scale, colours),
        ax=axes,
        orientation="horizontal",
        fraction=0.05,
        panchor=False,
        format=lambda value, _: f"{value:.0%}",
    )
    bar.set_label("query blocks that read a key block (below a frame: number, mean)", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    return _image_of(figure)


def _cells(count: int, grid: tuple[int, int]) -> tuple[int, int, int]:
    """(columns, frame width, frame height) with which `count` frames fit on the page."""
    for columns in range(1, 9):
        width = (SIDE - 24) // columns - 4
        height = round(width * grid[0] / grid[1])
        if ceil(count / columns) * (height + 16) <= 400:
            break
    return columns, width, height


def _token_picture(shares: Tensor, grid: tuple[int, int], chunk: ChunkRecord, size: tuple[int, int]) -> np.ndarray:
    """One frame's block values [blocks] at their tokens: float [height, width]."""
    of_token = shares[(torch.arange(grid[0] * grid[1]) // chunk.key_block).clamp(max=len(shares) - 1)]
    if chunk.tiles:
        of_token = torch.empty_like(of_token).index_copy_(0, tile_order(*grid, chunk.key_block), of_token)
    values = of_token.view(*grid).numpy()
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


def _over_frame(colour: np.ndarray, heat: np.ndarray, frames: Tensor | None, latent_frame: int) -> np.ndarray:
    """Colours [height, width, 3] over a latent frame's last video frame in grey.

    heat: [height, width] in 0…1; low values let more of the frame through.
    """
    number = video_frames_of(latent_frame + 1) - 1
    if frames is None or number >= len(frames):
        return colour
    pixels = (frames[number].float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    picture = np.asarray(Image.fromarray(pixels).resize(heat.shape[::-1], Image.Resampling.BILINEAR)) / 255.0
    cover = 0.3 + 0.55 * heat[..., None]
    mixed: np.ndarray = (1 - cover) * picture.mean(-1, keepdims=True) + cover * colour
    return mixed

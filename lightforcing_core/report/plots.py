"""What a run kept and what it cost: density per chunk, attention FLOPs against dense, seconds per stage, the plot.

A schedule can be reported before it runs (`schedule_costs`, `plot_schedule`); `RunReport` collects a run.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..rollout.cost import ChunkCost, flops_ratio, schedule_costs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GRID, FILL, BUDGET = "#1d2733", "#d5dbe3", "#3b7dd8", "#d1495b"


@dataclass
class RunReport:
    """Collects one run. `forwards` counts the model calls per chunk: its denoising steps and the clean pass.

    `seconds` is wall time per stage as the host sees it; `facts` holds whatever else belongs to the record
    (settings, backend, machine), in JSON types.
    """

    tokens_per_frame: int
    layers: int
    heads: int
    head_dim: int
    forwards: int
    batch: int = 1
    chunks: list[ChunkCost] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time this block takes to stage `name`, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def attention_flops(self, *, dense: bool = False) -> float:
        """FLOPs of self-attention (q·kᵀ and p·v) over the run, or of the same run dense; no clean pass at the end."""
        per_pair = 4.0 * self.batch * self.layers * self.heads * self.head_dim * self.tokens_per_frame**2
        last = len(self.chunks) - 1
        return per_pair * sum(
            chunk.attention_pairs(dense=dense) * (self.forwards - (place == last))
            for place, chunk in enumerate(self.chunks)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types, totals included."""
        sparse, dense = self.attention_flops(), self.attention_flops(dense=True)
        return {
            **asdict(self),
            "attention_flops": sparse,
            "dense_attention_flops": dense,
            "attention_flops_ratio": sparse / dense if dense else 1.0,
            "total_seconds": sum(self.seconds.values()),
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)


def plot_schedule(
    sparsities: Sequence[float],
    chunk_lengths: Sequence[int],
    window: int | None = None,
    target: float | None = None,
) -> Image.Image:
    """Sparsity per chunk as steps over latent frames, with the budget as a line: an RGB image, 512 × 300.

    The title says what the schedule costs against dense attention with the same window. Touches no global state
    of matplotlib, so it may run in any thread.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    costs = schedule_costs(sparsities, chunk_lengths, window)
    edges = [0, *accumulate(chunk_lengths)]
    figure = Figure(figsize=(5.12, 3.0), dpi=100, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.stairs(sparsities, edges, fill=True, color=FILL, alpha=0.25)
    axes.stairs(sparsities, edges, color=FILL, linewidth=2)
    if target is not None:
        axes.axhline(target, color=BUDGET, linewidth=1.5, linestyle="--")
        axes.text(0, target + 0.01, f" target {target:g}", color=BUDGET, fontsize=10, va="bottom")
    axes.set(xlim=(0, edges[-1]), ylim=(0.0, 1.05), xlabel="latent frames", ylabel="sparsity")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    seen = "" if window is None else f", window {window}"
    figure.suptitle(
        f"{len(costs)} chunks{seen}: {flops_ratio(costs):.0%} of dense attention FLOPs", fontsize=12, color=INK
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return image_of(figure)


def image_of(figure: "Figure") -> Image.Image:
    """A matplotlib figure as an RGB image, without a window or a file.

    matplotlib is imported where it is used, because that takes a second, and only those who look at a plot should
    wait for it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")

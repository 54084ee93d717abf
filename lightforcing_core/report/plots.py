"""A run's attention FLOPs against dense attention and its seconds per stage, and figures as images."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..rollout.cost import ChunkCost

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


def image_of(figure: "Figure") -> Image.Image:
    """A matplotlib figure as an RGB image, without a window or a file.

    matplotlib is imported where it is used, because that takes a second, and only those who look at a plot should
    wait for it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")

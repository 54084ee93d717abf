"""The report node: a run's density, time and reasons for dense attention."""

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..lightforcing_core.report.pages import describe, pages
from ..lightforcing_core.rollout.record import RunRecord
from .texts import node_schema

# The key of a LATENT under which it holds the record of its run; nodes that pass a LATENT on keep it.
RECORD = "light_forcing_record"


class LightForcingReport(io.ComfyNode):
    """Show a run's density, time and reasons for dense attention."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingReport",
            search_aliases=["sparsity report", "attention map", "block map", "why is it dense"],
            inputs=[
                io.Latent.Input("samples"),
                io.Image.Input("images", optional=True),
                io.Int.Input("chunk", default=-1, min=-1, max=100000, step=1),
                io.Int.Input("layer", default=-1, min=-1, max=1000, step=1),
                io.Int.Input("head", default=-1, min=-1, max=1000, step=1),
                io.Sampler.Input("sampler", optional=True),
            ],
            outputs=[io.Image.Output(display_name="IMAGE"), io.String.Output(display_name="STRING")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        samples: dict[str, Any],
        images: Tensor | None = None,
        chunk: int = -1,
        layer: int = -1,
        head: int = -1,
        sampler: Any = None,
    ) -> io.NodeOutput:
        record = record_of(samples, sampler)
        text = describe(record)
        frames = None if images is None else images[: len(images) // record.batch]
        one_layer, one_head = (None if number < 0 else number for number in (layer, head))
        made = pages(record, frames, chunk=chunk, layer=one_layer, head=one_head)
        pixels = torch.from_numpy(np.stack([np.asarray(page, dtype=np.float32) / 255.0 for page in made]))
        return io.NodeOutput(pixels, text, ui={**ui.PreviewImage(pixels, cls=cls).as_dict(), "text": (text,)})


def record_of(samples: dict[str, Any], sampler: Any) -> RunRecord:
    record = getattr(sampler, "record", None) or samples.get(RECORD)
    if not isinstance(record, RunRecord):
        raise ValueError(
            "this LATENT holds no record of a run; connect LATENT of Light Forcing Sampler, or with "
            "SamplerCustomAdvanced also its sampler, and run it (a loaded latent, or a saved run that was already "
            "complete, has no record)"
        )
    return record

"""The report node: what a run kept where, what it cost, and why anything ran dense; as pictures and as text."""

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..lightforcing_core.report.pages import describe, pages
from ..lightforcing_core.rollout.record import RunRecord

# Where a LATENT carries the record of the run that made it; nodes that hand a LATENT on keep it.
RECORD = "light_forcing_record"


class LightForcingReport(io.ComfyNode):
    """Show what a run read, how long it took and what ran dense."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingReport",
            display_name="Light Forcing Report",
            category="Light Forcing",
            description="Shows how a run used attention and time: density per chunk and layer, seconds per stage, why "
            "calls ran dense, and a map of the blocks that one chunk read, over the frames.",
            search_aliases=["sparsity report", "attention map", "block map", "why is it dense"],
            inputs=[
                io.Latent.Input(
                    "samples",
                    tooltip="LATENT of Light Forcing Sampler, which contains the record of its run. From "
                    "SamplerCustomAdvanced: also connect sampler.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The decoded frames of the same run; the block map is drawn over them. If not connected, "
                    "only the map is drawn.",
                ),
                io.Int.Input(
                    "chunk",
                    default=-1,
                    min=-1,
                    max=100000,
                    step=1,
                    tooltip="The chunk whose block map is shown, counted from 0; -1 is the last one.",
                ),
                io.Int.Input(
                    "layer",
                    default=-1,
                    min=-1,
                    max=1000,
                    step=1,
                    tooltip="The layer of the block map, counted from 0; -1 is the mean over all layers.",
                ),
                io.Int.Input(
                    "head",
                    default=-1,
                    min=-1,
                    max=1000,
                    step=1,
                    tooltip="The attention head of the block map, counted from 0; -1 is the mean over all heads. "
                    "Heads differ a lot.",
                ),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="Only if SamplerCustomAdvanced made the LATENT: the SAMPLER of Light Forcing Sampler "
                    "Select that it used, which holds the record.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE", tooltip="Three pages of 512×512: density, time and reasons, block map."
                ),
                io.String.Output(display_name="STRING", tooltip="The same in words and numbers, chunk by chunk."),
            ],
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
        made = pages(record, frames, chunk=chunk, layer=_or_all(layer), head=_or_all(head))
        pixels = torch.from_numpy(np.stack([np.asarray(page, dtype=np.float32) / 255.0 for page in made]))
        return io.NodeOutput(pixels, text, ui={**ui.PreviewImage(pixels, cls=cls).as_dict(), "text": (text,)})


def record_of(samples: dict[str, Any], sampler: Any) -> RunRecord:
    """The record of the run that made a LATENT. Raises ValueError when there is none."""
    record = getattr(sampler, "record", None) or samples.get(RECORD)
    if not isinstance(record, RunRecord):
        raise ValueError(
            "this LATENT carries no record of a run; connect LATENT of Light Forcing Sampler, or with "
            "SamplerCustomAdvanced also its sampler, and run it (a loaded latent, or a saved run that was already "
            "complete, has no record)"
        )
    return record


def _or_all(number: int) -> int | None:
    return None if number < 0 else number

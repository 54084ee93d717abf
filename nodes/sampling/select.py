"""The chunk sampler as a SAMPLER, for graphs that bring their own noise, guider or sigmas."""

from typing import Any

from comfy_api.latest import io

from ..schedule import ScheduleType
from ..texts import node_schema
from ..timeline import TimelineType
from .chunk_sampler import ChunkSampler
from .live_view import ProgressLine
from .observer import CutShort, runs_cut_short
from .request import Request, run_inputs


class LightForcingSamplerSelect(io.ComfyNode):
    """The chunk sampler for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingSamplerSelect",
            inputs=[
                ScheduleType.Input("schedule", optional=True),
                io.Latent.Input("start_latent", optional=True),
                TimelineType.Input("timeline", optional=True),
                *run_inputs(),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return runs_cut_short[cls.hidden.unique_id]

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(ChunkSampler(Request(**inputs), [ProgressLine(), CutShort(cls.hidden.unique_id)]))

"""The chunk sampler as a SAMPLER, for graphs that bring their own noise, guider or sigmas."""

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ...lightforcing_core.rollout.runtime import Replay
from ...lightforcing_core.rollout.schedule import Schedule
from ..timeline import PromptChange
from .chunk_sampler import ChunkSampler
from .inputs import CUT_SHORT, run_inputs, schedule_input, timeline_input
from .live_view import ProgressLine
from .memory import KV_CACHES
from .request import Request


class LightForcingSamplerSelect(io.ComfyNode):
    """The chunk sampler for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingSamplerSelect",
            display_name="Light Forcing Sampler Select",
            category="Light Forcing",
            description="The chunk-by-chunk sampler for SamplerCustomAdvanced. Use it with a patched model, "
            "BasicGuider, and BasicScheduler (simple, 4 steps).",
            inputs=[
                schedule_input(),
                io.Latent.Input(
                    "start_latent",
                    optional=True,
                    tooltip="The start of the video, from VAE Encode or Light Forcing Encode. It counts towards the "
                    "length.",
                ),
                timeline_input(),
                *run_inputs(),
            ],
            outputs=[io.Sampler.Output(display_name="SAMPLER", tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return CUT_SHORT[cls.hidden.unique_id]

    @classmethod
    def execute(
        cls,
        schedule: Schedule | None = None,
        start_latent: dict[str, Any] | None = None,
        timeline: Sequence[PromptChange] = (),
        replay: Replay = "all",
        keep_finished: bool = True,
        kv_cache: str = "auto",
        context_noise: float = 0.0,
        end_latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id

        def on_cut(reason: str) -> None:
            CUT_SHORT[node_id] += 1

        line = ProgressLine()
        wanted = Request(
            schedule,
            initial_latents=start_latent["samples"] if start_latent else None,
            last_latents=end_latent["samples"] if end_latent else None,
            timeline=timeline,
            context_noise=context_noise,
        )
        sampler = ChunkSampler(
            wanted,
            replay=replay,
            kv=KV_CACHES[kv_cache],
            keep_finished=keep_finished,
            on_cut=on_cut,
            on_plan=line.plan,
            on_step=line,
        )
        return io.NodeOutput(sampler)

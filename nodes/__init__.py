"""ComfyUI nodes, one file per feature; the only package that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from ..lightforcing_core.attention.dispatch import BackendUnavailable
from ..lightforcing_core.checkpoint.files import CheckpointError
from ..lightforcing_core.files.output import OutputError
from ..lightforcing_core.refusal import Refusal
from ..lightforcing_core.rollout.state import StateError
from . import demo_prompt, report, schedule, state, text_embeds, timeline, video_output
from .browser import add_routes
from .comfy import keep_queued_prompts, running_server
from .model import loader
from .sampling import sampler
from .sampling.direction import direct_run
from .vae import decode, encode

NODES: list[type[io.ComfyNode]] = [
    loader.LightForcingModelLoader,
    loader.LightForcingApply,
    schedule.LightForcingSchedule,
    sampler.LightForcingSampler,
    sampler.LightForcingSamplerSelect,
    timeline.LightForcingPromptTimeline,
    state.LightForcingSaveState,
    state.LightForcingLoadState,
    video_output.LightForcingVideoOutput,
    decode.LightForcingDecode,
    encode.LightForcingEncode,
    report.LightForcingReport,
    text_embeds.LightForcingSaveTextEmbeds,
    text_embeds.LightForcingLoadTextEmbeds,
    demo_prompt.LightForcingDemoPrompt,
]

# ComfyUI shows an error's module before its message; ours would be the path of this folder.
for error in (BackendUnavailable, CheckpointError, OutputError, Refusal, StateError):
    error.__module__ = "light_forcing"


class LightForcingExtension(ComfyExtension):
    """The extension that ComfyUI loads."""

    async def on_load(self) -> None:
        server = running_server()
        if server is not None:
            add_routes(server, schedule.plot_numbers, direct_run)
            keep_queued_prompts(server)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes; the demo prompt only if the demo model is installed."""
        return [node for node in NODES if node is not demo_prompt.LightForcingDemoPrompt or demo_prompt.find_table()]


async def comfy_entrypoint() -> LightForcingExtension:
    return LightForcingExtension()

"""ComfyUI nodes, one file per feature; the only package that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from ..lightforcing_core.attention.dispatch import BackendUnavailable
from ..lightforcing_core.checkpoint.files import CheckpointError
from ..lightforcing_core.files.output import OutputError
from ..lightforcing_core.refusal import Refusal
from ..lightforcing_core.rollout.state import StateError
from .browser import add_routes
from .comfy import running_server
from .demo_prompt import LightForcingDemoPrompt, find_table
from .model.loader import LightForcingApply, LightForcingModelLoader
from .report import LightForcingReport
from .sampling.sampler import LightForcingSampler
from .sampling.select import LightForcingSamplerSelect
from .schedule import LightForcingSchedule, plot_numbers
from .state import LightForcingLoadState, LightForcingSaveState
from .text_embeds import LightForcingLoadTextEmbeds, LightForcingSaveTextEmbeds
from .timeline import LightForcingPromptTimeline
from .vae.decode import LightForcingDecode
from .vae.encode import LightForcingEncode
from .video_output import LightForcingVideoOutput

NODES: list[type[io.ComfyNode]] = [
    LightForcingModelLoader,
    LightForcingApply,
    LightForcingSchedule,
    LightForcingSampler,
    LightForcingSamplerSelect,
    LightForcingPromptTimeline,
    LightForcingSaveState,
    LightForcingLoadState,
    LightForcingVideoOutput,
    LightForcingDecode,
    LightForcingEncode,
    LightForcingReport,
    LightForcingSaveTextEmbeds,
    LightForcingLoadTextEmbeds,
    LightForcingDemoPrompt,
]

# ComfyUI shows an error's module before its message; ours would be the path of this folder.
for error in (BackendUnavailable, CheckpointError, OutputError, Refusal, StateError):
    error.__module__ = "light_forcing"


class LightForcingExtension(ComfyExtension):
    """The extension that ComfyUI loads."""

    async def on_load(self) -> None:
        server = running_server()
        if server is not None:
            add_routes(server, plot_numbers)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes; the demo prompt only if the demo model is installed."""
        return [node for node in NODES if node is not LightForcingDemoPrompt or find_table() is not None]


async def comfy_entrypoint() -> LightForcingExtension:
    return LightForcingExtension()

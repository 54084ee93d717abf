"""ComfyUI nodes, one file per family; the only floor that imports the host."""

from comfy_api.latest import ComfyExtension, io

from .decode import LightForcingDecode
from .loader import LightForcingApply, LightForcingModelLoader
from .sampler import LightForcingSampler, LightForcingSamplerSelect
from .schedule import LightForcingSchedule
from .state import LightForcingLoadState, LightForcingSaveState
from .text_embeds import LightForcingLoadTextEmbeds, LightForcingSaveTextEmbeds
from .timeline import LightForcingPromptTimeline
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
    LightForcingSaveTextEmbeds,
    LightForcingLoadTextEmbeds,
]


class LightForcingExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> LightForcingExtension:
    return LightForcingExtension()

"""Light Forcing for ComfyUI, which finds `comfy_entrypoint` here; as a library: the public names of the core."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import lightforcing_core

if TYPE_CHECKING:
    from .lightforcing_core import POLICIES as POLICIES
    from .lightforcing_core import AttentionOptions as AttentionOptions
    from .lightforcing_core import Recipe as Recipe
    from .lightforcing_core import Runtime as Runtime
    from .lightforcing_core import StreamingDecoder as StreamingDecoder
    from .lightforcing_core import chunk_sparsities as chunk_sparsities
    from .lightforcing_core import few_step_sigmas as few_step_sigmas
    from .lightforcing_core import hierarchical_block_mask as hierarchical_block_mask
    from .lightforcing_core import load_dit_state_dict as load_dit_state_dict
    from .lightforcing_core import rollout as rollout
    from .lightforcing_core import sparse_attention as sparse_attention
    from .lightforcing_core import vae_from_state_dict as vae_from_state_dict
    from .lightforcing_core import wan_from_state_dict as wan_from_state_dict

if find_spec("comfy_api") is not None and find_spec("folder_paths") is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./nodes/web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


def __getattr__(name: str) -> Any:
    if name not in lightforcing_core.PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lightforcing_core.__getattr__(name)

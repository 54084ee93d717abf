"""Light Forcing for ComfyUI, which finds `comfy_entrypoint` here; as a library: the public names of the core.

The names are imported on first use, and torch with them.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lightforcing_core.attention.dispatch import sparse_attention as sparse_attention
    from .lightforcing_core.attention.options import AttentionOptions as AttentionOptions
    from .lightforcing_core.attention.policies import POLICIES as POLICIES
    from .lightforcing_core.attention.roles import read_roles as read_roles
    from .lightforcing_core.attention.selection import hierarchical_block_mask as hierarchical_block_mask
    from .lightforcing_core.checkpoint.load import load_dit_state_dict as load_dit_state_dict
    from .lightforcing_core.model.wan import wan_from_state_dict as wan_from_state_dict
    from .lightforcing_core.rollout.loop import rollout as rollout
    from .lightforcing_core.rollout.recipe import Recipe as Recipe
    from .lightforcing_core.rollout.recipe import few_step_sigmas as few_step_sigmas
    from .lightforcing_core.rollout.runtime import Runtime as Runtime
    from .lightforcing_core.rollout.schedule import chunk_sparsities as chunk_sparsities
    from .lightforcing_core.vae.streaming import StreamingDecoder as StreamingDecoder
    from .lightforcing_core.vae.wan_vae import vae_from_state_dict as vae_from_state_dict

# The module that defines each public name.
PUBLIC = {
    "AttentionOptions": "attention.options",
    "POLICIES": "attention.policies",
    "Recipe": "rollout.recipe",
    "Runtime": "rollout.runtime",
    "StreamingDecoder": "vae.streaming",
    "chunk_sparsities": "rollout.schedule",
    "few_step_sigmas": "rollout.recipe",
    "hierarchical_block_mask": "attention.selection",
    "load_dit_state_dict": "checkpoint.load",
    "read_roles": "attention.roles",
    "rollout": "rollout.loop",
    "sparse_attention": "attention.dispatch",
    "vae_from_state_dict": "vae.wan_vae",
    "wan_from_state_dict": "model.wan",
}

if find_spec("comfy_api") is not None and find_spec("folder_paths") is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./nodes/web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".lightforcing_core.{PUBLIC[name]}", __name__), name)

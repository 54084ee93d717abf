"""Light Forcing in plain PyTorch. The public names are imported on first use, and torch with them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention.dispatch import sparse_attention as sparse_attention
    from .attention.options import AttentionOptions as AttentionOptions
    from .attention.policies import POLICIES as POLICIES
    from .attention.selection import hierarchical_block_mask as hierarchical_block_mask
    from .checkpoint.load import load_dit_state_dict as load_dit_state_dict
    from .model.wan import wan_from_state_dict as wan_from_state_dict
    from .rollout.loop import rollout as rollout
    from .rollout.recipe import Recipe as Recipe
    from .rollout.recipe import few_step_sigmas as few_step_sigmas
    from .rollout.runtime import Runtime as Runtime
    from .rollout.schedule import chunk_sparsities as chunk_sparsities
    from .vae.streaming import StreamingDecoder as StreamingDecoder
    from .vae.wan_vae import vae_from_state_dict as vae_from_state_dict

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
    "rollout": "rollout.loop",
    "sparse_attention": "attention.dispatch",
    "vae_from_state_dict": "vae.wan_vae",
    "wan_from_state_dict": "model.wan",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)

"""Light Forcing for ComfyUI, which finds `comfy_entrypoint` here; as a library: the public names of the core."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import lightforcing_core

if TYPE_CHECKING:
    from .lightforcing_core import *  # noqa: F403

if find_spec("comfy_api") is not None and find_spec("folder_paths") is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./nodes/web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


def __getattr__(name: str) -> Any:
    if name not in lightforcing_core.PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lightforcing_core.__getattr__(name)

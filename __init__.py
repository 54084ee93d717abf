"""Light Forcing for ComfyUI: the host finds `comfy_entrypoint` here; everything else lives one floor down."""

from importlib.util import find_spec

if find_spec("comfy_api") is not None and find_spec("folder_paths") is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./nodes/web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

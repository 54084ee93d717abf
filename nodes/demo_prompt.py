"""The demo model in ComfyUI: its prompt node, and its files in the loaders' lists."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..lightforcing_core.demo.captions import context_of_caption, parse
from ..lightforcing_core.demo.model import DEFAULT_CAPTION, DIT, SHIPPED, TEXT, VAE, demo_video, load_table
from .comfy import add_model_folder, input_folder, models_root
from .texts import node_schema


class LightForcingDemoPrompt(io.ComfyNode):
    """Encode a caption for the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingDemoPrompt",
            inputs=[io.String.Input("caption", default=DEFAULT_CAPTION, multiline=True)],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING")],
        )

    @classmethod
    def validate_inputs(cls, caption: str | None) -> bool:
        """Refuse a caption that the model cannot draw before anything runs; None if linked."""
        if caption is not None:
            check_caption(caption, find_table())
        return True

    @classmethod
    def execute(cls, caption: str) -> io.NodeOutput:
        return io.NodeOutput(encode_caption(caption))


def encode_caption(caption: str) -> list[Any]:
    """CONDITIONING of a caption. Raises ValueError."""
    table = find_table()
    check_caption(caption, table)
    if table is None:
        raise ValueError(f"{TEXT} is no longer in {SHIPPED}; reinstall the pack, which contains the demo model")
    return [[context_of_caption(load_table(table), caption), {"pooled_output": None}]]


def check_caption(caption: str, table: Path | None) -> None:
    """ValueError unless the model of this table draws what the caption says, or, without its file, for wrong words."""
    video = None
    with contextlib.suppress(ValueError):  # the model lies elsewhere
        video = demo_video(table.parent) if table else None
    try:
        if video:
            video.check(caption)
        else:
            parse(caption)
    except ValueError as error:
        raise ValueError(f"{error}. Captions read like: {DEFAULT_CAPTION}") from error


def find_table() -> Path | None:
    """The text table in ComfyUI's models folder, else the pack's, else None."""
    places = (folder / TEXT for folder in (models_root(), SHIPPED))
    return next((file for file in places if file.is_file()), None)


def offer_demo_files() -> None:
    """List the pack's own models, if installed, after the user's in ComfyUI, and its clip among the inputs."""
    for file in (SHIPPED / DIT, SHIPPED / VAE):
        if file.is_file():
            add_model_folder(file.parent)
    clip = SHIPPED.parent / "input" / "light_forcing_clip.mp4"
    if not (copy := input_folder() / clip.name).exists():  # Load Video reads no other folder
        with contextlib.suppress(OSError):
            shutil.copyfile(clip, copy)


offer_demo_files()

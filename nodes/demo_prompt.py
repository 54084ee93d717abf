"""The demo model inside ComfyUI: its prompt node, and its files in the loaders' lists without a download."""

from pathlib import Path

from comfy_api.latest import io

from ..lightforcing_core.demo.captions import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    context_of_caption,
    parse,
)
from ..lightforcing_core.demo.model import DEFAULT_CAPTION, DIT, SHIPPED, TEXT, VAE, load_table
from .comfy import add_model_folder, models_root


class LightForcingDemoPrompt(io.ComfyNode):
    """Caption → CONDITIONING for the demo model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingDemoPrompt",
            display_name="Light Forcing Demo Prompt",
            category="Light Forcing",
            description="Encodes a caption for the small demo model that comes with this pack. It needs no text "
            "encoder and knows a few dozen words.",
            inputs=[
                io.String.Input(
                    "caption",
                    default=DEFAULT_CAPTION,
                    multiline=True,
                    tooltip="on a [background] background a [colour] [shape] moves [direction] [speed], optionally "
                    "followed by: and a [colour] [shape] moves [direction] [speed]. "
                    f"Backgrounds: {', '.join(BACKGROUNDS)}. Colours: {', '.join(COLOURS)}. Shapes: "
                    f"{', '.join(SHAPES)}. Directions: {', '.join(DIRECTIONS)}. Speeds: {', '.join(SPEEDS)}. Other "
                    "words are refused, with a list of those that fit.",
                )
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="CONDITIONING",
                    tooltip="For light_forcing_demo only: other models need their own text encoder.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, caption: str | None) -> bool | str:
        """Why a caption is outside the grammar, before anything runs; one that comes over a link is None here."""
        try:
            if caption is not None:
                parse(caption)
        except ValueError as error:
            return f"{error}. Captions read like: {DEFAULT_CAPTION}"
        return True

    @classmethod
    def execute(cls, caption: str) -> io.NodeOutput:
        parse(caption)
        table = find_table()
        if table is None:
            raise ValueError(f"{TEXT} is no longer in {SHIPPED}; install the pack anew, the demo model comes with it")
        context = context_of_caption(load_table(table), caption)
        return io.NodeOutput([[context, {"pooled_output": None}]])


def find_table() -> Path | None:
    """The text table: one in ComfyUI's models folder, else the pack's."""
    places = (folder / TEXT for folder in (models_root(), SHIPPED))
    return next((file for file in places if file.is_file()), None)


def offer_demo_files() -> None:
    """Put the pack's own models into the lists of ComfyUI's loaders, behind the user's, where they are there."""
    for file in (SHIPPED / DIT, SHIPPED / VAE):
        if file.is_file():
            add_model_folder(file.parent)


offer_demo_files()

"""Save and load encoded prompts, so that they need no 10 GB text encoder again."""

from pathlib import Path

from comfy_api.latest import io, ui

from ..lightforcing_core.rollout.text_embeds import load_embeds, save_embeds
from .comfy import add_model_kind, model_files, model_folder, model_path, named_file, version_of
from .texts import node_schema

FOLDER = "text_embeds"
add_model_kind(FOLDER, ".safetensors")


class LightForcingSaveTextEmbeds(io.ComfyNode):
    """Save CONDITIONING to models/text_embeds/NAME.safetensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingSaveTextEmbeds",
            inputs=[io.Conditioning.Input("conditioning"), io.String.Input("name", default="prompt")],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, conditioning: list, name: str) -> io.NodeOutput:
        path = named_file(model_folder(FOLDER), name)
        save_embeds(path, conditioning)
        return io.NodeOutput(conditioning, ui=ui.PreviewText(f"saved {path.name} in {path.parent}"))


class LightForcingLoadTextEmbeds(io.ComfyNode):
    """Load CONDITIONING from models/text_embeds/NAME.safetensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingLoadTextEmbeds",
            inputs=[io.Combo.Input("name", options=model_files(FOLDER))],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        return version_of(model_path(FOLDER, name))

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(load_embeds(Path(model_path(FOLDER, name))))

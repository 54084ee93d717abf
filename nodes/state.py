"""A run's state on disk: written by the sampler after every chunk, and loaded to continue the run."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from comfy_api.latest import io

from ..lightforcing_core.files.json import regular_size
from ..lightforcing_core.files.output import numbered_path
from ..lightforcing_core.rollout.schedule import video_frames_of
from ..lightforcing_core.rollout.state import RunState, load_run_state
from .comfy import named_file, numbered_output, output_folder, version_of
from .texts import node_schema

StateType = io.Custom("LIGHTFORCING_STATE")
FOLDER = "light_forcing"  # inside the output folder
SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class StateFile:
    """The file of a run's state; `run`: the saved run to continue, if any.

    path: of that file; without a saved run, the name to which a number is added when the run begins.
    """

    path: Path
    run: RunState | None = None

    def reserved(self) -> AbstractContextManager[Path]:
        """Reserve the file to write while a block runs. Raises OutputError."""
        return nullcontext(self.path) if self.run else numbered_path(self.path.parent, self.path.name, SUFFIX)

    def continued(self, latent_shape: Sequence[int]) -> RunState | None:
        """The run to continue to `latent_shape`; ValueError if it does not fit."""
        if self.run is None:
            return None
        made_for, name = self.run.recipe.latent_shape, f"state {self.path.name}"
        if (*latent_shape[:2], *latent_shape[3:]) != (*made_for[:2], *made_for[3:]):
            sizes = [f"{8 * shape[4]}×{8 * shape[3]}, batch {shape[0]}" for shape in (made_for, latent_shape)]
            raise ValueError(f"{name} holds a video of {sizes[0]}, but the latent is {sizes[1]}; make them the same")
        frames, least = latent_shape[2], video_frames_of(made_for[2])
        if frames < made_for[2]:
            problem = f"holds a video of {least} frames, which the latent's {video_frames_of(frames)} would shorten"
            raise ValueError(f"{name} {problem}; set its length to {least} or more")
        return self.run.lengthened(frames) if frames > made_for[2] else self.run


class LightForcingSaveState(io.ComfyNode):
    """Name the file in which the sampler saves its run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingSaveState",
            inputs=[io.String.Input("name", default="run")],
            outputs=[StateType.Output(display_name="state")],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        prefix = named_file(state_folder(), name).relative_to(output_folder()).with_suffix("")
        return io.NodeOutput(StateFile(Path(*numbered_output(str(prefix)))))


class LightForcingLoadState(io.ComfyNode):
    """Load a saved run for the sampler to continue."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "LightForcingLoadState",
            search_aliases=["extend video"],
            inputs=[io.Combo.Input("file", options=state_files())],
            outputs=[StateType.Output(display_name="state")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return version_of(state_folder() / file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = named_file(state_folder(), file)  # ComfyUI does not check a linked name against the list
        return io.NodeOutput(StateFile(path, load_run_state(path)))


def state_folder() -> Path:
    return output_folder() / FOLDER


def state_files() -> list[str]:
    """Every saved state that can be read, newest first, relative to the folder; a linked folder is entered once."""
    root, entered, found = state_folder(), set(), {}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:
            subfolders.clear()
            continue
        entered.add(real)
        for path in (Path(folder, name) for name in names if name.endswith(SUFFIX) and not name.startswith(".")):
            with suppress(OSError):
                regular_size(path)
                found[path.relative_to(root).as_posix()] = path.stat().st_mtime_ns
    return sorted(found, key=found.__getitem__, reverse=True)

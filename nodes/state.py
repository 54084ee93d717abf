"""A run's state on disk: written by the sampler after every chunk, read back to go on where it ended."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from comfy_api.latest import io

from ..lightforcing_core.files.output import numbered_path
from ..lightforcing_core.rollout.schedule import video_frames_of
from ..lightforcing_core.rollout.state import RunState, load_run_state
from .comfy import output_folder

StateType = io.Custom("LIGHTFORCING_STATE")
FOLDER = "light_forcing"  # inside the output folder
SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class StateFile:
    """Where a run keeps its state; `run` is what a former run left there.

    path: without a run the name that is numbered when the run begins, with one the file itself.
    """

    path: Path
    run: RunState | None = None

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """The file to write, kept from other runs while the block runs. Raises OutputError."""
        if self.run is not None:
            yield self.path
            return
        with numbered_path(self.path.parent, self.path.name, SUFFIX) as path:
            yield path

    def continued(self, latent_shape: Sequence[int]) -> RunState | None:
        """The run to go on with, for a video of `latent_shape`; ValueError when it is of another size or shorter."""
        if self.run is None:
            return None
        frames, made_for = latent_shape[2], self.run.recipe.latent_shape
        if (*latent_shape[:2], *latent_shape[3:]) != (*made_for[:2], *made_for[3:]):
            raise ValueError(
                f"state {self.path.name} is of a video of {made_for[4] * 8}×{made_for[3] * 8}, batch {made_for[0]}; "
                f"the latent is {latent_shape[4] * 8}×{latent_shape[3] * 8}, batch {latent_shape[0]}: set it to that"
            )
        if frames < made_for[2]:
            raise ValueError(
                f"state {self.path.name} is of a video of {video_frames_of(made_for[2])} frames; the latent's length "
                f"{video_frames_of(frames)} would shorten it: set it to {video_frames_of(made_for[2])} or more"
            )
        return self.run.lengthened(frames) if frames > made_for[2] else self.run


class LightForcingSaveState(io.ComfyNode):
    """A name → where the sampler keeps its state."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingSaveState",
            display_name="Light Forcing Save State",
            category="Light Forcing",
            description="Lets the sampler save the run after every finished chunk, so a crash or a restart loses at "
            "most one chunk. Light Forcing Load State continues the run.",
            inputs=[
                io.String.Input(
                    "name",
                    default="run",
                    tooltip="File name in output/light_forcing; subfolder/name works. A number is added, nothing is "
                    "overwritten.",
                ),
            ],
            outputs=[StateType.Output(display_name="state", tooltip="For the state input of Light Forcing Sampler.")],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        folder = state_folder()
        stem = name.strip().removesuffix(SUFFIX)
        path = (folder / stem).resolve()
        if not stem or path == folder or path.name.startswith(".") or not path.is_relative_to(folder):
            raise ValueError(f"name {name!r} is no file name inside {folder}; use letters, digits and /")
        return io.NodeOutput(StateFile(path))


class LightForcingLoadState(io.ComfyNode):
    """A saved state → the run that the sampler goes on with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightForcingLoadState",
            display_name="Light Forcing Load State",
            category="Light Forcing",
            description="Loads a run that Light Forcing Save State has saved. The sampler continues it and writes to "
            "the same file; the result is the video that an uninterrupted run makes.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=state_files(),
                    tooltip="A file in output/light_forcing; press R to see new ones. Prompts, seed, steps, cfg, "
                    "schedule, start and end latent come from the file, and the sampler's own inputs for them are not "
                    "read. The model and the size must be the same; a longer latent makes the video longer.",
                ),
            ],
            outputs=[StateType.Output(display_name="state", tooltip="For the state input of Light Forcing Sampler.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        status = os.stat(state_folder() / file)
        return f"{status.st_mtime_ns}/{status.st_size}"

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        folder = state_folder()
        path = (folder / file).resolve()
        if not path.is_relative_to(folder):  # a name that came over a link, which the host does not compare to the list
            raise ValueError(f"file {file!r} is not inside {folder}; choose one of the list")
        return io.NodeOutput(StateFile(path, load_run_state(path)))


def state_folder() -> Path:
    """Where states are kept."""
    return (output_folder() / FOLDER).resolve()


def state_files() -> list[str]:
    """Every saved state, newest first, relative to the folder."""
    folder = state_folder()
    found = [path for path in folder.rglob(f"*{SUFFIX}") if not path.name.startswith(".")]
    found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [path.relative_to(folder).as_posix() for path in found]

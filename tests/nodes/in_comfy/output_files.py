"""Files and links of other people in the output folder: the nodes that list, name and write there; printed as JSON."""

import json
import os
import tempfile
from pathlib import Path

import comfyui
import folder_paths

state, videos = comfyui.module("nodes.state"), comfyui.module("nodes.video_output")
home = Path(tempfile.mkdtemp())
elsewhere, real = home / "elsewhere", home / "real output"
for folder in (elsewhere / "runs", real / "light_forcing" / "folder.safetensors", real / "kept"):
    folder.mkdir(parents=True)
(home / "output").symlink_to(real, target_is_directory=True)
folder_paths.set_output_directory(str(home / "output"))
states = home / "output" / "light_forcing"

for number, path in enumerate(
    (states / "one.safetensors", elsewhere / "runs" / "two.safetensors", states / ".x.safetensors")
):
    path.touch()
    os.utime(path, (number, number))
(states / "dangling.safetensors").symlink_to(home / "nowhere")
(states / "x").symlink_to(home / "nowhere")
(states / "self.safetensors").symlink_to(states / "self.safetensors")
(states / "linked").symlink_to(elsewhere / "runs", target_is_directory=True)
(states / "loop").symlink_to(states, target_is_directory=True)
os.mkfifo(states / "pipe.safetensors")
facts = {"listed": state.state_files()}
facts["options"] = state.LightForcingLoadState.INPUT_TYPES()["required"]["file"][1]["options"]


def refusal(file):
    return comfyui.error_of(state.LightForcingLoadState.execute, file)


facts["outside"] = [refusal("../../secret.safetensors"), refusal(str(elsewhere / "runs" / "two.safetensors"))]
facts["pipe"], facts["dangling"] = refusal("pipe.safetensors"), refusal("dangling.safetensors")


def named(name):
    return str(state.LightForcingSaveState.execute(name)[0].path.relative_to(states))


facts["named"] = [named("run"), named(" a/../b/run.v2.safetensors "), named("linked.in/run")]
facts["bad names"] = [
    comfyui.error_of(state.LightForcingSaveState.execute, name) for name in ("../x", "/etc/x", "", ".x", "a\0b")
]

# A linked subfolder counts as it does in ComfyUI's own nodes of this version; kept stays, made folders go.
(home / "output" / "outside").symlink_to(elsewhere, target_is_directory=True)
(home / "output" / "inside").symlink_to(real / "kept", target_is_directory=True)
facts["as in core"] = {}
for name in ("outside", "inside", "plain", "../output/back", str(home / "output" / "absolute")):
    prefix = f"{name}/clip"
    core = comfyui.error_of(folder_paths.get_save_image_path, prefix, folder_paths.get_output_directory())

    def write(prefix=prefix):
        with videos.open_videos(videos.VideoOutput(prefix, "webm", None, 16, False), [1, 16, 1, 4, 6], None) as files:
            files.write(comfyui.torch.zeros(1, 1, 32, 48, 3))
        return files.shown()

    shown = comfyui.error_of(write) or write()
    facts["as in core"][name.removeprefix(str(home))] = [core is None, shown if isinstance(shown, str) else shown[0]]
try:
    with videos.open_videos(videos.VideoOutput("new/below/clip", "mp4", None, 16, False), [1, 16, 1, 4, 6], None):
        raise InterruptedError
except InterruptedError:
    facts["left of a failed run"] = (home / "output" / "new").exists()
print(json.dumps(facts))

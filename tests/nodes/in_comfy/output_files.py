"""Files and links of other people in the output folder: the nodes that list, name and write there."""

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
assert state.state_files() == ["linked/two.safetensors", "one.safetensors"]
assert state.LightForcingLoadState.INPUT_TYPES()["required"]["file"][1]["options"] == state.state_files()


for file in ("../../secret.safetensors", str(elsewhere / "runs" / "two.safetensors")):
    assert "is not a file name inside" in comfyui.error_of(state.LightForcingLoadState.execute, file)


def named(name):
    return str(state.LightForcingSaveState.execute(name)[0].path.relative_to(states))


assert [named(name) for name in ("run", " a/../b/run.v2.safetensors ", "linked.in/run")] == [
    "run",
    "b/run.v2",
    "linked.in/run",
]
for name in ("../x", "/etc/x", "", ".x", "a\0b"):
    assert "is not a file name inside" in comfyui.error_of(state.LightForcingSaveState.execute, name)

# A linked subfolder counts as it does in ComfyUI's own nodes of this version; kept stays, made folders go.
(home / "output" / "outside").symlink_to(elsewhere, target_is_directory=True)
(home / "output" / "inside").symlink_to(real / "kept", target_is_directory=True)
for name in ("outside", "inside", "plain", "../output/back", str(home / "output" / "absolute")):
    prefix = f"{name}/clip"
    core = comfyui.error_of(folder_paths.get_save_image_path, prefix, folder_paths.get_output_directory())

    def write(prefix=prefix):
        with videos.open_video(videos.VideoOutput(prefix, "webm", None, 16, False), [1, 16, 1, 4, 6], None) as video:
            video.write(comfyui.torch.zeros(1, 32, 48, 3))
        return videos.saved_results([video])

    if core is None:
        assert write()[0]["subfolder"] == Path(name).name
    else:
        assert "outside the output folder" in comfyui.error_of(write), name
try:
    with videos.open_video(videos.VideoOutput("new/below/clip", "mp4", None, 16, False), [1, 16, 1, 4, 6], None):
        raise InterruptedError
except InterruptedError:
    assert not (home / "output" / "new").exists()
(home / "output" / "mine" / "empty").mkdir(parents=True)
comfyui.module("nodes.comfy").numbered_output("mine/empty/clip")
assert (home / "output" / "mine" / "empty").is_dir()

"""Decode beside the sampling on the sampling node: nothing that an artist gets differs from decoding at once.

A stand-in for the second stream works only when it is waited for; if it is slow, frames never arrive by themselves.
"""

from dataclasses import replace

import comfyui
import torch
from comfyui import comfy, failing, model_failing

decode = comfyui.module("nodes.vae.decode")
chunk_sampler, video_output, live_view = comfyui.modules(
    "nodes", "sampling.chunk_sampler", "video_output", "sampling.live_view"
)
overlap, core = comfyui.module("lightforcing_core.vae.overlap"), comfyui.module("lightforcing_core.files.video")
Late = comfyui.module("tests.support.late").LateStream
model, vae = comfyui.applied(comfyui.load("tiny_wan.safetensors")), comfyui.small_vae()
node = comfyui.sampling_node()
OUTPUT = comfyui.module("nodes.comfy").output_folder()
plan_of = chunk_sampler.plan_of


def overlapped(on):
    """Let runs overlap from now on, as on a GPU with enough memory, or not."""
    overlap.side_stream = Late
    chunk_sampler.plan_of = (lambda *a, **n: replace(plan_of(*a, **n), overlap=True)) if on else plan_of
    Late.log.clear()


def run(frames=9, **inputs):
    arguments = {"model": model, "positive": comfyui.prompt(), "seed": 1, "steps": 2, "vae": vae, **inputs}
    try:
        output = node.execute(latent={"samples": torch.zeros(1, 16, frames, 4, 6)}, **arguments)
    except BaseException as error:
        return type(error).__name__, None, str(error)
    return output[0]["samples"], output[1], output.ui


def sizes(result):
    latent, frames, ui = result
    return [
        latent.shape[2] if isinstance(latent, torch.Tensor) else latent,
        frames.shape[0] if isinstance(frames, torch.Tensor) else None,
        (ui or {}).get("text") if not isinstance(ui, str) else ui,
    ]


def video(name, suffix, **inputs):
    """The mean of every frame in the file that a run writes."""
    output = video_output.VideoOutput(f"overlap/{name}", "mp4", None, 16.0, False)
    run(video_output=output, **inputs)
    with core.av.open(str(OUTPUT / "overlap" / f"{name}_00001{suffix}")) as container:
        return [float(frame.to_ndarray().astype("f4").mean()) for frame in container.decode(video=0)]


oom = torch.OutOfMemoryError("CUDA out of memory")
stop = comfy.model_management.InterruptProcessingException()
start_latent = {"samples": comfyui.noise_of((1, 16, 5, 4, 6), seed=3) * 0.1}
shown, add_frames = [], live_view.LiveView.add_frames


def seen(self, frames):
    shown.append([self._decoded, self._decoded + frames.shape[1]])
    add_frames(self, frames)


live_view.LiveView.add_frames = seen
found, made = {}, {}
for way in ("at once", "beside", "beside, slow"):
    overlapped(way != "at once")
    Late.is_fast = way == "beside"
    shown.clear()
    result = run()
    logs = {
        "at once": [],
        "beside": ["put", "frames"] * 3,
        # The second chunk is under way before anything waits for the first.
        "beside, slow": ["put", "put", "frames", "put", "frames", "frames"],
    }
    assert (Late.log, shown) == (logs[way], [[0, 9], [9, 21], [21, 33]]), (way, Late.log, shown)
    made[way] = [*result[:2], *run(start_latent=start_latent, frames=9)[:2]]
    ends = found[way] = {"whole": sizes(result)}
    ends["step fails"] = sizes(run(model=model_failing(model, 5, oom)))
    ends["cancelled in a step"] = sizes(run(model=model_failing(model, 5, stop)))
    ends["not kept"] = sizes(run(model=model_failing(model, 5, stop), keep_finished=False))
    stream = decode.StreamingDecoder.decode
    if way == "at once":
        decode.StreamingDecoder.decode = failing(stream, 2, oom)
    start, Late.start = Late.start, failing(Late.start, 2, oom)
    ends["decode fails"] = sizes(run())
    decode.StreamingDecoder.decode, Late.start = stream, start
    for more in ({}, {"model": model_failing(model, 8, stop)}):  # NaN of the second chunk's frames, alone or not
        latent, frames, _ = sizes(run(vae=comfyui.vae_with_nan(4), **more))
        assert (latent, frames) == (9 if way == "beside, slow" and not more else 6, 9), (way, latent, frames)
    live_view.LiveView.add_frames = failing(seen, 2, stop)
    latent, frames, _ = sizes(run())  # cancelled while a chunk is handed on: both still tell the same video
    assert way == "at once" or frames == 4 * latent - 3, (way, latent, frames)
    live_view.LiveView.add_frames = seen
    assert all(map(torch.equal, made[way], made["at once"])), way
    assert ends == found["at once"], way
    for suffix, count, more in (
        (".mp4", 33, {}),
        (".partial.mp4", 21, {"model": model_failing(model, 8, RuntimeError("boom"))}),
    ):
        means = video(f"{way} {count}", suffix, **more)
        plain = made.setdefault(suffix, means)
        assert len(means) == len(plain) == count, (way, suffix)
        # The encoder's threads decide a little, more so on a busy machine: up to 0.2 between two of the same frames.
        assert all(abs(a - b) <= 0.4 for a, b in zip(means, plain, strict=True)), (way, suffix)
lengths = {end: [latent, frames] for end, (latent, frames, _) in found["at once"].items()}
assert lengths == {
    "whole": [9, 33],
    "step fails": [3, 9],
    "cancelled in a step": [3, 9],
    "not kept": ["InterruptProcessingException", None],
    "decode fails": [6, 9],
}

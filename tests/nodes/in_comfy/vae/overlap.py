"""The sampling node with a second stream that is slow: frames, files and endings, against decoding at once; as JSON."""

import json
from dataclasses import replace

import comfyui
import torch
from comfyui import comfy, failing, model_failing

decode = comfyui.module("nodes.vae.decode")
chunk_sampler, video_output, live_view = comfyui.modules(
    "nodes", "sampling.chunk_sampler", "video_output", "sampling.live_view"
)
overlap, core = comfyui.module("lightforcing_core.vae.overlap"), comfyui.module("lightforcing_core.files.video")
model, vae = comfyui.applied(comfyui.load("tiny_wan.safetensors")), comfyui.small_vae()
node = comfyui.sampling_node()
OUTPUT = comfyui.module("nodes.comfy").output_folder()
log = []  # what happened, in order
slow = False  # whether the device is so slow that frames never arrive by themselves


class Late:
    """A second stream that works only when it is waited for."""

    def __init__(self, device):
        pass

    def start(self, work, latents):
        log.append("put")
        return LateFrames(work)

    def join(self):
        log.append("join")


class LateFrames:
    def __init__(self, work):
        self.work = work

    def is_there(self):
        return not slow

    def frames(self):
        log.append("frames")
        return self.work()


class Overlapped(overlap.OverlappedDecoder):
    def __init__(self, decoder, device, *, concurrent=True):
        super().__init__(decoder, "cuda" if concurrent else device, concurrent=concurrent)


plan_of = chunk_sampler.plan_of


def overlapped(on):
    """Let runs overlap from now on, as on a GPU with enough memory, or not."""
    overlap.SideStream = Late
    decode.OverlappedDecoder = Overlapped
    chunk_sampler.plan_of = (lambda *a, **n: replace(plan_of(*a, **n), overlap=True)) if on else plan_of
    log.clear()


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


def video(name, **inputs):
    """Frames in the files of a run that writes one, by file."""
    output = video_output.VideoOutput(f"overlap/{name}", "mp4", None, 16.0, False)
    run(video_output=output, **inputs)
    found = {}
    for path in sorted((OUTPUT / "overlap").glob(f"{name}_*")):
        with core.av.open(str(path)) as container:
            found[path.name.removeprefix(name)] = [
                float(frame.to_ndarray().astype("f4").mean()) for frame in container.decode(video=0)
            ]
    return found


oom = torch.OutOfMemoryError("CUDA out of memory")
stop = comfy.model_management.InterruptProcessingException()
start_latent = {"samples": comfyui.noise_of((1, 16, 5, 4, 6), seed=3) * 0.1}
facts = {}
shown, add_frames = [], live_view.LiveView.add_frames


def seen(self, frames, start):
    shown.append([start, start + frames.shape[1]])
    add_frames(self, frames, start)


live_view.LiveView.add_frames = seen
whole = {}
for way in ("at once", "beside", "beside, slow"):
    overlapped(way != "at once")
    slow = way == "beside, slow"
    shown.clear()
    result = run()
    whole[way] = result[:2]
    found = facts[way] = {"whole": sizes(result), "log": list(log), "shown": list(shown)}
    result = run(start_latent=start_latent, frames=9)
    whole[f"{way}, continued"] = result[:2]
    found["step fails"] = sizes(run(model=model_failing(model, 5, oom)))
    found["cancelled in a step"] = sizes(run(model=model_failing(model, 5, stop)))
    found["not kept"] = sizes(run(model=model_failing(model, 5, stop), keep_finished=False))
    stream = decode.StreamingDecoder.decode
    if way == "at once":
        decode.StreamingDecoder.decode = failing(stream, 2, oom)
    Late.start = failing(Late.start, 2, oom)
    found["decode fails"] = sizes(run())
    decode.StreamingDecoder.decode = stream
    Late.start = start = Late.__dict__["start"]
    Late.start = lambda self, work, latents: (log.append("put"), LateFrames(work))[1]
    found["video"] = video(f"whole{len(facts)}")
    found["broken video"] = video(f"broken{len(facts)}", model=model_failing(model, 8, RuntimeError("boom")))
    live_view.LiveView.add_frames = failing(seen, 2, stop)
    found["cancelled while shown"] = sizes(run())
    live_view.LiveView.add_frames = seen
for name in ("beside", "beside, slow"):
    for kind in ("", ", continued"):
        pair = zip(whole[f"at once{kind}"], whole[f"{name}{kind}"], strict=True)
        facts[f"{name}{kind} equals"] = [torch.equal(a, b) for a, b in pair]
print(json.dumps(facts))

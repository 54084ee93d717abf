"""Choices by measurement in a run: shown once, kept in its recipe and its report, ignored by speed safe."""

import os
import tempfile

import comfyui
import torch

os.environ["LIGHTFORCING_CACHE_DIR"] = tempfile.mkdtemp()
os.environ.pop("LIGHTFORCING_PROFILE", None)
chunk_sampler, machine = comfyui.module("nodes.sampling.chunk_sampler"), comfyui.module("lightforcing_core.machine")
said, model, noise = [], comfyui.load("tiny_wan.safetensors"), comfyui.noise_of((1, 16, 9, 16, 16))
model = comfyui.module("nodes.model.patch").patched(model, comfyui.settings_of("self_forcing", block=(16, 16)))
chunk_sampler.show_text = said.append
order = ["dense", "sparse"]  # the faster one first


def seconds_of(run, device):
    run()
    name = getattr(run, "__name__", "")
    return 1e-3 * (1 + order.index(name)) if name in order else 1e-3


machine.seconds_of = seconds_of


class Begun(chunk_sampler.Observer):
    def begin(self, run, plan):
        self.growth = run.recipe.growth


def run(**request):
    """The video, the sparsities of its recipe and its report."""
    said.clear()
    sampler = comfyui.chunk_sampler(9, begun := Begun(), **request)
    video = comfyui.sample(model, sampler, noise)
    return video, begun.growth, sampler.record.facts["measured"]


safe, growth, report = run(speed="safe")
assert not said
assert not os.listdir(machine.folder())
assert all(growth[1:])
assert report == "no, by speed safe"
dense, growth, report = run()
assert set(said) == {"measuring this machine, once, about 8 s"}, said
assert not any(growth[:3])
assert report.count("dense 2.00 times as fast as sparse") == 2, report
assert not torch.equal(dense, safe)
again, _, _ = run()
assert not said
assert torch.equal(again, dense)
video, _, report = run(speed="safe")
assert torch.equal(video, safe)
assert report == "no, by speed safe"
os.environ["LIGHTFORCING_PROFILE"] = "off"
machine._settled.clear()
assert torch.equal(run()[0], safe)

"""Choices by measurement in a run: shown once, kept in its recipe and its report, ignored by speed safe."""

import os
import tempfile

import comfyui
import torch

os.environ["LIGHTFORCING_CACHE_DIR"] = tempfile.mkdtemp()
os.environ.pop("LIGHTFORCING_PROFILE", None)
chunk_sampler = comfyui.module("nodes.sampling.chunk_sampler")
names = "machine", "profile", "rollout.look"
machine, profile, look = (comfyui.module(f"lightforcing_core.{name}") for name in names)
said, model, noise = [], comfyui.load("tiny_wan.safetensors"), comfyui.noise_of((1, 16, 9, 16, 16))
model = comfyui.module("nodes.model.patch").patched(model, comfyui.settings_of("self_forcing", block=(16, 16)))
chunk_sampler.show_text = said.append
order = ["dense", "sparse"]  # the faster one first


def seconds_of(run, device):
    run()
    name = run.args[0]
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
    return video, begun.growth, sampler.record.facts


safe, growth, report = run(speed="safe")
assert not said
assert not os.listdir(profile.folder())
assert all(growth[1:])
assert report["speed"] == "safe"
assert not any(name.startswith("measured") for name in report)
dense, growth, report = run()
assert set(said) == {"measuring this machine, once, about 8 s"}, said
assert not any(growth[:3])
dense_chunks = [name for name, text in report.items() if "dense is 2.00 times as fast as sparse" in text]
assert len(dense_chunks) == 2, report
assert not torch.equal(dense, safe)
again, _, second = run()
assert not said
assert torch.equal(again, dense)
assert [name for name in second if name in dense_chunks] == dense_chunks


def looked(waiting):
    """The chunks that a run looks at if another prompt waits, or not."""
    look._looked.clear()
    chunk_sampler.is_prompt_waiting = lambda: waiting
    run()
    return len(look._looked)


assert (looked(True), looked(False)) == (1, 3)
video, _, report = run(speed="safe")
assert torch.equal(video, safe)
assert not any(name.startswith("measured") for name in report)
os.environ["LIGHTFORCING_PROFILE"] = "off"
assert torch.equal(run()[0], safe)

"""The live view beside another pack's previewer, and its budget under a clock that is set by hand."""

import time
from types import SimpleNamespace

import numpy as np
from comfyui import applied, load, module, noise_of, sample  # first: it adds ComfyUI to the path

import latent_preview  # isort: skip
import torch

live_view = module("nodes.sampling.live_view")
chunk_sampler = module("nodes.sampling.chunk_sampler")

shapes, filled = [], []


class ForeignPreviewer(latent_preview.LatentPreviewer):
    def decode_latent_to_preview_image(self, preview_format, x0):
        shapes.append(list(x0.shape))
        filled.append(int((x0[0].abs().amax((0, 2, 3)) > 0).sum()))


model = applied(load("tiny_wan.safetensors"))
noise = noise_of((1, 16, 6, 8, 12))

latent_preview.get_previewer = lambda *arguments: ForeignPreviewer()
live = live_view.LiveView(model, noise.shape, decoder=SimpleNamespace())
ours = []
add = live_view.Sheet.add
live_view.Sheet.add = lambda self, stretch: ours.append(stretch)
sample(model, chunk_sampler.ChunkSampler(chunk_sampler.Request(), [live]), noise, callback=live.callback)
assert shapes == [[1, 16, 6, 8, 12]] * 8  # it sees the whole video
assert filled == sorted(filled)
assert ours == []

# A run that was cut short within its second chunk, on a page that plays and on a sheet.
latent_preview.get_previewer = lambda *arguments: None
live_view.Sheet.add, sent = add, []
live_view.executing_node = lambda: ("5", "one")
server = SimpleNamespace(client_id="page", send_sync=lambda kind, message, client: sent.append(message))
draft = live_view.Stretch(9, 21, [9, 13, 17], np.full((3, 32, 48, 3), 200, np.uint8))
for pictures in (live_view.Strips(server, 21), live_view.Sheet(6, 1.5)):
    live = live_view.LiveView(model, (1, 16, 6, 4, 6), decoder=SimpleNamespace())
    live.__dict__["_pictures"] = pictures
    live.add_frames(torch.full((1, 9, 32, 48, 3), 0.9))
    pictures.add(draft)
    shown = pictures.send()
    live.end()
assert [[(strip["start"], strip["stop"]) for strip in message["strips"]] for message in sent] == [[(0, 9), (9, 21)], []]
assert [message["end"] for message in sent] == [None, 9]
before, after = (int((np.asarray(image).mean(-1) > 100).sum()) for image in (shown[1], pictures.send()[1]))
assert 0.4 * before < after < 0.6 * before

now = 100.0
time.perf_counter = lambda: now
budget = live_view.Budget()
assert budget.allows()
with budget.spending(shown=True):
    now += 0.1
now += 1.0
assert not budget.allows()
now += 0.1 / live_view.SHARE
assert budget.allows()
with budget.spending(shown=True):
    pass
assert not budget.allows()

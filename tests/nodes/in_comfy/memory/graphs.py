"""Recorded passes, and decode beside the sampling, under DynamicVRAM: on tapes, with the pages of weights pinned."""

from contextlib import suppress
from typing import ClassVar

import card_runs as runs
import torch
from card_runs import CARD, card, comfyui, management, new_vae, run, same
from pages import Pages, pages_of, switch

interrupted = comfyui.module("nodes.comfy").Interrupted
tape, late = comfyui.modules("tests.support", "tape", "late")
overlap = comfyui.module("lightforcing_core.vae.overlap")
runs.graphs.CudaRecorder, record, busy = tape.TapeRecorder, tape.TapeRecorder.record, []


class DecodeTape(tape.TapeRecorder):
    """Records the decode."""

    events: ClassVar = []


runs.decode.CudaRecorder = DecodeTape
switch(False)
vae = new_vae()
wanted, wanted_with_lora = (run(make(), vae=vae, steps=4) for make in (runs.file, lambda: runs.with_lora(runs.file())))
full = card.peak
management.unload_all_models()
switch(True)
model, with_lora, vae = runs.file(), runs.with_lora(runs.file()), new_vae()


def recorded(model, wanted, **how):
    """How often a run, right as it must be, recorded a pass, and what it says of graphs; nothing stays pinned."""
    tape.TapeRecorder.events.clear(), DecodeTape.events.clear()
    made = run(model, vae=vae, graph=True, steps=4, **how)
    assert same(wanted, made) == [True, True]
    assert not pinned()
    kinds = [kind for kind, _ in tape.TapeRecorder.events]
    assert kinds.count("record") == kinds.count("free")
    assert how or DecodeTape.events[0] == ("record", 1)
    return kinds.count("record"), made[2].facts["CUDA graphs"]


def pinned():
    """Pins of pages, and modules whose pages count as filled."""
    filled = sum("_prefetch" in vars(layer) for layer in runs.layers_of(model))
    return sum(sum(pages.used.values()) for pages in Pages.alive) + filled


def some_go():
    management.free_memory(management.get_free_memory(CARD) + model.model_size() // 2, CARD)


def all_stale():
    for layer in runs.layers_of(model):
        layer._v_signature = None  # as loading with other patches leaves it


def cancelled(self, work):
    assert pinned()
    raise interrupted


class Busy(late.LateStream):
    """Notes the pins of the VAE's pages."""

    def start(self, decode, latents):
        busy.append(sum(pages_of(vae.patcher).used.values()))
        return super().start(decode, latents)


assert recorded(with_lora, wanted_with_lora) == (2, "6 passes launched as graphs")
assert recorded(model, wanted, size=full - model.model_size() // 2)[1].startswith("not used: the GPU has no memory")
for happens in (some_go, management.unload_all_models):  # the small weights alone can still go
    count, said = recorded(runs.meanwhile(model, 3, happens), wanted)
    assert (count, said[:14]) == (1, "no longer used")
assert recorded(runs.meanwhile(model, 3, all_stale), wanted) == (2, "4 passes launched as graphs")
tape.TapeRecorder.record = cancelled
with suppress(interrupted):
    run(model, steps=4, graph=True)
assert not pinned()
tape.TapeRecorder.record = record
overlap.side_stream = Busy
for happens in (lambda: None, management.unload_all_models):  # in the second chunk, beside the decode of the first
    assert recorded(runs.meanwhile(model, 7, happens), wanted)[0]
assert all(busy)


# The decode by itself, of single frames: the second fills the last pages, and the fourth is recorded.
latents = comfyui.noise_of((1, 16, 12, 4, 6), 3)


def decoded(happens=lambda: None, **how):
    """Frames of four chunks, `happens` before the third, and what became of recordings; nothing stays pinned."""
    DecodeTape.events.clear()
    management.unload_all_models()
    decoder, frames = runs.decode.FrameDecoder(vae, latents.shape), []
    decoder.cut(0, **how)
    for number, piece in enumerate(latents.split(3, dim=2)):
        if number == 2:
            happens()
        frames += decoder.put(piece, normalised=False)
    frames += decoder.rest()
    assert not pinned()
    return torch.cat([part.cpu() for part in frames], dim=1), [kind for kind, _ in DecodeTape.events]


def pages_go():
    pages_of(vae.patcher).free_memory(1 << 40)


usual, launches = decoded()[0], lambda count: ["record", *count * ["launch"]]
twice, all_go = [*launches(3), "free", *launches(4)], management.unload_all_models
for overlaps, happens, events in (
    (False, lambda: None, launches(9)),
    (False, pages_go, twice),
    (False, all_go, twice),
    (True, lambda: None, launches(9)),
    (True, pages_go, launches(9)),  # an unfinished decode reads them, so they stay
    (True, all_go, launches(8)),  # small weights come back elsewhere before the first recording
):
    frames, kinds = decoded(happens, cuda_graph=True, overlap=overlaps)
    assert torch.equal(frames, usual)
    assert kinds == events

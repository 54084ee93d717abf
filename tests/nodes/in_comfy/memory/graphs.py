"""Recorded passes, and decode beside the sampling, under DynamicVRAM: on tapes, with the pages of weights pinned."""

from contextlib import suppress
from types import SimpleNamespace

import card_runs as runs
from card_runs import CARD, card, comfyui, management, new_vae, run, same
from pages import Pages, pages_of, switch

interrupted = comfyui.module("nodes.comfy").Interrupted
tape, overlap = comfyui.module("tests.support.tape"), comfyui.module("lightforcing_core.vae.overlap")
runs.graphs.CudaRecorder, record, busy = tape.TapeRecorder, tape.TapeRecorder.record, []
switch(False)
vae = new_vae()
wanted, wanted_with_lora = (run(make(), vae=vae, steps=4) for make in (runs.file, lambda: runs.with_lora(runs.file())))
full = card.peak
management.unload_all_models()
switch(True)
model, with_lora, vae = runs.file(), runs.with_lora(runs.file()), new_vae()


def recorded(model, wanted, **how):
    """How often a run, right as it must be, recorded a pass, and what it says of graphs; nothing stays pinned."""
    tape.TapeRecorder.events.clear()
    made = run(model, vae=vae, graph=True, steps=4, **how)
    assert same(wanted, made) == [True, True]
    assert not pinned()
    kinds = [kind for kind, _ in tape.TapeRecorder.events]
    assert kinds.count("record") == kinds.count("free")
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


class Late:
    """A second stream whose work is done when its frames are waited for."""

    def __init__(self, device):
        pass

    def start(self, decode, latents):
        busy.append(sum(pages_of(vae.patcher).used.values()))
        return SimpleNamespace(is_there=lambda: False, wait=decode)


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
overlap.SideStream, one_stream = Late, overlap.OverlappedDecoder.__init__
overlap.OverlappedDecoder.__init__ = lambda self, decoder, device, *, concurrent: one_stream(self, decoder, "cuda")
for happens in (lambda: None, management.unload_all_models):  # in the second chunk, beside the decode of the first
    assert recorded(runs.meanwhile(model, 7, happens), wanted)[0]
assert all(busy)

"""Runs under ComfyUI's DynamicVRAM, where each weight comes to the card when it is used.

ComfyUI's own Python decides everything. A stand-in does what its C library does with a GPU's page tables: which
weights have pages there, and what lies in them.
"""

import re
import weakref
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import card_runs as runs
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import torch
from card import OnCard
from card_runs import CARD, card, comfyui, decode, management, new_vae, run, same
from comfyui import comfy

node_comfy = comfyui.module("nodes.comfy")
tape, overlap = comfyui.module("tests.support.tape"), comfyui.module("lightforcing_core.vae.overlap")


class Pages:
    """A stand-in for ModelVBAR: a weight gets pages when it is used, while the card has memory.

    Unused pages are freed for other needs, and their content is overwritten.
    """

    most = 1 << 40  # bytes of weights that may stay
    alive: ClassVar = weakref.WeakSet()

    def __init__(self, size, device):
        self.end, self.pages, self.used, self.faults, self.misses = 0, {}, {}, 0, 0
        Pages.alive.add(self)

    def alloc(self, size):
        self.end += size
        return self, self.end - size, size

    def fault(self, offset, size):
        """A signature of the content of a weight's pages, or None if the card has no memory for them."""
        self.faults += 1
        if offset not in self.pages:
            if self.loaded_size() + size > min(Pages.most, card.size - card.used):
                self.misses += 1
                return None
            card.take(size)
            held = torch.empty(size, dtype=torch.uint8)
            card.hold_for_free(held)
            self.pages[offset] = OnCard(held), f"{self.faults:8}".encode()
        self.used[offset] = self.used.get(offset, 0) + 1
        return self.pages[offset][1]

    def unpin(self, offset, size):
        self.used[offset] -= 1

    def prioritize(self):
        pass

    def loaded_size(self):
        return sum(memory.nbytes for memory, _ in self.pages.values())

    def free_memory(self, size):
        freed = 0
        for offset in [offset for offset in reversed(self.pages) if not self.used.get(offset)]:
            if freed >= size:
                break
            memory, _ = self.pages.pop(offset)
            memory.held.fill_(0xFF)
            card.drop(memory.nbytes)
            freed += memory.nbytes
        return freed

    def __del__(self):
        self.used.clear()
        self.free_memory(self.end)


class NoBuffer:
    """A stand-in for HostBuffer: nothing is pinned here."""

    size = 0

    def __init__(self, *_):
        pass

    def truncate(self, *_, **__):
        pass


comfy_aimdo.model_vbar.ModelVBAR = Pages
comfy_aimdo.host_buffer.HostBuffer = NoBuffer
comfy_aimdo.torch.aimdo_to_tensor = lambda place, device: place[0].pages[place[1]][0]
comfy.cli_args.args.disable_pinned_memory = True


def switch(on):
    """What main.py does where DynamicVRAM works, or undo it."""
    patcher = comfy.model_patcher
    patcher.CoreModelPatcher = patcher.ModelPatcherDynamic if on else patcher.ModelPatcher
    comfy.memory_management.aimdo_enabled = on
    card.give_up = (lambda size: [pages.free_memory(size) for pages in list(Pages.alive)]) if on else lambda size: None


def after_a_node():
    """What ComfyUI does after every node."""
    management.reset_cast_buffers()
    comfy.model_prefetch.cleanup_prefetch_queues()


def pages_of(model):
    return model.model.dynamic_vbars[CARD]


def contents(model):
    """But for the modulations, which ComfyUI casts where they are and leaves on the card."""
    return {name: content for name, content in runs.contents(model).items() if not name.endswith(".modulation")}


# Every kind of weight, on a card with memory for all of them, for half, and for none.
for name, make in runs.KINDS.items():
    switch(False)
    model = make()
    usual = run(model, steps=1)
    management.vram_state = management.VRAMState.NO_VRAM
    exact = run(model, steps=1)  # every LoRA is added at every use, and no sum is rounded
    management.vram_state = management.VRAMState.NORMAL_VRAM
    management.unload_all_models()
    switch(True)
    model = make()
    before, roundings = contents(model), [runs.distance(usual, exact)]
    assert model.is_dynamic()
    if name == "float32":
        plain = usual
    for room, most in (("all", 1 << 40), ("half", model.model_size() // 2), ("none", 0)):
        Pages.most = most
        made, pages = run(model, steps=1), pages_of(model)
        found = len(pages.pages) > 0, pages.misses > 0
        assert room == "half" or found == (room == "all", room == "none"), (name, room, found)
        assert "LoRA" in name or name == "fp8_e4m3fn" or torch.equal(made[0], usual[0]), (name, room)
        assert name != "float32, LoRA" or torch.equal(made[0], usual[0]), room
        roundings.append(runs.distance(made, exact))
        after_a_node()
    if name == "fp8_e4m3fn":
        # ComfyUI leaves small weights as the file has them; FP8 holds only for the large ones.
        assert 0.0 < runs.distance(made, plain) < runs.distance(usual, plain)
    if name.endswith("LoRA"):  # the rounding of weights that a LoRA was added to
        assert max(roundings) < (0.002 if "bfloat16" in name else 0.1), (name, roundings)
    management.unload_all_models()
    assert contents(model) == before, name
Pages.most = 1 << 40

# A LoRA on float32 weights, with a VAE: the same bits in every case.
switch(False)
ordinary, vae = runs.with_lora(runs.file()), new_vae()
whole = run(ordinary, vae=vae)
full = card.peak
management.unload_all_models()
switch(True)
model, vae, seen = runs.with_lora(runs.file()), new_vae(), []
runs.watched_norms(seen)
assert (model.is_dynamic(), vae.patcher.is_dynamic()) == (True, True)
assert same(whole, run(model, vae=vae)) == [True, True]
assert all(right for _, right in seen)
size = full - model.model_size() // 2
assert same(whole, run(model, vae=vae, size=size)) == [True, True]
assert (card.peak <= size, pages_of(model).misses > 0) == (True, True)
assert "so ComfyUI will offload weights" in str(runs.plans[-1])

# What a run may take does not depend on what an earlier one left loaded.
with runs.sized(2 * full):
    management.unload_all_models()
    free = [node_comfy.memory_for_a_run(CARD), management.get_free_memory(CARD)]
    runs.node.execute(**runs.arguments(model), vae=vae)
    after = node_comfy.memory_for_a_run(CARD), management.get_free_memory(CARD)
    assert abs(after[0] - free[0]) < model.model_size() // 1000
    assert after[1] - free[1] < -model.model_size()

# Pages are taken away during the run: some, by a model of the older kind; then everything, twice.
taken = []


def some_go():
    before = pages_of(model).loaded_size()
    management.free_memory(management.get_free_memory(CARD) + model.model_size() // 2, CARD)
    taken.append(before - pages_of(model).loaded_size())


def all_go():
    management.unload_all_models()
    taken.append(pages_of(model).loaded_size() + vae.patcher.model.dynamic_vbars[CARD].loaded_size())


assert same(whole, run(runs.meanwhile(model, 4, some_go), vae=vae)) == [True, True]
assert taken.pop() > 0

# Without small weights that a LoRA changed in place, even a whole unload in the middle does no harm.
plain = runs.file()
expected = run(plain, vae=vae)
model_of_pages, model = model, plain
assert same(expected, run(runs.meanwhile(plain, 4, all_go), vae=vae)) == [True, True]
assert taken.pop() == 0
model = model_of_pages

# Graphs hold the pages of a chunk, and the decode beside the sampling holds the VAE's; whatever else moves drops them.
runs.graphs.CudaRecorder, record, busy = tape.TapeRecorder, tape.TapeRecorder.record, []
whole, wanted = run(ordinary, vae=vae, steps=4), run(plain, vae=vae, steps=4)


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
    filled = sum("_prefetch" in vars(layer) for one in (model, plain) for layer in runs.layers_of(one))
    return sum(sum(pages.used.values()) for pages in Pages.alive) + filled


def all_stale():
    for layer in runs.layers_of(plain):
        layer._v_signature = None  # as loading with other patches leaves it


def cancelled(self, work):
    assert pinned()
    raise node_comfy.Interrupted


class Late:
    """A second stream whose work is done when its frames are waited for."""

    def __init__(self, device):
        pass

    def start(self, decode, latents):
        busy.append(sum(vae.patcher.model.dynamic_vbars[CARD].used.values()))
        return SimpleNamespace(is_there=lambda: False, wait=decode)


assert recorded(model, whole) == (2, "6 passes launched as graphs")
assert recorded(model, whole, size=size) == (0, "not used: the GPU has no memory for all weights at once")
for happens in (some_go, all_go):  # the small weights alone can still go
    count, said = recorded(runs.meanwhile(plain, 3, happens), wanted)
    assert (count, said[:14]) == (1, "no longer used")
assert recorded(runs.meanwhile(plain, 3, all_stale), wanted) == (2, "4 passes launched as graphs")
tape.TapeRecorder.record = cancelled
with suppress(node_comfy.Interrupted):
    run(plain, steps=4, graph=True)
assert not pinned()
tape.TapeRecorder.record = record
overlap.SideStream, one_stream = Late, overlap.OverlappedDecoder.__init__
overlap.OverlappedDecoder.__init__ = lambda self, decoder, device, *, concurrent: one_stream(self, decoder, "cuda")
for happens in (lambda: None, all_go):
    assert recorded(runs.meanwhile(plain, 7, happens), wanted)[0]
assert all(busy)


# Bypassing the node gives the stock model back; where hooks need it, ComfyUI makes an ordinary MODEL of ours.
other = model.get_non_dynamic_delegate()
assert (other.is_dynamic(), same(whole, run(other, vae=vae))) == (False, [True, True])

# The nodes that decode and encode by themselves.
# On a GPU one could decode beside the sampling, but not with weights that may go: it is not even planned.
made, beside = [], []
for on in (False, True):
    switch(on)
    vae = new_vae()
    on_gpu = SimpleNamespace(_vae=SimpleNamespace(device=torch.device("cuda"), patcher=vae.patcher))
    beside.append(decode.FrameDecoder.can_overlap.fget(on_gpu))
    made += [runs.decoded(vae), runs.encoded(vae)]
    management.unload_all_models()
assert beside == [True, False]
assert [torch.equal(made[0], made[2]), torch.equal(made[1], made[3])] == [True, True]

# The start options that the help page names are ComfyUI's, and one of them turns DynamicVRAM off.
page = Path(comfyui.PACK, "nodes", "web", "docs", "LightForcingSampler.md").read_text(encoding="utf-8")
arguments, parser = comfy.cli_args.args, comfy.cli_args.parser
known = {text for action in parser._actions for text in action.option_strings}
named = set(re.findall(r"--[a-z][a-z-]+", page))
assert {"--disable-dynamic-vram", "--fast", "--disable-cuda-malloc"} <= named <= known, named - known
arguments.cpu = False
assert comfy.cli_args.enables_dynamic_vram()
arguments.disable_dynamic_vram = True
assert not comfy.cli_args.enables_dynamic_vram()

"""A stand-in for what ComfyUI's C library does under DynamicVRAM with a GPU's page tables.

It decides which weights have pages on the card, and what lies in them; everything else is ComfyUI's own Python.
"""

import weakref
from typing import ClassVar

import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import torch
from card import OnCard
from card_runs import CARD, card
from comfyui import comfy


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


def pages_of(model):
    return model.model.dynamic_vbars[CARD]

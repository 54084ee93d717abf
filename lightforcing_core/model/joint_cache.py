"""The memory of passes over several chunks at once, none of them finished."""

from dataclasses import replace

import torch

from ...kernels.layer_memory import LayerMemory
from ..attention.options import Pools
from .kv_cache import KVCache
from .kv_storage import KVOptions
from .rope import RopeTable


class JointCache(KVCache):
    """What chunks that are denoised together see: first and last frames of a history, and each other.

    Every pass stores their keys and values anew, and only its own layers read them, so all layers share the memory of
    one. The history's open chunk is the first of these chunks, and not read. Once the window of `slots` latent frames
    is full, the history's first frames come first, directly before its last ones if `sink_rope` is "follow". The model
    computes with both in its own dtype, also if the history keeps 8 bits.
    """

    def __init__(self, history: KVCache, device: torch.device | str | None = None) -> None:
        shape = replace(history.shape, layers=1, anchors=0, pools=Pools())
        super().__init__(shape, KVOptions(), device)
        self._history, self._anchors = history, history.shape.anchors
        self._read: list[int] = []  # slots of the history, in time order
        self._turned: RopeTable | None = None  # the rotation of first frames, if they are read as first stored

    def open(self, frames: int) -> None:
        """Prepare slots for the history's open chunk and what follows it, `frames` latent frames in all."""
        start, past = self._history.current_frames[0], self.shape.slots - frames
        anchors = self._anchors if start > past else 0
        held = self._history.slot_frames
        self._read = [held.index(frame) for frame in range(start - min(start, past - anchors), start)]
        self._turned = None
        if anchors:
            far = start - past if self.shape.sink_rope == "follow" else 0
            wide = torch.promote_types(self.shape.dtype, torch.float32)
            self._turned = RopeTable([far], 1, 1, self.shape.head_dim, dtype=wide, device=self._slot_index.device)
        before = [*range(anchors), *map(held.__getitem__, self._read)]
        self.slot_frames = [*before, *range(start, start + frames)]
        self._current = list(range(len(before), len(self.slot_frames)))
        self._committed = False
        self._show_slots()
        self._send_slots()

    def visible(self, layer: int) -> LayerMemory:
        """The visible part of one layer's memory, with what the history has of that layer."""
        memory, history, device = self.storage.at(layer), self._history, self._slot_index.device
        held = history.storage.at(layer)
        anchors = len(self.slot_frames) - len(self._current) - len(self._read)
        for slot in range(anchors):
            assert self._turned is not None
            k, v = (kept[slot].to(device, non_blocking=True) for kept in history.storage.originals[layer])
            self._write(memory, [(slot, 0, 1)], self._turned.rotate(k), v)
        for slot, source in enumerate(self._read, anchors):
            self._write(memory, [(slot, 0, 1)], *history._stored(held, source))
        return super().visible(layer)

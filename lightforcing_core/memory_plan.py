"""What to give up when a run does not fit: decode tiles, an 8-bit KV cache, a KV cache in host memory, and no more.

The choices are taken in the order of what they cost: tiles cost a little time, eight bits a little precision, host
memory a copy of the cache per forward. One that does not help is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .kv_storage import KVOptions
from .memory import MemoryEstimate, gib

# What an allocator loses between tensors, and what a card needs for itself.
HEADROOM = 0.08

Reckon = Callable[[KVOptions, int], MemoryEstimate]


@dataclass(frozen=True)
class MemoryPlan:
    """How a run is kept in memory, what it then needs, and what there is.

    estimate: with these choices; before: without them. free: bytes that the run may take. latents: bytes of the
    video's latents beside the chunk's own, and whether they are kept on the device.
    """

    estimate: MemoryEstimate
    before: MemoryEstimate
    free: int
    kv: KVOptions
    decode_tiles: int = 1
    latents: int = 0
    latents_on_device: bool = True

    @property
    def needed(self) -> int:
        """The peak in bytes, latents included."""
        return self.estimate.total + (self.latents if self.latents_on_device else 0)

    @property
    def fits(self) -> bool:
        """Whether the peak, with room for an allocator's waste, is no more than what is free."""
        return self.needed * (1 + HEADROOM) <= self.free

    @property
    def given_up(self) -> list[str]:
        """The choices that differ from the plain run, in words."""
        words = []
        if self.decode_tiles > 1:
            words.append(f"decode in {self.decode_tiles}×{self.decode_tiles} tiles")
        if self.kv != KVOptions():
            words.append(str(self.kv))
        if not self.latents_on_device:
            words.append("latents in host memory")
        return words

    def __str__(self) -> str:
        """One line: what is needed, what there is, and what is done about it."""
        line = f"{self.estimate}, {gib(self.free)} GiB free"
        if self.given_up:
            line += f": {', '.join(self.given_up)} (without: {gib(self.before.total + self.latents)} GiB)"
        if not self.fits:
            short = gib(int(self.needed * (1 + HEADROOM)) - self.free)
            line += f"; {short} GiB too little, so weights will be moved in and out: lower the size or the window"
        return line


def plan_memory(
    reckon: Reckon,
    free: int,
    *,
    kv: KVOptions | None = None,
    most_tiles: int = 1,
    latents: int = 0,
    host_helps: bool = True,
) -> MemoryPlan:
    """The cheapest way to make a run fit into `free` bytes, or all of them together when it cannot.

    reckon: the estimate for a KV cache and a number of decode tiles per side. kv: how the cache shall be kept,
    whatever there is; None chooses. most_tiles: how far decode may be cut, 1 for a decoder that cannot. latents:
    bytes that the video's latents take on the device. host_helps: False where the device is the host.
    """
    wanted = kv or KVOptions()
    before = reckon(wanted, 1)
    best = MemoryPlan(before, before, free, wanted, latents=latents)

    def tried(kv: KVOptions, tiles: int, on_device: bool) -> MemoryPlan:
        return MemoryPlan(reckon(kv, tiles), before, free, kv, tiles, latents, on_device)

    candidates: list[Callable[[], MemoryPlan]] = [
        lambda tiles=tiles: tried(best.kv, tiles, True) for tiles in range(2, most_tiles + 1)
    ]
    if kv is None:
        candidates.append(lambda: tried(KVOptions("int8"), best.decode_tiles, True))
        if host_helps:
            candidates.append(lambda: tried(KVOptions("int8", host=True), best.decode_tiles, True))
    if host_helps and latents:
        candidates.append(lambda: tried(best.kv, best.decode_tiles, False))
    for candidate in candidates:
        if best.fits:
            break
        plan = candidate()
        if plan.needed < best.needed:
            best = plan
    return best

"""Streams, events and CUDA graphs of a card that is not there: they keep the order of what is asked, and do nothing."""

from typing import TYPE_CHECKING, Any

import torch
from stream_order import HOST, Impossible, Known

if TYPE_CHECKING:
    from fake_card import Card


class Stream:
    """A stream of the card, which is no more than a name in the order."""

    def __init__(self, card: "Card", device: torch.device, name: str) -> None:
        self.card, self.device, self.name = card, device, name

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: "Event") -> None:
        if self.card.recording is not None:
            raise Impossible("cannot be recorded: a stream waits for what is not recorded")
        self.card.order.wait(self.name, event.mark)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or torch.cuda.Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """A moment in a stream."""

    card: "Card"

    def __init__(self, enable_timing: bool = False) -> None:
        self.mark: Known = {}

    def record(self, stream: Stream | None = None) -> None:
        self.mark = self.card.order.mark((stream or self.card.stream()).name)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        if self.mark:
            self.card.wait("an event is waited for")
            self.card.order.wait(HOST, self.mark)

    def elapsed_time(self, other: "Event") -> float:
        return 0.0


class Graph:
    """A CUDA graph: what it uses must be there whenever it is launched."""

    def __init__(self, card: "Card") -> None:
        self._card = card
        self._uses: dict[int, bool] = {}  # memory, and whether it is written
        self.own: set[int] = set()  # memory of its pool

    def use(self, memory: int, *, write: bool) -> None:
        self._uses[memory] = self._uses.get(memory, False) or write

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if self._card.recording is not None or "stream 0" in self._card.stream().name:
            raise Impossible("a capture needs a stream of its own")
        self._card.recording, self._device = self, self._card.stream().device

    def capture_end(self) -> None:
        self._card.recording = None

    def replay(self) -> None:
        card = self._card
        agent = card.stream(self._device).name
        card.order.ask(agent)
        for memory, write in self._uses.items():
            if memory in card.order:
                card.order.use(agent, memory, "a graph", write=write)
            elif memory not in self.own:
                raise Impossible("a graph uses memory that was given back since it was recorded")

    def reset(self) -> None:
        self._uses.clear()

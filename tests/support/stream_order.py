"""What happens before what on a device with several streams, and whether every use of memory is ordered.

The host and every stream count the work that they did, and know how far each other was when they last waited for it
(vector clocks). A piece of memory may be used where all earlier uses that conflict are known to be done.
"""

from collections import defaultdict
from dataclasses import dataclass, field

HOST = "host"

Known = dict[str, int]


class Impossible(BaseException):
    """What a card would refuse, or do wrong; no `except Exception` takes it for a kernel that fails."""


@dataclass
class _Memory:
    """One allocation: where it was made, and how far each agent was that used it last."""

    home: str
    written: tuple[str, int] | None = None
    read: dict[str, int] = field(default_factory=dict)
    lent: set[str] = field(default_factory=set)
    made_by_allocator: bool = True


class Order:
    """The order of all work; memory is named by any number that is its own while it lives."""

    def __init__(self) -> None:
        self._known: defaultdict[str, Known] = defaultdict(dict)
        self._memory: dict[int, _Memory] = {}
        self.problems: list[str] = []

    def __contains__(self, memory: int) -> bool:
        """Whether the memory has not been given back."""
        return memory in self._memory

    def ask(self, agent: str) -> None:
        """`agent` is given one more piece of work by the host, behind all that the host knows to be done."""
        self.wait(agent, self._known[HOST])
        self._known[agent][agent] = self._known[agent].get(agent, 0) + 1

    def mark(self, agent: str) -> Known:
        """How far `agent` is, for others to wait for."""
        return dict(self._known[agent])

    def wait(self, agent: str, mark: Known) -> None:
        """What `agent` does from now on comes behind `mark`."""
        known = self._known[agent]
        for other, done in mark.items():
            known[other] = max(known.get(other, 0), done)

    def made(self, memory: int, home: str, *, kept_by_allocator: bool) -> None:
        """An allocation that stands on `home`; kept_by_allocator: nobody has it before all copies of it are done."""
        self._memory[memory] = _Memory(home, made_by_allocator=not kept_by_allocator)

    def lend(self, memory: int, agent: str) -> None:
        """The allocator waits for what `agent` is doing now before it gives the memory away."""
        self._memory[memory].lent.add(agent)

    def use(self, agent: str, memory: int, what: str, *, write: bool) -> None:
        """The piece of work that `agent` was asked for last reads or writes this memory."""
        one = self._memory[memory]
        earlier = [one.written] if one.written else []
        earlier += one.read.items() if write else []
        for other, done in earlier:
            if other != agent and self._known[agent].get(other, 0) < done:
                kind = "writes" if write else "reads"
                raise Impossible(f"{what} {kind} on {agent} what {other} may still be using")
        now = self._known[agent].get(agent, 0)
        if write:
            one.written, one.read = (agent, now), {}
        else:
            one.read[agent] = now

    def gone(self, memory: int, *, whatever_uses_it: bool = False) -> None:
        """The memory is given back, and may be given away at once to whoever asks on its home."""
        one = self._memory.pop(memory, None)
        if one is None or whatever_uses_it or not one.made_by_allocator:
            return
        known = {**self._known[one.home]}
        for agent, done in self._known[HOST].items():
            known[agent] = max(known.get(agent, 0), done)
        for agent, done in [*([one.written] if one.written else []), *one.read.items()]:
            if agent != one.home and agent not in one.lent and known.get(agent, 0) < done:
                self.problems.append(f"memory of {one.home} is given back while {agent} may still be using it")

"""What must not happen on a card, done on purpose: each of these a card that is not there must notice."""

import functools
import warnings
from collections.abc import Callable

import torch
from fake_card import Card
from stream_order import Impossible
from torch import Tensor

from lightforcing.kernels import modulation

CARDS = torch.device("cuda", 0), torch.device("cuda", 1)


def there(*shape: int, card: int = 0) -> Tensor:
    return torch.empty(*shape, device=CARDS[card], dtype=torch.bfloat16)


def reads_a_number_in_a_pass(card: Card) -> None:
    with card.busy():
        float(there(4).sum())


def branches_on_a_tensor_in_a_pass(card: Card) -> None:
    with card.busy():
        assert there(4).isfinite().all()


def finds_shapes_in_values(card: Card) -> None:
    x = there(4)
    x[x > 0]


def makes_a_tensor_of_a_list_in_a_pass(card: Card) -> None:
    with card.busy():
        torch.tensor([1, 2], device=CARDS[0])


def picks_by_a_list_in_a_pass(card: Card) -> None:
    x = there(4)
    with card.busy():
        x[[0, 1]]


def copies_from_memory_that_is_not_pinned(card: Card) -> None:
    with card.busy():
        there(4).copy_(torch.zeros(4, dtype=torch.bfloat16), non_blocking=True)


def copies_and_converts_at_once(card: Card) -> None:
    with card.busy():
        there(4).copy_(torch.zeros(4).pin_memory(), non_blocking=True)


def mixes_devices(card: Card) -> None:
    there(4) + torch.zeros(4)


def gives_a_kernel_memory_of_the_host(card: Card) -> None:
    modulation.gated_add(there(1, 8, 128), there(1, 8, 128).cpu(), there(1, 1, 128))


def launches_on_another_device(card: Card) -> None:
    _launch(there(8, 128, card=1), there(1, 128, card=1))


def forgets_an_argument(card: Card) -> None:
    x = there(8, 128)
    modulation._gated_add[(1,)](x, x, x)


def launches_nothing(card: Card) -> None:
    _launch(there(8, 128), there(1, 128), grid=0)


def compiles_while_it_records(card: Card) -> None:
    modulation._gated_add.device_caches.clear()
    _recorded(lambda: _launch(there(8, 128), there(1, 128)))


def waits_while_it_records(card: Card) -> None:
    x = there(4)
    _recorded(lambda: x.cpu())


def sends_while_it_records(card: Card) -> None:
    _recorded(lambda: torch.zeros(4).pin_memory())


def launches_a_graph_whose_memory_is_gone(card: Card) -> None:
    x = there(4)
    graph = _recorded(functools.partial(torch.add, x, 1))
    del x
    graph.replay()


def reads_what_another_stream_writes(card: Card) -> None:
    x = there(4)
    with torch.cuda.stream(torch.cuda.Stream(CARDS[0])):
        x + 1


def writes_what_another_stream_reads(card: Card) -> None:
    x, side = there(4).zero_(), torch.cuda.Stream(CARDS[0])
    side.wait_stream(torch.cuda.current_stream(CARDS[0]))
    with torch.cuda.stream(side):
        x + 1
    x.zero_()


def gives_back_what_another_stream_reads(card: Card) -> None:
    x, side = there(4).zero_(), torch.cuda.Stream(CARDS[0])
    side.wait_stream(torch.cuda.current_stream(CARDS[0]))
    with torch.cuda.stream(side):
        x + 1
    del x
    _raise_problems(card)


def reads_before_it_has_arrived(card: Card) -> None:
    here = torch.empty(1, dtype=torch.bfloat16, pin_memory=True)
    here.copy_(there(1), non_blocking=True)
    float(here)


def overwrites_what_is_on_its_way(card: Card) -> None:
    here, x = torch.zeros(4, dtype=torch.bfloat16).pin_memory(), there(4)
    x.copy_(here, non_blocking=True)
    here.zero_()


def _launch(x: Tensor, gate: Tensor, grid: int = 1) -> None:
    sizes = {"WIDTH": 128, "PADDED": 128, "ROWS": 8, "INTERPRETED": False}
    modulation._gated_add[(grid,)](x, x, gate, x, 128, 128, 8, 1, **sizes, num_warps=4)


def _recorded(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(CARDS[0])
    stream.wait_stream(torch.cuda.current_stream(CARDS[0]))
    with torch.cuda.stream(stream):
        graph.capture_begin()
        work()
        graph.capture_end()
    return graph


def _raise_problems(card: Card) -> None:
    if card.order.problems:
        raise Impossible(card.order.problems[0])


FAULTS: dict[str, Callable[[Card], None]] = {
    name: fault
    for name, fault in vars().items()
    if callable(fault) and getattr(fault, "__module__", "") == __name__ and name != "there" and name[0] != "_"
}


def found(fault: Callable[[Card], None], card: Card) -> str | None:
    """What is said of a fault; None where nobody noticed."""
    card.recording = None
    card.order.problems.clear()
    try:
        with warnings.catch_warnings(action="ignore"):
            fault(card)
    except (Exception, Impossible) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        card.recording = None
    return None

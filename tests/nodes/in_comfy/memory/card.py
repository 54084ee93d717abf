"""A graphics card made of main memory: a device of its own, with a size, on which PyTorch runs real operations.

Tensors on `CARD` are apart from those of the CPU as on a GPU: an operation that mixes the two raises, what does not
fit raises `torch.OutOfMemoryError`, and results equal the CPU's bit for bit. `plug_in` gives it to ComfyUI, which then
loads, moves and evicts weights by its own rules.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management as management
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("card")
CARD, HOST = torch.device("card:0"), torch.device("cpu")
aten = torch.ops.aten
# Operations that may see both sides: they copy, or only ask.
COPIES = (aten.copy_.default,)
QUESTIONS = ("_has_compatible_shallow_copy_type",)


class Card:
    """What lies on the card: bytes `used` now, and the most so far; `size` is what there is.

    give_up: asked for so many bytes before memory runs out.
    """

    def __init__(self) -> None:
        self.size, self.used, self.peak = 1 << 62, 0, 0
        self.give_up: Callable[[int], object] = lambda size: None
        self._seen: dict[int, int] = {}

    def take(self, size: int) -> None:
        """Count `size` bytes more; `drop` them later."""
        if self.used + size > self.size:
            self.give_up(self.used + size - self.size)
        if self.used + size > self.size:
            raise torch.OutOfMemoryError(f"the card is full: {self.used} of {self.size} bytes, {size} more wanted")
        self.used += size
        self.peak = max(self.peak, self.used)

    def drop(self, size: int) -> None:
        self.used -= size

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now until it is gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.take(size)
        self._seen[key] = size
        weakref.finalize(storage, self._gone, key)

    def hold_for_free(self, tensor: torch.Tensor) -> None:
        """Memory that somebody else counts."""
        self._seen[tensor.untyped_storage()._cdata] = 0
        weakref.finalize(tensor.untyped_storage(), self._gone, tensor.untyped_storage()._cdata)

    def _gone(self, key: int) -> None:
        self.used -= self._seen.pop(key)


card = Card()


class OnCard(torch.Tensor):
    """A tensor on the card; `held` is the tensor of main memory that does its work."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnCard":
        card.hold(held)
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=CARD, **layout)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"OnCard({self.held!r})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> list:
        return self.held.tolist()

    def new_tensor(self, data: list) -> "OnCard":
        return torch.tensor(data, dtype=self.dtype).to(CARD)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented if _holds_others(types) else _run(function, args, kwargs or {})


class _Cards(TorchDispatchMode):
    """Also the operations that meet no tensor of the card yet: they may make one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return NotImplemented if _holds_others(types) else _run(function, args, kwargs or {})


def _holds_others(types) -> bool:
    """Whether there are tensors that take themselves apart first, as quantised ones do."""
    plain = torch.Tensor.__torch_dispatch__
    return any(kind is not OnCard and kind.__torch_dispatch__ is not plain for kind in types)


class _Others(TorchFunctionMode):
    """What PyTorch does without an operation: make tensors of Python numbers, put a parameter elsewhere."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None:
            return function(*args, **{**kwargs, "device": None}).to(device)
        if function == torch.Tensor.data.__set__ and any(isinstance(tensor, OnCard) for tensor in args):
            return torch.utils.swap_tensors(args[0], torch.nn.Parameter(args[1], args[0].requires_grad))
        return function(*args, **kwargs)


def _run(function, args, kwargs):
    """`function` on the main memory behind its tensors; what it makes lies where PyTorch would put it."""
    tensors = [item for item in tree_iter((args, kwargs)) if isinstance(item, torch.Tensor)]
    on_card = any(isinstance(tensor, OnCard) for tensor in tensors)
    asked = [item for item in tree_iter((args, kwargs)) if isinstance(item, torch.device | str) and _is_device(item)]
    to_card = on_card if not asked else torch.device(asked[0]).type == CARD.type
    if function in COPIES or function is aten.to.other:
        to_card = isinstance(args[0 if function in COPIES else 1], OnCard)
    elif function._schema.name.split("::")[-1] in QUESTIONS:
        return False
    elif on_card and any(tensor.ndim and not isinstance(tensor, OnCard) for tensor in tensors):
        raise RuntimeError(f"{function} got tensors on two devices: {[(t.device, tuple(t.shape)) for t in tensors]}")
    given: dict[int, torch.Tensor] = {}
    across = {_storage(tensor) for tensor in tensors if isinstance(tensor, OnCard) != to_card}

    def taken(item):
        if isinstance(item, OnCard):
            given[id(item.held)] = item
            return item.held
        return HOST if asked and isinstance(item, torch.device | str) and _is_device(item) else item

    def put(item):
        if not isinstance(item, torch.Tensor) or isinstance(item, OnCard):
            return item
        if to_card and id(item) in given:
            return given[id(item)]
        if _storage(item) in across:  # PyTorch thinks that it need not copy
            item = item.clone()
        return OnCard(item) if to_card else item

    return tree_map(put, function(*tree_map(taken, args), **tree_map(taken, kwargs)))


def _storage(tensor: torch.Tensor) -> int:
    return (tensor.held if isinstance(tensor, OnCard) else tensor).untyped_storage()._cdata


def _is_device(item: torch.device | str) -> bool:
    kind = item.type if isinstance(item, torch.device) else item.split(":")[0]
    return kind in (CARD.type, HOST.type)


def plug_in() -> None:
    """Make the card ComfyUI's device, as a GPU of `card.size` bytes with nothing but ComfyUI on it."""
    free_memory = management.get_free_memory

    def free(device=None, torch_free_too=False):
        if device is not None and device.type != CARD.type:
            return free_memory(device, torch_free_too)
        left = card.size - card.used
        return (left, 0) if torch_free_too else left

    generator = torch.Generator
    torch.Generator = lambda device=HOST: generator()  # the card's random numbers are the CPU's
    management.get_torch_device = lambda: CARD
    management.get_free_memory = free
    management.get_total_memory = lambda device=None, torch_total_too=False: card.size
    management.vram_state = management.VRAMState.NORMAL_VRAM
    # What it keeps free in any case is meant for models a thousand times larger than the ones here.
    management.EXTRA_RESERVED_VRAM = 1 << 20
    management.minimum_inference_memory = lambda: management.EXTRA_RESERVED_VRAM
    management.MIN_WEIGHT_MEMORY_RATIO = 0.0  # as on NVIDIA
    _Cards().__enter__()
    _Others().__enter__()


@contextmanager
def sized(size: int) -> Iterator[Card]:
    """A card of `size` bytes for a while; its peak counts from here."""
    before, card.size, card.peak = card.size, size, card.used
    try:
        yield card
    finally:
        card.size = before

"""Bound launches: a kernel is specialised anew exactly when something that Triton looks at has changed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from lightforcing.kernels import bound


class Kernel:
    """Triton's side of a launch: how often it specialises, and what the compiled kernel gets."""

    arg_names = ("x", "y", "number", "WIDTH", "OWN")

    def __init__(self):
        self.specialised, self.ran = 0, []

    def __getitem__(self, grid):
        def first(*arguments, **constants):
            self.specialised += 1
            rest = [constants[name] for name in ("WIDTH", "OWN")]
            self.ran.append(((*grid, 1, 1)[:3], (*arguments, *rest)))
            return Compiled(self)

        return first


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel):
        self.kernel = kernel

    def run(self, x, y, z, stream, function, metadata, about, enter, leave, *arguments):
        assert (stream, function, metadata, about, enter, leave) == (7, "function", "metadata", None, None, None)
        self.kernel.ran.append(((x, y, z), arguments))


@pytest.fixture
def kernel(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    monkeypatch.setattr(bound, "driver", driver)
    monkeypatch.setattr(bound, "JITFunction", Kernel)
    monkeypatch.setattr(bound, "_bound", {})
    return Kernel()


def test_equal_arguments_are_specialised_once_and_arrive_in_order(kernel):
    for grid, x in (((3,), torch.zeros(4)), ((5,), torch.ones(8)), ((5, 2), torch.zeros(16)[4:])):
        bound.launch(kernel, grid, x, None, 7, OWN=True, WIDTH=64, num_warps=4)
        assert kernel.ran[-1][0] == (*grid, 1, 1)[:3]
        got_x, *others = kernel.ran[-1][1]
        assert got_x is x
        assert others == [None, 7, 64, True]
    assert kernel.specialised == 1


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(5)[1:]},
        {"x": torch.zeros(4, dtype=torch.float16)},
        {"x": torch.zeros(4, device="meta")},
        {"y": torch.zeros(4)},
        {"number": 1},
        {"number": 32},
        {"WIDTH": 128},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_triton_specialises_for_is_specialised_anew(kernel, change):
    for changed in ({}, change, {}, change):
        options = {"x": torch.zeros(4), "y": None, "number": 7, "WIDTH": 64, "OWN": True, "num_warps": 4} | changed
        bound.launch(kernel, (1,), *(options.pop(name) for name in ("x", "y", "number")), **options)
    assert kernel.specialised == 2


def test_tensor_descriptors_are_left_to_triton_and_old_kernels_are_forgotten(kernel, monkeypatch):
    for _ in range(2):
        bound.launch(kernel, (1,), torch.zeros(4), set(), 7, WIDTH=64, OWN=True)
    assert kernel.specialised == 2
    monkeypatch.setattr(bound, "LIMIT", 8)
    for number in range(20):
        bound.launch(kernel, (1,), torch.zeros(4), None, number, WIDTH=64, OWN=True)
    assert len(bound._bound) <= 8

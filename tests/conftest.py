"""What every test needs before it imports anything: the Triton interpreter where there is no GPU, few threads."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is first imported

from hypothesis import settings

# The tests run in several processes, and tensors this small gain nothing from threads.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

# Examples are the same in every run, so that a red suite is a change in the code and not in the dice.
settings.register_profile("lightforcing", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("lightforcing")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small lose more to waiting threads than they win, on a busy machine much more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

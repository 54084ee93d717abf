"""What every test needs before it imports anything: the Triton interpreter where there is no GPU, few threads."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is first imported

# A test that measured could choose otherwise than the next run of it.
os.environ.setdefault("LIGHTFORCING_PROFILE", "off")

from hypothesis import settings

# The tests run in several processes, and tensors this small gain nothing from threads.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

# Examples are the same in every run, so that a red suite is a change in the code and not in the dice.
settings.register_profile("lightforcing", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("lightforcing")

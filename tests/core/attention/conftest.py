"""A new run for every test of attention, and flex attention if it can run here."""

import pytest
import torch

from lightforcing.lightforcing_core import fast_path
from lightforcing.lightforcing_core.attention.dispatch import BackendUnavailable, choose_backend

from ...support.attention_problems import DEVICE


@pytest.fixture(autouse=True)
def new_run():
    """No backend has failed yet and nothing has been logged yet."""
    fast_path.begin_run()
    yield
    fast_path.begin_run()


@pytest.fixture(scope="session")
def flex_runs():
    q = torch.zeros(1, 64, 1, 64, device=DEVICE)
    try:
        choose_backend(q, q, tokens_per_frame=64, backend="flex")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))

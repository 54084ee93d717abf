"""Flex attention if it can run here."""

import pytest
import torch

from lightforcing.lightforcing_core.attention.dispatch import BackendUnavailable, choose_backend

from ...support.attention_problems import DEVICE


@pytest.fixture(scope="session")
def flex_runs():
    q = torch.zeros(1, 64, 1, 64, device=DEVICE)
    try:
        choose_backend(q, q, tokens_per_frame=64, backend="flex")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))

"""Servers for the queue's tests."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lightforcing.lightforcing_core import queue_batch, queue_client

from .fake_comfy import FakeComfy
from .queue_samples import render_text


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeComfy]]:
    """Two servers, and a client that looks up often."""
    monkeypatch.setattr(queue_client, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(queue_client, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(queue_batch, "RETRY_SECONDS", 0.1)
    with ExitStack() as stack:
        fakes = [FakeComfy(), FakeComfy()]
        for fake in fakes:
            render_text(fake)
            stack.enter_context(fake.running())
        yield fakes

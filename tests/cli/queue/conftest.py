"""A server for the queue's tests."""

import pytest

from lightforcing.cli.queue import run, server

from ...support.fake_comfy import FakeComfy
from ...support.queue_samples import render_text


@pytest.fixture
def comfy(monkeypatch):
    """A server that renders the sample graph, and a client that asks often."""
    monkeypatch.setattr(server, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(run, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(server, "RETRY_SECONDS", 0.1)
    fake = FakeComfy()
    render_text(fake)
    with fake.running():
        yield fake

"""The pages that watch with the pack's JavaScript, what they draw themselves, and how to reach them."""

from collections.abc import Container
from typing import Any

_PAGES: dict[str, bool] = {}  # client id → whether it plays the live view; every one of them draws schedules


def running_server() -> Any | None:
    """The host's server; None where scripts use the nodes without one."""
    from server import PromptServer  # imported here because without a server there may be no such module

    return getattr(PromptServer, "instance", None)


def note_page(client_id: str, plays: bool, connected: Container[str]) -> None:
    """Remember a page, and whether it plays the live view; pages that are not `connected` any more are forgotten."""
    for gone in [page for page in _PAGES if page not in connected]:
        del _PAGES[gone]
    _PAGES[client_id] = plays


def page_draws_schedules(server: Any | None) -> bool:
    """Whether the page that queued the running prompt draws the schedule on its node by itself."""
    return server is not None and server.client_id in _PAGES


def page_plays_live_view(server: Any | None) -> bool:
    """Whether the page that queued the running prompt plays the live view by itself."""
    return server is not None and _PAGES.get(server.client_id, False)

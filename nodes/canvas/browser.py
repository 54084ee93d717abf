"""The pages that watch with the pack's JavaScript, what they draw themselves, and how to reach them."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Page:
    """A page as it told of itself; one that is loaded again tells again. plays: the live view."""

    plays: bool


_PAGES: dict[str, Page] = {}  # by client id


def running_server() -> Any | None:
    """The host's server; None where scripts use the nodes without one."""
    from server import PromptServer  # imported here because without a server there may be no such module

    return getattr(PromptServer, "instance", None)


def note_page(client_id: str, plays: bool, connected: Container[str]) -> None:
    """Remember a page, and whether it plays the live view; pages that are not `connected` any more are forgotten."""
    for gone in [page for page in _PAGES if page not in connected]:
        del _PAGES[gone]
    _PAGES[client_id] = Page(plays)


def watching_page(server: Any | None) -> Page | None:
    """The page that queued the running prompt, where it has the pack's JavaScript, and so draws schedules itself."""
    return None if server is None else _PAGES.get(server.client_id)

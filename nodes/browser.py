"""Browser pages that run the pack's JavaScript, and the two routes that the JavaScript calls."""

import asyncio
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from .comfy import Server


@dataclass(frozen=True, eq=False)
class Page:
    """A registered page, a new object when reloaded; plays: plays the live view."""

    plays: bool


_PAGES: dict[str, Page] = {}  # by client id


def watching_page(server: Server | None) -> Page | None:
    """The page that queued the running prompt, None without our JavaScript."""
    return None if server is None else _PAGES.get(server.client_id or "")


def _register(client_id: str, plays: bool, connected: Container[str]) -> None:
    """Remember a page, and forget those that are no longer `connected`."""
    for gone in [page for page in _PAGES if page not in connected]:
        del _PAGES[gone]
    _PAGES[client_id] = Page(plays)


def add_routes(server: Server, schedule_numbers: Callable[[Any], dict[str, Any]]) -> None:
    """Add the pack's routes to ComfyUI's server.

    schedule_numbers: answers the schedule node's plot. Raises TypeError for a request that no node makes, and
    ValueError for a schedule that cannot be met.
    """

    @server.routes.post("/light_forcing/schedule")
    async def schedule(request: web.Request) -> web.Response:
        """Numbers of the schedule that a node's inputs describe, or `error` with the remedy."""
        try:
            # In a thread, because a very long video would block the event loop.
            return web.json_response(await asyncio.to_thread(schedule_numbers, await request.json()))
        except TypeError as error:
            return web.json_response({"error": str(error)}, status=400)
        except ValueError as error:
            return web.json_response({"error": str(error)})

    @server.routes.post("/light_forcing/page")
    async def page(request: web.Request) -> web.Response:
        """Register a page; `plays` says whether it plays the live view."""
        asked = await request.json()
        if not isinstance(asked, dict) or not isinstance(asked.get("client_id"), str):
            return web.json_response({"error": "client_id is missing or no text"}, status=400)
        _register(asked["client_id"], asked.get("plays") is True, server.sockets)
        return web.json_response({})

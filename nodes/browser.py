"""Browser pages that run the pack's JavaScript, and the two routes that the JavaScript calls."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Container
from dataclasses import dataclass
from typing import Any

from aiohttp import web


@dataclass(frozen=True, eq=False)
class Page:
    """A registered page, a new object when reloaded; plays: plays the live view."""

    plays: bool


MOST_BODY = 1 << 18  # bytes of a request
_PAGES: dict[str, Page] = {}  # by client id


def watching_page(server: Any) -> Page | None:
    """The page that queued the running prompt, None without our JavaScript."""
    return None if server is None else _PAGES.get(server.client_id or "")


def _register(client_id: str, plays: bool, connected: Container[str]) -> None:
    """Remember a page, and forget those that are no longer `connected`."""
    for gone in [page for page in _PAGES if page not in connected]:
        del _PAGES[gone]
    _PAGES[client_id] = Page(plays)


def add_routes(server: Any, schedule_numbers: Callable[[Any], dict[str, Any]]) -> None:
    """Add the pack's routes to ComfyUI's server.

    schedule_numbers: answers the schedule node's plot. Raises TypeError for a request that no node makes.
    """

    def post(path: str, answer: Callable[[Any], Awaitable[dict[str, Any]]]) -> None:
        """Add a route from JSON to JSON; a body that is none, or a TypeError, is HTTP 400 with the reason."""

        @server.routes.post(path)
        async def respond(request: web.Request) -> web.Response:
            try:
                if (request.content_length or 0) > MOST_BODY or len(body := await request.read()) > MOST_BODY:
                    raise TypeError(f"the request is longer than {MOST_BODY} bytes")
                return web.json_response(await answer(json.loads(body)))
            except (TypeError, ValueError, RecursionError) as error:
                return web.json_response({"error": str(error)}, status=400)

    async def page(asked: Any) -> dict[str, Any]:
        """Register a page; `plays` says whether it plays the live view."""
        if not isinstance(asked, dict) or not isinstance(asked.get("client_id"), str):
            raise TypeError("client_id is missing or no text")
        _register(asked["client_id"], asked.get("plays") is True, server.sockets)
        return {}

    async def schedule(asked: Any) -> dict[str, Any]:
        # In a thread, because a very long video would block the event loop.
        return await asyncio.to_thread(schedule_numbers, asked)

    post("/light_forcing/schedule", schedule)
    post("/light_forcing/page", page)

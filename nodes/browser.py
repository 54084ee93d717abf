"""Browser pages that run the pack's JavaScript, and the routes that the JavaScript and other programs call."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from ..lightforcing_core.refusal import Refusal


@dataclass(frozen=True, eq=False)
class Page:
    """A registered page, a new object when reloaded; plays: plays the live view."""

    plays: bool


MOST_BODY = 1 << 18  # bytes of a request
UNREADABLE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
_PAGES: dict[str, Page] = {}  # by client id


def watching_page(server: Any) -> Page | None:
    """The page that queued the running prompt, None without our JavaScript."""
    return None if server is None else _PAGES.get(server.client_id or "")


def add_routes(
    server: Any, schedule_numbers: Callable[[Any], dict[str, Any]], direct_run: Callable[..., dict[str, Any]]
) -> None:
    """Add the pack's routes to ComfyUI's server.

    schedule_numbers: answers the schedule node's plot. direct_run: directs a run, given its `prompt_id`.
    """

    def post(path: str, answer: Callable[..., dict[str, Any]]) -> None:
        """Add a route from JSON, and the parts of the path by name, to JSON.

        A body that is no JSON, or of another kind, is HTTP 400 with the reason; a refusal is 409, or 404 for an id.
        """

        @server.routes.post(path)
        async def respond(request: web.Request) -> web.Response:
            try:
                if (request.content_length or 0) > MOST_BODY or len(body := await request.read()) > MOST_BODY:
                    raise TypeError(f"the request is longer than {MOST_BODY} bytes")
                # In a thread, because the schedule of a very long video would block the event loop.
                return web.json_response(await asyncio.to_thread(answer, json.loads(body), **request.match_info))
            except Refusal as refusal:
                status = 404 if refusal.field == "prompt_id" else 409
                return web.json_response({"error": str(refusal)}, status=status)
            except UNREADABLE as error:
                return web.json_response({"error": f"not a request of this pack: {error!r:.200}"}, status=400)

    def register(asked: Any) -> dict[str, Any]:
        """Remember a page, which `plays` the live view or not, and forget those that are no longer connected."""
        client_id, plays = asked["client_id"], asked.get("plays") is True
        for gone in _PAGES.keys() - set(server.sockets):
            _PAGES.pop(gone, None)
        _PAGES[client_id] = Page(plays)
        return {}

    post("/light_forcing/schedule", schedule_numbers)
    post("/light_forcing/page", register)
    post("/light_forcing/live/{prompt_id}", direct_run)

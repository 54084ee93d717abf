"""What the pack's JavaScript asks the server: a schedule's numbers, and to be sent the live view."""

import asyncio
from typing import Any

from aiohttp import web

from ..schedule import schedule_numbers
from .browser import note_page


def register(server: Any) -> None:
    """Add the pack's routes to the host's `PromptServer`."""

    @server.routes.post("/light_forcing/schedule")
    async def schedule(request: web.Request) -> web.Response:
        """What a Light Forcing Schedule node with these inputs will do, or `error` with the way out."""
        try:
            asked = await request.json()
            # Away from the event loop, which a very long video would hold up.
            return web.json_response(await asyncio.to_thread(lambda: schedule_numbers(**asked)))
        except ValueError as error:
            return web.json_response({"error": str(error)})
        except (TypeError, KeyError, AttributeError):  # what no widget holds
            told = {"error": "these are not the inputs of a Light Forcing Schedule"}
            return web.json_response(told, status=400)

    @server.routes.post("/light_forcing/page")
    async def page(request: web.Request) -> web.Response:
        """A page is there, with our JavaScript; `plays` tells whether it plays the live view."""
        asked = await request.json()
        if not isinstance(asked, dict) or not isinstance(asked.get("client_id"), str):
            return web.json_response({"error": "the page does not say its client_id"}, status=400)
        note_page(asked["client_id"], asked.get("plays") is True, server.sockets)
        return web.json_response({})

"""What the pack's JavaScript asks the server: a schedule's numbers, and to be sent the live view."""

from typing import Any

from aiohttp import web

from .browser import note_page
from .schedule import schedule_numbers


def register(server: Any) -> None:
    """Add the pack's routes to the host's `PromptServer`."""

    @server.routes.post("/light_forcing/schedule")
    async def schedule(request: web.Request) -> web.Response:
        """What a Light Forcing Schedule node with these inputs will do, or `error` with the way out."""
        asked = await request.json()
        try:
            return web.json_response(schedule_numbers(**asked))
        except ValueError as error:
            return web.json_response({"error": str(error)})

    @server.routes.post("/light_forcing/page")
    async def page(request: web.Request) -> web.Response:
        """A page is there, with our JavaScript; `plays` tells whether it plays the live view."""
        asked = await request.json()
        note_page(asked["client_id"], asked["plays"], server.sockets)
        return web.json_response({})

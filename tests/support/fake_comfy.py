"""A small ComfyUI server for tests: real HTTP and WebSocket, with the run's events and ending written by the test."""

import asyncio
import threading
from contextlib import contextmanager, suppress

from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestServer

SUCCESS = {"status_str": "success", "completed": True, "messages": []}


class FakeComfy:
    """What the server answers (set before the run) and what it was asked (read after it).

    Prompts run one after another. events: sent when a prompt starts, each given the prompt's id; the string "drop"
    closes the event stream, bytes go out as a binary preview. record: what /history then holds, None for never;
    `render`, where set, makes it from the submitted body instead. With `hold` a run waits after its events until
    /interrupt or `release`, being the `held_prompt`; `hold_after` lets so many prompts through first. `crash` makes the
    server forget everything and unreachable until `come_back`.
    authorization: the header of that name that every request must have, None for none.
    answers: by the first part of a path, an (HTTP status, body) to answer with instead.
    lose_next_answer_to: the first part of a path; the next such request is carried out, but its answer does not arrive.

    rendered: the bodies that ran to their end. requests: the first part of every request's path.
    """

    def __init__(self):
        self.object_info = {}
        self.events = []
        self.record = {"outputs": {}, "status": SUCCESS}
        self.refusal = None
        self.node_errors = {}
        self.files = {}
        self.hold, self.hold_after, self.render, self.held_prompt = False, 0, None, None
        self.prompts, self.interrupts, self.connections = [], [], 0
        self.rendered, self.client_messages, self.requests = [], [], []
        self.lose_next_answer_to, self.authorization, self.answers, self.previews = None, None, {}, None
        self.url = ""
        self._sockets, self._history, self._queued = set(), {}, []
        self._released = threading.Event()
        self._reachable, self._crashes = True, 0

    def release(self):
        self._released.set()

    def come_back(self):
        self._reachable = True

    def crash(self):
        async def forget():
            self._crashes += 1
            self._queued, self._history = [], {}
            await self._hang_up()

        self._reachable = False
        asyncio.run_coroutine_threadsafe(forget(), self._loop).result(10)

    @contextmanager
    def running(self):
        @web.middleware
        async def answer_if_reachable(request, handler):
            self.requests.append(request.path.removeprefix("/base/").split("/")[0])
            if not self._reachable:
                request.transport.abort()
                raise web.HTTPServiceUnavailable
            if self.authorization not in (None, request.headers.get("Authorization")):
                raise web.HTTPUnauthorized
            if self.requests[-1] in self.answers:
                status, body = self.answers[self.requests[-1]]
                return web.Response(status=status, body=body)
            answer = await handler(request)
            if self.lose_next_answer_to == self.requests[-1]:
                self.lose_next_answer_to = None
                request.transport.abort()
            return answer

        async def start():
            app = web.Application(middlewares=[answer_if_reachable])
            for name in ("object_info/{name}", "ws", "history/{id}", "queue", "view"):
                app.router.add_get(f"/base/{name}", getattr(self, f"_get_{name.partition('/')[0]}"))
            for name in ("prompt", "queue", "interrupt"):
                app.router.add_post(f"/base/{name}", getattr(self, f"_post_{name}"))
            server = TestServer(app)
            await server.start_server(shutdown_timeout=0.1)
            self.url = str(server.make_url("/base"))
            self._worker = asyncio.create_task(self._work())
            return server

        self._loop = loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        server = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        try:
            yield self
        finally:
            self.release()
            loop.call_soon_threadsafe(self._worker.cancel)
            asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()

    async def _get_object_info(self, request):
        name = request.match_info["name"]
        return web.json_response({name: self.object_info[name]} if name in self.object_info else {})

    async def _post_prompt(self, request):
        body = await request.json()
        self.prompts.append(body)
        if self.refusal is not None:
            return web.json_response(self.refusal, status=400)
        self._queued.append(body)
        return web.json_response({"prompt_id": body["prompt_id"], "number": 1, "node_errors": self.node_errors})

    async def _work(self):
        while True:
            while not self._queued:
                await asyncio.sleep(0.005)
            await self._run(self._queued[0])

    async def _run(self, body):
        prompt_id, crashes = body["prompt_id"], self._crashes
        for event in self.events:
            if event == "drop":
                await self._hang_up()
                continue
            while not self._sockets and self._reachable:
                await asyncio.sleep(0.02)
            await self._send(event if isinstance(event, bytes) else (event[0], {"prompt_id": prompt_id, **event[1]}))
        if self.previews is not None:
            await self._send(self.previews(prompt_id))
        held = self.hold and len(self.rendered) >= self.hold_after
        self.held_prompt = prompt_id if held else None
        while held and not self._released.is_set() and prompt_id not in self.interrupts and crashes == self._crashes:
            await asyncio.sleep(0.02)
        self.held_prompt = None
        if crashes != self._crashes:
            return
        record = self.render(body) if self.render is not None else self.record
        if prompt_id in self.interrupts:
            messages = [["execution_interrupted", {"node_id": "1"}]]
            record = {"outputs": {}, "status": {"status_str": "error", "completed": False, "messages": messages}}
        else:
            self.rendered.append(body)
        if record is not None:
            self._history[prompt_id] = record
        self._queued.pop(0)
        await self._send(("executing", {"prompt_id": prompt_id, "node": None}))

    async def _send(self, event):
        for socket in list(self._sockets):
            with suppress(ConnectionError):
                if isinstance(event, bytes):
                    await socket.send_bytes(event)
                else:
                    # Newer servers add keys of their own.
                    data = {**event[1], "prompt_metadata": {"workflow_id": "1"}}
                    await socket.send_json({"type": event[0], "data": data, "added": [1]})

    async def _hang_up(self):
        for socket in list(self._sockets):
            await socket.close()

    async def _get_ws(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.connections += 1
        self._sockets.add(socket)
        await socket.send_json({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 1}}}})
        async for message in socket:
            if message.type == WSMsgType.ERROR:
                break
            self.client_messages.append(message.json())
        self._sockets.discard(socket)
        return socket

    async def _get_history(self, request):
        prompt_id = request.match_info["id"]
        return web.json_response({prompt_id: self._history[prompt_id]} if prompt_id in self._history else {})

    async def _get_queue(self, request):
        return web.json_response(
            {"queue_running": [[0, body["prompt_id"], {}, {}, []] for body in self._queued], "queue_pending": []}
        )

    async def _post_queue(self, request):
        deleted = (await request.json())["delete"]
        self._queued[1:] = [body for body in self._queued[1:] if body["prompt_id"] not in deleted]
        return web.Response()

    async def _post_interrupt(self, request):
        prompt_id = (await request.json())["prompt_id"]
        if self._queued and prompt_id == self._queued[0]["prompt_id"]:
            self.interrupts.append(prompt_id)
        return web.Response()

    async def _get_view(self, request):
        key = tuple(request.query[name] for name in ("filename", "subfolder", "type"))
        if key not in self.files:
            return web.Response(status=404)
        return web.Response(body=self.files[key])

"""A small ComfyUI server for tests: real HTTP and WebSocket, with the run's events and ending written by the test."""

import asyncio
import threading
from contextlib import contextmanager

from aiohttp import WSMsgType, web

SUCCESS = {"status_str": "success", "completed": True, "messages": []}


class FakeComfy:
    """What the server answers (set before the run) and what it was asked (read after it).

    events: sent after a prompt arrives, each given the prompt's id; the string "drop" closes the event stream, bytes
    go out as a binary preview. record: what /history then holds, None for never. With `hold` the run waits after its
    events until /interrupt or `release`.
    """

    def __init__(self):
        self.object_info = {}
        self.events = []
        self.record = {"outputs": {}, "status": SUCCESS}
        self.refusal = None
        self.node_errors = {}
        self.files = {}
        self.truncate_downloads = False
        self.hold = False
        self.prompts, self.interrupts, self.deleted, self.connections = [], [], [], 0
        self.url = ""
        self._sockets, self._history, self._queued = set(), {}, []
        self._arrived, self._released = threading.Event(), threading.Event()

    def wait_for_prompt(self, seconds=20.0):
        assert self._arrived.wait(seconds), "no prompt arrived"

    def release(self):
        self._released.set()

    @contextmanager
    def running(self):
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start():
            app = web.Application()
            app.router.add_get("/base/object_info", self._get_object_info)
            app.router.add_post("/base/prompt", self._post_prompt)
            app.router.add_get("/base/ws", self._websocket)
            app.router.add_get("/base/history/{id}", self._get_history)
            app.router.add_get("/base/queue", self._get_queue)
            app.router.add_post("/base/queue", self._post_queue)
            app.router.add_post("/base/interrupt", self._post_interrupt)
            app.router.add_get("/base/view", self._view)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/base"
            ready.set()
            return runner

        def serve():
            asyncio.set_event_loop(loop)
            runner = loop.run_until_complete(start())
            loop.run_forever()
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(runner.cleanup())
            loop.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert ready.wait(10)
        try:
            yield self
        finally:
            self.release()
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)

    async def _get_object_info(self, request):
        return web.json_response(self.object_info)

    async def _post_prompt(self, request):
        body = await request.json()
        self.prompts.append(body)
        if self.refusal is not None:
            return web.json_response(self.refusal, status=400)
        self._queued = [body["prompt_id"]]
        self._task = asyncio.create_task(self._run(body["prompt_id"]))
        return web.json_response({"prompt_id": body["prompt_id"], "number": 1, "node_errors": self.node_errors})

    async def _run(self, prompt_id):
        for event in self.events:
            if event == "drop":
                for socket in list(self._sockets):
                    await socket.close()
                continue
            while not self._sockets:
                await asyncio.sleep(0.02)
            for socket in list(self._sockets):
                if isinstance(event, bytes):
                    await socket.send_bytes(event)
                else:
                    await socket.send_json({"type": event[0], "data": {"prompt_id": prompt_id, **event[1]}})
        self._arrived.set()
        while self.hold and not self._released.is_set():
            await asyncio.sleep(0.02)
        self._queued = []
        if self.record is not None:
            self._history[prompt_id] = self.record
        for socket in list(self._sockets):
            await socket.send_json({"type": "executing", "data": {"prompt_id": prompt_id, "node": None}})

    async def _websocket(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.connections += 1
        self._sockets.add(socket)
        await socket.send_json({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 1}}}})
        async for message in socket:
            if message.type == WSMsgType.ERROR:
                break
        self._sockets.discard(socket)
        return socket

    async def _get_history(self, request):
        prompt_id = request.match_info["id"]
        return web.json_response({prompt_id: self._history[prompt_id]} if prompt_id in self._history else {})

    async def _get_queue(self, request):
        return web.json_response(
            {"queue_running": [[0, name, {}, {}, []] for name in self._queued], "queue_pending": []}
        )

    async def _post_queue(self, request):
        self.deleted += (await request.json())["delete"]
        return web.Response()

    async def _post_interrupt(self, request):
        self.interrupts.append((await request.json())["prompt_id"])
        self.release()
        return web.Response()

    async def _view(self, request):
        key = tuple(request.query[name] for name in ("filename", "subfolder", "type"))
        if key not in self.files:
            return web.Response(status=404)
        content = self.files[key]
        if not self.truncate_downloads:
            return web.Response(body=content)
        response = web.StreamResponse(headers={"Content-Length": str(len(content) + 10)})
        await response.prepare(request)
        await response.write(content)
        request.transport.close()
        return response

"""A server that plays ComfyUI's part as badly as it can: the first part of a path chooses how.

`MODES` maps each way's name to the answers that it gives instead of ComfyUI's, by the next part of the path. An answer
is a coroutine function of (writer, play), with the `Play` of that way so far.
"""

import asyncio
import base64
import gzip
import hashlib
import json
import re
import threading
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import repeat

from ...support.queue_samples import OBJECT_INFO

PAUSE = 0.02  # seconds between two drops
NESTED = b"[" * 10_000 + b"]" * 10_000
LONG = b'{"a": "' + b"x" * 3_000_000 + b'"}'
OUTPUT = {"filename": "clip.txt", "subfolder": "video", "type": "output"}


@dataclass
class Play:
    """What one way was asked: the last endpoint, all by how often, the id of its prompt, and the stream's key."""

    elsewhere: str
    endpoint: str = ""
    asked: Counter = field(default_factory=Counter)
    prompt_id: str = ""
    key: str = ""


def head(status="200 OK", *lines):
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *lines, "", ""]).encode()


def whole(body, status="200 OK", *lines):
    async def answer(writer, play):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        writer.write(head(status, f"Content-Length: {len(content)}", *lines) + content)

    return answer


def parts(before, pieces, pause=0.0):
    """An answer that begins with `before` and has no end."""

    async def answer(writer, play):
        writer.write(before)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return answer


def once(answer):
    """This answer twice, then ComfyUI's."""
    return lambda writer, play: (answer if play.asked[play.endpoint] < 3 else GOOD[play.endpoint])(writer, play)


def redirect(writer, play):
    return whole(b"", "302 Found", f"Location: {play.elsewhere}")(writer, play)


async def reset(writer, play):
    writer.transport.abort()


def records(**changes):
    def answer(writer, play):
        entry = {"outputs": {"4": {"images": [OUTPUT]}}, "status": {"status_str": "success", "messages": []}}
        finished = play.asked["history"] > 3 and play.prompt_id
        return whole({play.prompt_id: {**entry, **changes}} if finished else {})(writer, play)

    return answer


def listed(*items):
    return records(outputs={"4": {"images": [{**OUTPUT, **item} for item in items]}})


GOOD = {
    "object_info": whole(OBJECT_INFO),
    "prompt": lambda writer, play: whole({"prompt_id": play.prompt_id, "node_errors": {}})(writer, play),
    "history": records(),
    "queue": lambda writer, play: whole({"queue_running": [[0, play.prompt_id]], "queue_pending": []})(writer, play),
    "view": whole(b"frames"),
    "interrupt": whole(b""),
    "ws": lambda writer, play: socket([])(writer, play),
}


def frame(payload, opcode=1, length=None):
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return bytes([0x80 | opcode, 127]) + (length or len(content)).to_bytes(8, "big") + content


def socket(frames, pause=0.0, stays=True):
    """An event stream that sends `frames`; functions among them make one from the prompt's id."""

    async def answer(writer, play):
        digest = hashlib.sha1(play.key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        accepted = f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}"
        lines = ("HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade", accepted, "", "")
        writer.write("\r\n".join(lines).encode())
        while stays and not play.prompt_id:
            await asyncio.sleep(PAUSE)
        for one in frames:
            writer.write(one(play.prompt_id) if callable(one) else one)
            await writer.drain()
            await asyncio.sleep(pause)
        await asyncio.sleep(3600 if stays else PAUSE)

    return answer


def event(kind, **data):
    return lambda prompt_id: frame({"type": kind, "data": {"prompt_id": prompt_id, **data}})


def preview(prompt_id, size):
    about = json.dumps({"prompt_id": prompt_id}).encode()
    return frame((4).to_bytes(4, "big") + len(about).to_bytes(4, "big") + about + b"\x89PNG" + b"x" * size, 2)


BODIES = {  # without any sense for ComfyUI's client
    "null": whole(None),
    "list": whole([]),
    "number": whole(7),
    "text": whole("text"),
    "html": whole(b"<html>"),
    "nested": whole(NESTED),
    "digits": whole(b'{"a": ' + b"9" * 5000 + b"}"),
    "items": whole(b"[" + b"{}," * 1_500_000 + b"{}]"),
    "latin": whole(b'{"a": "\xe4"}'),
}
FAULTS = {
    "long": whole(LONG),
    "wide": whole('{"a": "😀'.encode() + b"x" * 12_000_000 + b'"}'),
    "endless": parts(head(), repeat(b"x" * 65536)),
    "endless 500": parts(head("500 Oops"), repeat(b"x" * 65536)),
    "drip": parts(head(), repeat(b" "), PAUSE),
    "drip 500": parts(head("500 Oops"), repeat(b" "), PAUSE),
    "dripping head": parts(b"HTTP/1.1 200 OK\r\nX: ", repeat(b"x"), PAUSE),
    "heads": parts(b"", repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), PAUSE),
    "silence": lambda writer, play: asyncio.sleep(3600),
    "reset": reset,
    "no HTTP": parts(b"SSH-2.0-OpenSSH_9.0\r\n", []),
    "odd length": whole(b"{}", "200 OK", "Content-Length: many"),
    "cut": parts(head("200 OK", "Content-Length: 1000"), [b"{"]),
    "packed": whole(gzip.compress(b"x" * 10_000_000), "200 OK", "Content-Encoding: gzip"),
    "redirect": redirect,
    "400 list": whole({"error": ["x"], "node_errors": ["x"]}, "400 Bad Request"),
    "400 text": whole(b'"x"', "400 Bad Request"),
    "403": whole(b"\xff\x1b[2Jno", "403 Forbidden"),
    "busy": whole(b"", "503 Service Unavailable"),
}
ONCE = {str(status): once(whole(b"", f"{status} Later", "Retry-After: 1")) for status in (429, 502, 503, 504)}
SOCKETS = {
    **{name: FAULTS[name] for name in ("endless", "drip", "dripping head", "silence", "reset", "no HTTP", "redirect")},
    **{name: FAULTS[name] for name in ("odd length", "403", "busy")},
    "html": BODIES["html"],
    "404": whole(b"", "404 Not Found"),
    "odd messages": socket([frame(one) for one in ([], None, "x", {"type": []}, {"data": "text"}, NESTED, b"{")]),
    "odd progress": socket(
        [
            event("executing", node=["3"]),
            event("executing", node="3"),
            *(event("progress", **data) for data in ({}, {"value": "x"}, {"value": float("nan")}, {"value": [1]})),
            event("progress", value=10**299, max=1e-300),
            event("progress", value=int("9" * 300), max=-1),
            event("execution_cached", nodes={"a": 1}),
        ]
    ),
    "message without end": socket([bytes([1, 10]) + b"x" * 10] + [bytes([0, 1]) + b"x"] * 2000, PAUSE),
    "large message": socket([frame(b"x" * 65536, 2, 3 << 30), *[b"x" * 65536] * 1000]),
    "large previews": socket(repeat(lambda prompt_id: preview(prompt_id, 8_000_000)), PAUSE),
    "dropped": socket([frame({"type": "status"})], stays=False),
    "status only": socket(repeat(frame({"type": "status", "data": {}})), PAUSE / 4),
    "broadcasts": socket(repeat(frame({"type": "pack", "data": {"prompt_id": "another", "node": 1}})), PAUSE / 4),
    "ends and no end": socket(repeat(event("executing", node=None)), PAUSE),
    "no UTF-8": socket([frame(b"\xff")]),
    "no frame": socket([b"\xff" * 100]),
    "odd previews": socket([frame(b"\0\0\0\4\xff\xff\xff\xff" + NESTED, 2), frame(b"", 2), frame(b"\0\0\0\1", 2)]),
}
RECORDS = {  # each with the run's end
    "list": (lambda writer, play: whole({play.prompt_id: [1]})(writer, play), "failed"),
    "outputs list": (records(outputs=[1]), "done"),
    "outputs of node list": (records(outputs={"4": [OUTPUT]}), "done"),
    "odd items": (records(outputs={"4": {"images": [1, None, [OUTPUT], {"filename": ["x"]}]}}), "done"),
    "status text": (records(status="text"), "done"),
    "odd messages": (records(status={"messages": [1, [], ["execution_error"], [["x"], 1], {"a": 1}]}), "done"),
    "odd error": (records(status={"messages": [["execution_error", {"exception_message": [1]}]]}), "failed"),
    "error list": (records(status={"status_str": ["x"]}), "failed"),
    "equal outputs": (listed(*[{}] * 5000), "done"),
    "long name": (listed({"filename": "x" * 300}), "failed"),
    "long path": (listed({"subfolder": "x/" * 600}), "failed"),
    "outside": (
        listed(
            *({"filename": name} for name in ("C:\\x\0", "a\ud800\n.txt")),
            {"filename": "../../evil", "subfolder": "/etc/.."},
            {"filename": "..", "subfolder": ""},
        ),
        "done",
    ),
    "cached": (records(outputs={}, status={"messages": [["execution_cached", {"nodes": [*"1234"]}]]}), "failed"),
}
MODES = {"good": ({}, "done")}
REFUSED = {"items", "long", "wide", "endless", "endless 500", "packed", "redirect", "400 list", "400 text", "403"}
for endpoint in ("object_info", "prompt", "history", "queue", "view"):
    for name, answer in {**BODIES, **FAULTS, **ONCE}.items():
        # A file may hold anything, and a run of which only the answer was lost is found again.
        good = name in ONCE or (endpoint == "prompt" and name not in REFUSED)
        good = good or (endpoint == "view" and (name in BODIES or name == "long"))
        MODES[f"{endpoint} {name}"] = ({endpoint: answer}, "done" if good else None)
MODES |= {f"ws {name}": ({"ws": answer}, "done") for name, answer in SOCKETS.items()}
MODES |= {f"record {name}": ({"history": answer}, end) for name, (answer, end) in RECORDS.items()}
MODES |= {
    "no stream, lost run": (
        {"ws": FAULTS["403"], "history": whole({}), "queue": whole({"queue_pending": []})},
        "failed",
    ),
    "prompt node_errors list": ({"prompt": whole({"node_errors": [1]})}, "done"),
    "prompt node_errors text": ({"prompt": whole({"node_errors": {"3": {"errors": ["x", {"message": {}}]}}})}, "done"),
    "object_info node number": ({"object_info": whole(dict.fromkeys(OBJECT_INFO, 7))}, "done"),
    "object_info spec": ({"object_info": whole({"Sampler": {"input": {"required": {"mode": {}, "x": [{}]}}}})}, "done"),
    "queue short rows": ({"queue": whole({"queue_running": [[], [1]], "queue_pending": 3})}, "failed"),
}


@contextmanager
def hostile_server():
    """Yield its address, and the requests that came to the other host that it sends logins to."""
    plays, strayed, started = {}, [], Future()

    async def respond(reader, writer):
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            request = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            body = await reader.readexactly(int(re.search(r"(?i)Content-Length: (\d+)|$", request)[1] or 0))
            mode, endpoint = request.split(" ")[1].partition("?")[0].split("/")[1:3]
            play = plays.setdefault(mode, Play(started.result()[1]))
            play.endpoint = endpoint
            play.asked[endpoint] += 1
            if endpoint == "ws":
                play.key = re.search(r"(?i)Sec-WebSocket-Key: (\S*)", request)[1]
            if endpoint == "prompt":
                play.prompt_id = json.loads(body)["prompt_id"]
            await (list(MODES.values())[int(mode)][0].get(endpoint) or GOOD[endpoint])(writer, play)
            await writer.drain()
        writer.close()

    async def stray(reader, writer):
        strayed.append(await reader.read(65536))
        writer.close()

    async def serve():
        servers = [await asyncio.start_server(handler, "127.0.0.1", 0) for handler in (respond, stray)]
        url, elsewhere = (f"http://127.0.0.1:{one.sockets[0].getsockname()[1]}" for one in servers)
        ended = asyncio.Event()
        started.set_result((url, elsewhere.replace("127.0.0.1", "localhost"), asyncio.get_running_loop(), ended))
        await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    url, _, loop, ended = started.result(10)
    try:
        yield url, strayed
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)

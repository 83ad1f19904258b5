"""An engine that writes what a test tells it to, byte by byte, and keeps the bytes that it was sent.

It runs in a thread of its own. What it answers is decided by the request's path, see Request and `replies`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

WAIT_S = 20.0
T = TypeVar("T")


@dataclass
class Request:
    """As it came. `head` ends with the empty line; `gone`: the other side closed before the answer was complete."""

    head: bytes
    body: bytes
    began: float
    gone: threading.Event = field(default_factory=threading.Event)

    @property
    def target(self) -> bytes:
        return self.head.split(b" ")[1]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        lines = self.head.split(b"\r\n")[1:-2]
        return [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


Reply = Callable[["RawEngine", Request, asyncio.StreamWriter], Awaitable[None]]


def whole(body: bytes, status: bytes = b"200 OK", headers: bytes = b"content-type: application/json\r\n") -> Reply:
    """One answer with a length."""

    async def reply(engine: RawEngine, request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 " + status + b"\r\n" + headers + b"content-length: %d\r\n\r\n" % len(body) + body)

    return reply


def as_json(value: object, status: bytes = b"200 OK") -> Reply:
    return whole(json.dumps(value).encode(), status)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def stream(*parts: bytes, then: str = "end") -> Reply:
    """Chunks, one for each step() of the test but the first; `then`: "end", "die" (without an end) or "hang"."""

    async def reply(engine: RawEngine, request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for number, part in enumerate(parts):
            if number:
                await engine.stepped()
            writer.write(chunk(part))
            await writer.drain()
        if then == "hang":
            await asyncio.sleep(WAIT_S)
        elif then == "die":
            await engine.stepped()
            writer.transport.abort()
        else:
            writer.write(b"0\r\n\r\n")

    return reply


async def die(engine: RawEngine, request: Request, writer: asyncio.StreamWriter) -> None:
    """Closes the connection and says nothing."""
    writer.transport.abort()


async def hang(engine: RawEngine, request: Request, writer: asyncio.StreamWriter) -> None:
    """Says nothing."""
    await asyncio.sleep(WAIT_S)


class RawEngine:
    """A context manager. `replies`: by the path without its query; `default`: of every other."""

    def __init__(self, default: Reply | None = None) -> None:
        self.replies: dict[bytes, Reply] = {}
        self.default = default or as_json({"ok": True})
        self.requests: list[Request] = []
        self.open = 0
        """Connections that are open now."""
        self.free_running = True
        """Whether step() is needed."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> RawEngine:
        self._thread.start()
        self._steps: asyncio.Queue[None] = asyncio.Queue()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def step(self) -> None:
        self._loop.call_soon_threadsafe(self._steps.put_nowait, None)

    async def stepped(self) -> None:
        if not self.free_running:
            await asyncio.wait_for(self._steps.get(), WAIT_S)

    def wait_for_requests(self, count: int) -> None:
        wait_until(lambda: len(self.requests) >= count, f"{count} requests at the engine")

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT_S)

    async def _end(self) -> None:
        self._server.close()
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while not reader.at_eof():
                head = await reader.readuntil(b"\r\n\r\n")
                request = Request(head, b"", time.monotonic())
                request.body = await reader.readexactly(int(request.header(b"content-length") or 0))
                self.requests.append(request)
                await self._answer(request, reader, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The reply, until it ends or the other side closes."""
        reply = self.replies.get(request.target.partition(b"?")[0], self.default)
        answering = asyncio.ensure_future(reply(self, request, writer))
        closing = asyncio.ensure_future(reader.read(1))  # nobody sends more before the answer
        await asyncio.wait([answering, closing], return_when=asyncio.FIRST_COMPLETED)
        closed = not answering.done() or isinstance(answering.exception(), OSError)
        if closed:
            request.gone.set()
        rest = closing if answering.done() else answering
        over = closing.done()
        rest.cancel()
        await asyncio.gather(answering, closing, return_exceptions=True)
        if closed or over:
            raise OSError("closed, or another request was sent before the answer")
        answering.result()


def wait_until(fact: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
    """Looks until it is so. AssertionError says what did not happen."""
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.005)

"""A control server in a thread of the test, and clients that only know sockets."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastickv.config import Settings
from elastickv.control import Client, ControlServer
from elastickv.control.connection import ControlLimits
from elastickv.control.place import connect

SERVED_S = 0.05
"""In how much time another client is served, whatever happens beside it."""


@dataclass(frozen=True)
class Serving:
    """A server that runs in a thread with an event loop of its own."""

    directory: Path
    server: ControlServer
    loop: asyncio.AbstractEventLoop

    def client(self, timeout: float = 10.0) -> Client:
        return Client(str(self.directory), timeout=timeout)

    def raw(self, timeout: float = 10.0) -> Raw:
        return Raw(self.directory, timeout)

    @property
    def connections(self) -> int:
        return len(self.server._connections)


@contextmanager
def serving(directory: Path, limits: ControlLimits | None = None) -> Iterator[Serving]:
    """Serves the directory until the block is left."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="control-server")
    thread.start()

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(20)

    server = ControlServer(Settings.load(arguments={"directory": str(directory)}), limits)
    try:
        run(server.start())
        try:
            yield Serving(directory, server, loop)
        finally:
            run(server.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


class Raw:
    """Bytes to and from a control socket."""

    def __init__(self, directory: Path, timeout: float = 10.0) -> None:
        self.socket = connect(directory, timeout)
        self.lines = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> dict[str, Any]:
        """The next line, which must come."""
        answer: dict[str, Any] = json.loads(self.lines.readline())
        return answer

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.send(json.dumps(request).encode() + b"\n")
        return self.answer()

    def ended(self) -> bool:
        """Whether the server closes, having said whatever it had to say."""
        try:
            return self.lines.read() is not None
        except ConnectionError:
            return True

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()


def served_in(client: Client, calls: int = 15, device: str | None = None) -> float:
    """Seconds that the median of some calls takes."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        client.list(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def becomes(fact: Any, seconds: float = 20.0) -> bool:
    """Whether it comes true in time."""
    until = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True

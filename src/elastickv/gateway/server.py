"""The server under the application: uvicorn, with limits on what a connection may take before it is a request.

uvicorn bounds neither the size of headers nor the time that a client takes over them, nor a client that does not read
its answer. Wire does, by a timer and a count for each connection.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from elastickv.gateway.errors import Refused, error_body
from elastickv.telemetry.server import cannot_listen

__all__ = ["Server", "Wire", "WireLimits", "allow_descriptors", "listen"]

log = logging.getLogger(__name__)

BACKLOG: Final = 2048
OTHER_FILES: Final = 256
"""Ledgers, logs, what watches engines."""


@dataclass(frozen=True)
class WireLimits:
    """Of one connection, and how many there may be. Bytes and seconds."""

    connections: int = 4096
    header_bytes: int = 64 * 1024
    header_s: float = 10.0
    """From the connection, or a request's first byte, to the end of its headers."""
    idle_s: float = 60.0
    """Between two requests."""
    unread_s: float = 60.0
    """A client that reads nothing of its answer for so long is cut off."""


class Wire(HttpToolsProtocol):
    """One connection. Belongs to the event loop's thread."""

    limits = WireLimits()

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._header_bytes = 0
        self._in_headers = True
        self._refused = False
        self._idle: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        if len(self.connections) > self.limits.connections:
            text = f"there are {self.limits.connections} connections, as many as may be; try again later"
            self._refuse(Refused(text, status=503, code="too_many_connections", retry_after_s=1.0))
        else:
            self._wait_for_client(self.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > self.limits.header_bytes:
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_headers:
            self._in_headers, self._header_bytes = True, 1
        self._wait_for_client(self.limits.header_s)

    def on_headers_complete(self) -> None:
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > self.limits.header_bytes:
            self._header_bytes = self.limits.header_bytes + 1
            raise httptools.HttpParserError("headers too large")
        self._in_headers, self._header_bytes = False, 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # and no other request waits behind it
            # A body that is still coming is thrown away for a while, so that the client gets to read the answer.
            self._wait_for_client(self.limits.header_s if self.cycle.more_body else self.limits.idle_s)

    def send_400_response(self, msg: str) -> None:
        if self._in_headers and self._header_bytes > self.limits.header_bytes:
            self._refuse(self._too_large())
        else:
            self._refuse(Refused("the request is no valid HTTP/1.1", status=400, code="invalid_http"))

    def _too_large(self) -> Refused:
        text = f"the headers have more than {self.limits.header_bytes} bytes"
        return Refused(text, status=431, code="headers_too_large")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.unread_s, self._cut, "it reads nothing of its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _wait_for_client(self, seconds: float) -> None:
        self._stop_waiting()
        self._idle = self.loop.call_later(seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _too_slow(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return  # half a request behind one that is being answered: it waits with it
        if self._in_headers and self._header_bytes:
            text = f"the headers were not complete after {self.limits.header_s:.0f} s"
            self._refuse(Refused(text, status=408, code="request_timeout"))
        else:
            self.transport.abort()

    def _cut(self, why: str) -> None:
        log.info("cut off a client: %s", why)
        self.transport.abort()

    def _refuse(self, refused: Refused) -> None:
        """Answers, unless another answer is being written, and closes."""
        self._refused = True
        self._stop_waiting()
        if self.cycle is None or self.cycle.response_complete:
            body = error_body(refused)
            head = STATUS_LINE[refused.status] + b"content-type: application/json\r\nconnection: close\r\n"
            if refused.retry_after_s is not None:
                head += b"retry-after: %d\r\n" % max(1, round(refused.retry_after_s))
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()
        self._unread = self._unread or self.loop.call_later(self.limits.unread_s, self.transport.abort)


class Server(uvicorn.Server):
    """Serves an application on a socket of listen(): `await server.serve()`, in a loop of uvloop's.

    Signals are the caller's. `stop` may be called from the loop or from a handler of a signal.
    """

    def __init__(self, app: ASGIApp, listening: socket.socket, limits: WireLimits | None = None) -> None:
        chosen = limits or WireLimits()
        self._listening = listening
        self.port: int = listening.getsockname()[1]

        class Bound(Wire):
            limits = chosen

        super().__init__(
            uvicorn.Config(
                app,
                http=Bound,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=round(chosen.idle_s),
                backlog=BACKLOG,
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until stop(), and until what ran then has ended."""
        await super().serve([self._listening])

    def stop(self, drain_s: float) -> None:
        """Takes no more connections; requests that run may do so for up to `drain_s` seconds. Then serve() returns."""
        self.config.timeout_graceful_shutdown = max(1, round(drain_s))
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Takes none."""
        yield


def allow_descriptors(connections: int) -> None:
    """Raises this process's limit of open files as far as it may: each connection of a client takes two, one of them to
    an engine. Logs a warning where that is not enough."""
    wanted = 2 * connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < min(wanted, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    if hard < wanted:
        text = (
            "%d connections need %d open files and %d are allowed: raise the limit (ulimit -n) or lower max_connections"
        )
        log.warning(text, connections, wanted, hard)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; port 0: any that is free. AlreadyExists for a port that is in use, AccessDenied,
    InvalidArgument for a host that is none of this machine's."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen(BACKLOG)  # else another could bind it too
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise cannot_listen(error, host, port) from error
    return bound

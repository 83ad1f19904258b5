"""One client of the control socket: its frames in order, each under a deadline, and the answers to them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from elastickv.control.desk import retrieve
from elastickv.control.protocol import MAX_FRAME, MalformedFrame, Watch, encode, failure, read_request
from elastickv.control.service import Service
from elastickv.errors import DeadlineExceeded, ElasticKVError, InvalidArgument, Unavailable
from elastickv.units import format_size

__all__ = ["Connection", "ControlLimits"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlLimits:
    """Bounds of a control server. Times in seconds."""

    connections: int = 256
    """At once. One more takes the place of the connection that has been silent longest."""
    watches: int = 64
    """At once."""
    waits: int = 64
    """Requests that wait for a tenant's answer at once: they keep their connection's place."""
    frame: int = MAX_FRAME
    """Bytes of a request, its newline included."""
    frame_s: float = 5.0
    """For the rest of a frame, once its first byte is here."""
    idle_s: float = 60.0
    """Without a request, until the connection is closed. A watch is not idle."""
    write_s: float = 5.0
    """Until a client has taken enough of an answer for the rest to fit the buffers."""
    heartbeat_s: float = 10.0
    """A watch that sees no change says so this often, so that either side notices when the other has gone."""
    buffer: int = 64 * 1024
    """Bytes of answers that wait for a client before the server waits for it."""


class Connection:
    """Belongs to one event loop; run() is called once."""

    def __init__(
        self,
        service: Service,
        limits: ControlLimits,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        may_watch: Callable[[], bool],
    ) -> None:
        self.busy = False
        self.watching = False
        self.served = False
        self.since = time.monotonic()
        """When it began to be as it is: silent, or busy."""
        self._service = service
        self._limits = limits
        self._reader = reader
        self._writer = writer
        self._may_watch = may_watch
        self._next: asyncio.Task[bytes | None] | None = None
        writer.transport.set_write_buffer_limits(high=limits.buffer)

    async def run(self) -> None:
        """Answers until the client leaves, breaks a rule, or is silent too long."""
        try:
            while (frame := await self._frame()) is not None:
                await self._answer(frame)
        except ElasticKVError as error:
            # A rule of the connection is broken: the client is told, and that is the end of it.
            await self._send(encode(None, None, error=error))
        finally:
            if self._next is not None:
                self._next.cancel()

    def refuse(self, error: ElasticKVError) -> None:
        """Says why, as far as that takes no waiting."""
        if not self._writer.transport.is_closing():
            self._writer.write(encode(None, None, error=error))

    async def _answer(self, frame: bytes) -> None:
        self._turn(busy=True)
        try:
            request = read_request(frame)
            if isinstance(request, Watch):
                await self._watch(request)
            else:
                await self._send(encode(request, await self._service.answer(request)))
            self.served = True
        except MalformedFrame:
            raise
        except ElasticKVError as error:
            await self._send(failure(frame, error))
        except ConnectionError:
            raise
        except Exception:  # a bug of ours ends at this border: logged here, and no traceback goes over the wire
            log.exception("a request on the control socket failed")
            await self._send(failure(frame, ElasticKVError("the server failed at this request; its log says why")))
        self._turn(busy=False)
        await asyncio.sleep(0)  # a client with many requests in one go takes turns with the others

    def _turn(self, *, busy: bool) -> None:
        self.busy, self.since = busy, time.monotonic()

    async def _watch(self, request: Watch) -> None:
        """Views until `count` of them, the client's next line, or its end."""
        if not self._may_watch():
            raise Unavailable(f"{self._limits.watches} watches are open already, which is the most; try again later")
        self.watching = True
        try:
            await self._stream(request)
        finally:
            self.watching = False

    async def _stream(self, request: Watch) -> None:
        sent, said_at, before = 0, 0.0, list[object]()
        while True:
            begin = time.monotonic()
            seen = await self._service.watched(request)
            if (steady := Service.steady(seen)) != before:
                before = steady
                await self._send(encode(request, seen, event="view"))
                sent, said_at = sent + 1, begin
            elif begin - said_at >= self._limits.heartbeat_s:
                await self._send(encode(request, None, event="same"))
                said_at = begin
            if sent == request.count:
                break
            rest = max(0.0, request.interval - (time.monotonic() - begin))
            if (await asyncio.wait({self._ahead()}, timeout=rest))[0]:
                break
        await self._send(encode(request, {"sent": sent}, event="end"))

    async def _frame(self) -> bytes | None:
        """The next line, or None when the client has left. DeadlineExceeded when it stays silent."""
        seconds = self._limits.idle_s
        done, _ = await asyncio.wait({self._ahead()}, timeout=seconds)
        if not done:
            raise DeadlineExceeded(f"no request for {seconds:g} s; connect again", seconds=seconds)
        task, self._next = self._ahead(), None
        return task.result()

    def _ahead(self) -> asyncio.Task[bytes | None]:
        """The reading of the next frame, which goes on beside the answer to the one before: one frame, not more."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._read())
            self._next.add_done_callback(retrieve)
        return self._next

    async def _read(self) -> bytes | None:
        first = await self._reader.read(1)
        if first in (b"", b"\n"):
            return first or None
        seconds, most = self._limits.frame_s, self._limits.frame
        try:
            rest = await asyncio.wait_for(self._reader.readuntil(b"\n"), seconds)
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            raise InvalidArgument(f"a request is longer than {format_size(most)}, the most", most=most) from None
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"half a request, and no more of it within {seconds:g} s", seconds=seconds) from None
        return first + rest

    async def _send(self, line: bytes) -> None:
        """ConnectionError when the client does not take it in time: it is dropped, and held up nobody but itself."""
        if self._writer.transport.is_closing():
            raise ConnectionResetError("the client has left")
        self._writer.write(line)
        if self._writer.transport.get_write_buffer_size() == 0:
            return
        try:
            await asyncio.wait_for(self._writer.drain(), self._limits.write_s)
        except asyncio.TimeoutError:
            self._writer.transport.abort()
            raise ConnectionAbortedError(f"the client took no answer for {self._limits.write_s:g} s") from None

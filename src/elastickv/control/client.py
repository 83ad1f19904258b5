"""A client of the control socket. Every call has a deadline; a server's error comes out as the class it was."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final

import msgspec

from elastickv.config import Settings
from elastickv.control.place import connect
from elastickv.control.protocol import MAX_FRAME, MAX_WAIT, PROTOCOL, Answer, read_answer
from elastickv.errors import DeadlineExceeded, InvalidArgument, Unavailable
from elastickv.fit import Fit
from elastickv.ledger import DeviceView, TenantView
from elastickv.limits import LimitOrder

__all__ = ["Client"]

READS: Final = frozenset({"hello", "list", "get", "fit"})
MAX_ANSWER: Final = 64 * 1024 * 1024
"""Bytes of a line that a client takes from a server."""


class Client:
    """One connection, made when it is first needed and again when the server has closed it. One thread at a time.

    `timeout`: seconds for each answer, the time that a request asks the server to wait not counted.
    """

    def __init__(self, directory: str | None = None, *, timeout: float = 10.0) -> None:
        self._directory = Settings.load(arguments={"directory": directory}).directory
        self._timeout = timeout
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._last_id = 0

    def hello(self) -> dict[str, Any]:
        """The server's protocol, version, process id and directory."""
        return dict(self.call("hello"))

    def list(self, device: str | None = None) -> tuple[DeviceView, ...]:
        """Every device that can be read, or one."""
        return msgspec.convert(self.call("list", device=device)["devices"], tuple[DeviceView, ...])

    def get(self, tenant: str, device: str | None = None) -> TenantView:
        """One tenant."""
        return msgspec.convert(self.call("get", tenant=tenant, device=device)["tenant"], TenantView)

    def set_limit(
        self,
        tenant: str,
        limit: int | str | None,
        *,
        now: bool = False,
        wait: float = 5.0,
        device: str | None = None,
    ) -> LimitOrder:
        """As elastickv.limits.set_limit(); with `wait` 0 it returns at once, perhaps in state `pending`."""
        result = self._ask("set", {"tenant": tenant, "limit": limit, "now": now, "wait": wait, "device": device}, wait)
        return msgspec.convert(result, LimitOrder)

    def fit(self, *, static: int | str = 0, floor: int | str = 0, weight: int = 1, device: str | None = None) -> Fit:
        """As elastickv.fit.would_fit() on the device as it is now."""
        return msgspec.convert(self.call("fit", static=static, floor=floor, weight=weight, device=device), Fit)

    def trim(self, tenant: str, size: int | str, *, wait: float = 5.0, device: str | None = None) -> int | None:
        """Has a tenant give back bytes that no request uses; returns how many it gives. None with `wait` 0."""
        answer = self._ask("trim", {"tenant": tenant, "bytes": size, "wait": wait, "device": device}, wait)
        given: int | None = answer["given"]
        return given

    def forget(self, tenant: str, device: str | None = None) -> None:
        """Drops a name that does not run, and the limit kept for it."""
        self.call("forget", tenant=tenant, device=device)

    def watch(
        self,
        *,
        interval: float = 0.5,
        count: int | None = None,
        device: str | None = None,
        tenant: str | None = None,
    ) -> Iterator[tuple[DeviceView, ...]]:
        """The devices whenever they have changed, on a connection of its own that ends with the iteration."""
        fields = {"interval": interval, "count": count, "device": device, "tenant": tenant}
        for seen in self.stream("watch", **fields):
            yield msgspec.convert(seen["devices"], tuple[DeviceView, ...])

    def stream(self, op: str, **fields: object) -> Iterator[Any]:
        """The results of any operation as plain values: one, or those of a watch on a connection of its own."""
        if op != "watch":
            yield self.call(op, **fields)
            return
        patience = self._timeout + 2 * MAX_WAIT  # a watch that sees no change says so after a rest at the latest
        with Client(str(self._directory), timeout=self._timeout) as other:
            other._send(op, fields)
            while (answer := other._receive(patience)).event != "end":
                if answer.event == "view":
                    yield answer.result

    def call(self, op: str, **fields: object) -> Any:
        """Any operation but watch; the result as plain values. Raises the error that the server answers with."""
        wait = fields.get("wait", 5.0 if op in ("set", "trim") else 0.0)
        return self._ask(op, fields, wait if isinstance(wait, (int, float)) else 0.0)

    def close(self) -> None:
        """The next call connects again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._received.clear()

    def _ask(self, op: str, fields: dict[str, object], wait: float) -> Any:
        again = self._socket is not None and op in READS
        try:
            self._send(op, fields)
            return self._receive(self._timeout + wait).result
        except Unavailable:
            if not again or self._socket is not None:
                raise
        # A connection from before was closed at this very moment; what only reads may be asked twice.
        self._send(op, fields)
        return self._receive(self._timeout + wait).result

    def _send(self, op: str, fields: dict[str, object]) -> None:
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            self.close()  # nothing was asked, so this is the server's farewell
        if self._socket is None:
            self._socket = connect(self._directory, self._timeout)
        self._last_id += 1
        line = msgspec.json.encode({"v": PROTOCOL, "id": self._last_id, "op": op, **fields}) + b"\n"
        if len(line) > MAX_FRAME:
            raise InvalidArgument(f"{op}: a request of {len(line)} bytes; {MAX_FRAME} are the most")
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(line)
        except TimeoutError:
            raise self._late(self._timeout) from None
        except ConnectionError:
            # What the server said before it closed can still be read.
            return

    def _receive(self, seconds: float) -> Answer:
        until = time.monotonic() + seconds
        while (end := self._received.find(b"\n")) < 0:
            self._more(until, seconds)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        answer = read_answer(line)
        if answer.error is not None:
            if answer.id is None:
                self.close()
            raise answer.error.error()
        if answer.id != self._last_id:
            self.close()
            raise InvalidArgument(f"the control server answered request {answer.id!r}, asked was {self._last_id}")
        return answer

    def _more(self, until: float, seconds: float) -> None:
        rest = until - time.monotonic()
        if self._socket is None or rest <= 0:
            raise self._late(seconds)
        try:
            self._socket.settimeout(rest)
            data = self._socket.recv(256 * 1024)
        except TimeoutError:
            raise self._late(seconds) from None
        except ConnectionError:
            data = b""
        if not data or len(self._received) + len(data) > MAX_ANSWER:
            self.close()
            raise Unavailable("the control server has closed the connection; is it still running?")
        self._received += data

    def _late(self, seconds: float) -> DeadlineExceeded:
        self.close()
        return DeadlineExceeded(f"the control server gave no answer within {seconds:g} s", seconds=seconds)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

"""The control server: a socket at its place, and as many clients as its bounds allow.

It runs in the event loop of whoever starts it: `elastickv control` is nothing else, and a gateway can hold one. A
client that is silent, slow or hostile costs the others nothing: every wait has a deadline, every buffer a bound, and
a newcomer to a full server takes the place of whoever has been silent longest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import resource
import socket
import struct
import weakref
from pathlib import Path
from types import TracebackType
from typing import Final

from elastickv.config import Settings
from elastickv.control.connection import Connection, ControlLimits
from elastickv.control.place import SOCKET_NAME, Place
from elastickv.control.service import Service
from elastickv.errors import AccessDenied, AlreadyExists, Unavailable

__all__ = ["ControlServer"]

log = logging.getLogger(__name__)

BACKLOG: Final = 64
"""Connections that the kernel keeps until they are accepted."""
TURN: Final = 2
"""Connections that are accepted before the other clients have their turn."""
STOP_S: Final = 5.0
BREATH_S: Final = 0.1
"""Without accepting, when the process is out of descriptors."""
_UCRED: Final = struct.Struct("3i")


class ControlServer:
    """Serves the settings' directory. start() and stop() belong to one event loop; also an async context manager."""

    def __init__(self, settings: Settings | None = None, limits: ControlLimits | None = None) -> None:
        self.settings = settings if settings is not None else Settings.load()
        self.limits = _affordable(limits if limits is not None else ControlLimits())
        self._service = Service(self.settings, self.limits.waits)
        self._place: Place | None = None
        self._connections: dict[Connection, asyncio.Task[None]] = {}
        self._transports: weakref.WeakSet[asyncio.WriteTransport] = weakref.WeakSet()
        self._tasks: set[asyncio.Task[None]] = set()
        """Of the connections, and of those that were told to go and have not gone yet."""

    @property
    def path(self) -> Path:
        """The socket's."""
        return self.settings.directory / SOCKET_NAME

    async def start(self) -> None:
        """Listens. AlreadyExists where a living server has the place, AccessDenied where it is not private."""
        if self._place is not None:
            raise AlreadyExists(f"this control server serves '{self.path}' already", path=str(self.path))
        place = Place(self.settings.directory)
        try:
            place.listening.listen(BACKLOG)
            asyncio.get_running_loop().add_reader(place.listening, self._accept, place)
        except BaseException:  # whatever it was goes on to the caller; the place must be free again
            place.close()
            raise
        self._place = place

    async def stop(self) -> None:
        """Closes every connection, removes the socket and lets go of the lock. Orders that were given stand."""
        place, self._place = self._place, None
        if place is None:
            return
        asyncio.get_running_loop().remove_reader(place.listening)
        await asyncio.sleep(0)  # every task has begun, and closes what it was given
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=STOP_S)
        await asyncio.sleep(0)
        for transport in list(self._transports):
            transport.abort()  # its client does not take the farewell
        await asyncio.sleep(0)
        self._service.close()
        place.close()

    def _accept(self, place: Place) -> None:
        """Called when somebody connects. By hand, for asyncio's own servers accept a whole queue in one go."""
        for _ in range(TURN):
            try:
                accepted, _address = place.listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("the control server accepts nobody for a moment: %s", error.strerror)
                asyncio.get_running_loop().remove_reader(place.listening)
                asyncio.get_running_loop().call_later(BREATH_S, self._accept_again, place)
                return
            task = asyncio.ensure_future(self._serve(accepted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _accept_again(self, place: Place) -> None:
        if self._place is place:
            asyncio.get_running_loop().add_reader(place.listening, self._accept, place)

    async def _serve(self, accepted: socket.socket) -> None:
        uid = _user_of(accepted)
        try:
            reader, writer = await asyncio.open_unix_connection(sock=accepted, limit=self.limits.frame)
        except BaseException:  # the server stops, or the client has left; the descriptor must not stay
            accepted.close()
            raise
        self._transports.add(writer.transport)
        connection = Connection(self._service, self.limits, reader, writer, self._may_watch)
        task = asyncio.current_task()
        try:
            _check_user(uid)
            self._make_room()
        except (AccessDenied, Unavailable) as error:
            connection.refuse(error)
            writer.close()
            return
        if task is not None:
            self._connections[connection] = task
        await self._run(connection, writer)

    async def _run(self, connection: Connection, writer: asyncio.StreamWriter) -> None:
        try:
            await connection.run()
        except ConnectionError:
            log.debug("a control client has left")
        except asyncio.CancelledError:
            # Its place was taken, or the server stops. The task ends as one that is done, not as one that failed.
            connection.refuse(Unavailable("the connection is closed to make room, or because the server stops"))
        finally:
            self._connections.pop(connection, None)
            writer.close()

    def _make_room(self) -> None:
        if len(self._connections) < self.limits.connections:
            return
        silent = [connection for connection in self._connections if not connection.busy]
        if not silent:
            raise Unavailable(f"{len(self._connections)} clients are being served, which is the most; try again later")
        # Those that never asked for anything go first.
        oldest = min(silent, key=lambda connection: (connection.served, connection.since))
        self._connections.pop(oldest).cancel()

    def _may_watch(self) -> bool:
        return sum(connection.watching for connection in self._connections) < self.limits.watches

    async def __aenter__(self) -> ControlServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.stop()


def _user_of(accepted: socket.socket) -> int:
    """Who the kernel says connected."""
    _, uid, _ = _UCRED.unpack(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


def _check_user(uid: int) -> None:
    """It must be the server's own; root has no way in either."""
    if uid != os.geteuid():
        raise AccessDenied(
            f"user {uid} has no business here: this control server answers user {os.geteuid()} alone", uid=uid
        )


def _affordable(limits: ControlLimits) -> ControlLimits:
    """As many connections as leave half of this process's descriptors to others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = limits.connections if soft == resource.RLIM_INFINITY else max(8, min(limits.connections, soft // 2))
    return dataclasses.replace(limits, connections=most)

"""Channels between the ranks of one engine: a stream socket from the rank that decides to each of the others.

They are made while the engine starts, in a private directory of their own that is gone once everybody has connected.
What travels is MessagePack of a known type; nothing is unpickled, and no frame is longer than a bound.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from elastickv.control.place import open_private
from elastickv.engines.sglang.channel import Channel
from elastickv.errors import AccessDenied, DeadlineExceeded, IntegrityError, Unavailable

__all__ = ["DECISION_S", "Follower", "Leader", "Lobby"]

DECISION_S: Final = 60.0
"""How long a rank waits for the one that decides, and that one for room in a socket's buffer."""
CONNECT_S: Final = 60.0
MAX_FRAME: Final = 1 << 26

_LENGTH: Final = struct.Struct("<I")
_UCRED: Final = struct.Struct("3i")
_NAME: Final = "ranks"

_Told = TypeVar("_Told")


class Leader(Channel):
    """Of the rank that decides. One thread."""

    def __init__(self, others: list[socket.socket]) -> None:
        self._others = others

    def tell(self, kind: str, decision: object) -> None:
        """DeadlineExceeded where a rank has not read for so long that its buffer is full."""
        body = msgspec.msgpack.encode((kind, decision))
        frame = _LENGTH.pack(len(body)) + body
        for other in self._others:
            try:
                other.sendall(frame)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"a rank of this engine has not taken a decision ({kind}) within {DECISION_S:g} s; it hangs, and "
                    "the engine cannot go on without it",
                    seconds=DECISION_S,
                ) from None
            except OSError as error:
                raise Unavailable(f"a rank of this engine has ended: {error.strerror}; start the engine anew") from None

    def close(self) -> None:
        """The others see the end at their next decision."""
        while self._others:
            self._others.pop().close()


class Follower(Channel):
    """Of every other rank. One thread."""

    def __init__(self, first: socket.socket) -> None:
        self._first = first
        self._decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {}

    def hear(self, kind: str, told: type[_Told]) -> _Told:
        """The next decision. IntegrityError where it is of another kind: the ranks have come apart."""
        until = time.monotonic() + DECISION_S
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, kind, until))
        if length > MAX_FRAME:
            raise IntegrityError(f"a decision ({kind}) of {length} bytes came, and {MAX_FRAME} are the most; a bug")
        decoder = self._decoders.get(told)
        if decoder is None:
            decoder = self._decoders[told] = msgspec.msgpack.Decoder(tuple[str, told])  # type: ignore[valid-type]
        body = self._read(length, kind, until)
        try:
            came, decision = decoder.decode(body)
        except msgspec.MsgspecError:
            came, decision = "something of another form", None
        if came != kind or decision is None:
            raise IntegrityError(
                f"the ranks of this engine have come apart: this one is at {kind!r}, the first one at {came!r}; "
                "please report this with SGLang's version and arguments"
            )
        found: _Told = decision
        return found

    def _read(self, length: int, kind: str, until: float) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            left = until - time.monotonic()
            try:
                self._first.settimeout(max(left, 1e-3))
                part = self._first.recv(length - len(parts))
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the first rank of this engine has not said within {DECISION_S:g} s what to do ({kind}); "
                    "its log may say why",
                    seconds=DECISION_S,
                ) from None
            except OSError as error:
                raise Unavailable(f"the first rank of this engine cannot be heard: {error.strerror}") from None
            if not part:
                raise Unavailable("the first rank of this engine has ended; its log may say why; start the engine anew")
            parts += part
        return bytes(parts)

    def close(self) -> None:
        """The first rank sees it at its next decision."""
        self._first.close()


class Lobby:
    """Where the ranks of one engine meet: opened by the first, entered by the others. A context manager."""

    def __init__(self) -> None:
        self.address = tempfile.mkdtemp(prefix="elastickv-ranks-")
        """A private directory; the others need its name."""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _in_directory(Path(self.address), self._listening.bind)
            self._listening.listen(128)
        except BaseException:  # whatever it was goes on to the caller; nothing may stay behind
            self.close()
            raise

    def __enter__(self) -> Lobby:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self, others: int) -> Leader:
        """The channel to so many other ranks, once all of them are here."""
        until = time.monotonic() + CONNECT_S
        came: list[socket.socket] = []
        leader = Leader(came)
        try:
            while len(came) < others:
                self._listening.settimeout(max(until - time.monotonic(), 1e-3))
                came.append(self._listening.accept()[0])
                came[-1].settimeout(DECISION_S)
                _check_owner(came[-1])
        except TimeoutError:
            here = len(came)
            leader.close()
            raise DeadlineExceeded(
                f"{here} of {others} other ranks of this engine came within {CONNECT_S:g} s; their logs may say why",
                seconds=CONNECT_S,
            ) from None
        except BaseException:  # whatever else it was goes on to the caller; no connection may stay
            leader.close()
            raise
        return leader

    def close(self) -> None:
        """Nobody else can come in; who is in stays."""
        self._listening.close()
        shutil.rmtree(self.address, ignore_errors=True)

    @staticmethod
    def enter(address: str) -> Follower:
        """The channel from the first rank."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            client.settimeout(CONNECT_S)
            _in_directory(Path(address), client.connect)
            _check_owner(client)
        except OSError as error:
            client.close()
            raise Unavailable(f"the first rank of this engine cannot be reached: {error.strerror or error}") from None
        except BaseException:  # whatever else it was goes on to the caller; the descriptor must not stay
            client.close()
            raise
        return Follower(client)


def _in_directory(directory: Path, use: Callable[[str], None]) -> None:
    """Calls `use` with the socket's address; it goes through the directory's descriptor, so it is always short."""
    folder = open_private(directory, "the directory of the ranks' socket")
    try:
        use(f"/proc/self/fd/{folder}/{_NAME}")
    finally:
        os.close(folder)


def _check_owner(peer: socket.socket) -> None:
    user = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
    if user != os.geteuid():
        raise AccessDenied(f"a process of user {user} came to the ranks' socket of user {os.geteuid()}")

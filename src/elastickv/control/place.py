"""Where the control socket is: a file in the private directory of the ledgers, and the lock that says it is served.

A server holds `control.lock` for as long as it lives; the kernel drops the lock when the process ends, however it ends.
Whoever holds it may replace `control.sock`, because nobody listens there any more. The lock file itself stays.
Addresses go through the directory's descriptor, so that they are short however long the path is, and mean the
directory that was checked.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import weakref
from pathlib import Path
from typing import Final

from elastickv.errors import AccessDenied, AlreadyExists, DeadlineExceeded, NotFound

__all__ = ["LOCK_NAME", "SOCKET_NAME", "Place", "connect", "open_private"]

SOCKET_NAME: Final = "control.sock"
LOCK_NAME: Final = "control.lock"
_TIMEVAL: Final = struct.Struct("ll")

_held: Final[weakref.WeakSet[Place]] = weakref.WeakSet()


def open_private(directory: Path, what: str = "the ledger directory") -> int:
    """A descriptor of the directory, which must be a real one, ours, and closed to others. Not created here."""
    shown = f"{what} '{directory}'"
    try:
        found = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"{shown} does not exist; name another with --dir", directory=str(directory)) from None
    except OSError as error:
        raise AccessDenied(f"{shown} cannot be opened as a directory: {error.strerror}") from None
    status = os.fstat(found)
    if status.st_uid == os.geteuid() and not status.st_mode & 0o077:
        return found
    os.close(found)
    if status.st_uid != os.geteuid():
        raise AccessDenied(
            f"{shown} belongs to user {status.st_uid}, this process runs as user {os.geteuid()}; name one of your own"
        )
    mode = stat.S_IMODE(status.st_mode)
    raise AccessDenied(f"{shown} has mode {mode:04o}, so others can reach it; make it private: chmod 700 '{directory}'")


def connect(directory: Path, timeout: float) -> socket.socket:
    """A connected socket with a timeout in seconds. NotFound where nobody serves the directory."""
    folder = open_private(directory)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # connect() waits for room in the server's queue, and this is the deadline that the kernel keeps for it.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(timeout), int(timeout % 1 * 1e6)))
        client.connect(f"/proc/self/fd/{folder}/{SOCKET_NAME}")
        client.settimeout(timeout)
    except BlockingIOError:
        client.close()
        raise DeadlineExceeded(
            f"the control server at '{directory / SOCKET_NAME}' took no connection within {timeout:g} s",
            seconds=timeout,
        ) from None
    except (FileNotFoundError, ConnectionRefusedError):
        client.close()
        raise NotFound(
            f"nobody serves '{directory / SOCKET_NAME}'; start `elastickv control`", directory=str(directory)
        ) from None
    except BaseException:  # whatever else it was goes on to the caller; the descriptor must not stay
        client.close()
        raise
    finally:
        os.close(folder)
    return client


class Place:
    """A listening socket at its place, and the lock behind it. One thread. Closing leaves nothing that misleads."""

    def __init__(self, directory: Path) -> None:
        """AlreadyExists where a living server has the place; AccessDenied where something there is not private."""
        self.directory = directory
        self.path = directory / SOCKET_NAME
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise AccessDenied(f"cannot make the ledger directory '{directory}': {error.strerror}") from None
        self._folder = open_private(directory)
        self._lock = -1
        self._listening: socket.socket | None = None
        try:
            self._lock = self._take_lock()
            self._listening = self._listen()
        except BaseException:  # whatever it was goes on to the caller; nothing may stay open or locked
            self.close()
            raise
        self._inode = os.stat(SOCKET_NAME, dir_fd=self._folder, follow_symlinks=False).st_ino
        _held.add(self)

    @property
    def listening(self) -> socket.socket:
        """It listens, and does not block."""
        if self._listening is None:
            raise NotFound(f"'{self.path}' is closed", path=str(self.path))
        return self._listening

    def _take_lock(self) -> int:
        shown = f"'{self.directory / LOCK_NAME}'"
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            lock = os.open(LOCK_NAME, flags, 0o600, dir_fd=self._folder)
        except OSError as error:
            raise AccessDenied(f"{shown} cannot be opened: {error.strerror}; remove it") from None
        status = os.fstat(lock)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            os.close(lock)
            raise AccessDenied(f"{shown} is no private file of this user; remove it")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise AlreadyExists(
                f"a control server serves '{self.path}' already (process {owner or 'unknown'}); use it, or stop it",
                path=str(self.path),
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)
        return lock

    def _listen(self) -> socket.socket:
        self._remove_stale()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            # The mode goes over to the file that bind() makes, less the umask.
            os.fchmod(listening.fileno(), 0o600)
            listening.bind(f"/proc/self/fd/{self._folder}/{SOCKET_NAME}")
            os.chmod(SOCKET_NAME, 0o600, dir_fd=self._folder)
        except OSError as error:
            listening.close()
            raise AccessDenied(f"cannot make the socket '{self.path}': {error.strerror}") from None
        return listening

    def _remove_stale(self) -> None:
        """The lock is ours, so a socket here has no server."""
        try:
            status = os.stat(SOCKET_NAME, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(status.st_mode):
            raise AccessDenied(f"'{self.path}' is no socket; remove it", path=str(self.path))
        os.unlink(SOCKET_NAME, dir_fd=self._folder)

    def close(self) -> None:
        """Closes and removes the socket, if it is still this one, and lets go of the lock. May be called twice."""
        _held.discard(self)
        if self._listening is not None:
            self._listening.close()
            self._listening = None
            self._unlink()
        for name in ("_lock", "_folder"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

    def _unlink(self) -> None:
        try:
            if os.stat(SOCKET_NAME, dir_fd=self._folder, follow_symlinks=False).st_ino == self._inode:
                os.unlink(SOCKET_NAME, dir_fd=self._folder)
        except FileNotFoundError:
            return  # somebody has removed it already

    def forked(self) -> None:
        """In a child: the lock and the socket are the parent's alone, and must not outlive it here."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for name in ("_lock", "_folder"):
            os.close(getattr(self, name))
            setattr(self, name, -1)


def _after_fork() -> None:
    for place in list(_held):
        place.forked()
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)

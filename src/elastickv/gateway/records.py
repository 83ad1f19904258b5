"""What a gateway leaves behind for the next one, and for whoever asks how things stand.

    STATE/gateway.lock           held by the gateway for as long as it lives
    STATE/models.json            how the models stand, for `elastickv top`
    STATE/engines/NAME.json      what was started as this engine
    STATE/engines/NAME.place     held by its keeper for as long as it lives, with the process ids in it
    STATE/logs/NAME.log          what it prints

Files are replaced whole, so a reader finds the old or the new one. Who lives is what the locks say.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from elastickv.control.place import open_private
from elastickv.errors import AccessDenied, AlreadyExists, NotFound
from elastickv.gateway.base import ModelView
from elastickv.gateway.keeper import gateway_lives
from elastickv.gateway.spec import ModelSpec

__all__ = ["GatewayView", "Record", "Store", "default_state", "read_view"]

VERSION: Final = 1
_LOCK: Final = "gateway.lock"
_VIEWS: Final = "models.json"
_TAKE_S: Final = 3.0
"""A keeper that looks whether the lock is held holds it itself for a moment."""


@dataclass(frozen=True)
class Record:
    """One engine that was started. `live`: its model came by the admin API and stands in no file."""

    model: ModelSpec
    replica: str
    port: int
    command: tuple[str, ...]
    live: bool = False
    asleep: bool = False
    served: bool = False
    """Whether it has been ready once."""
    version: int = VERSION


@dataclass(frozen=True)
class GatewayView:
    """A gateway that lives, and how its models stood at Unix time `at`."""

    pid: int
    url: str
    at: float
    models: tuple[ModelView, ...]


def default_state(directory: Path) -> Path:
    """Where a gateway of the ledgers in `directory` keeps its state."""
    return directory / "gateway"


class Store:
    """The state directory, made private. One thread. Closing lets go of the lock; engines' records stay."""

    def __init__(self, directory: Path) -> None:
        """AccessDenied where it is not ours alone, AlreadyExists where a gateway uses it."""
        self.directory = directory
        self.engines = directory / "engines"
        self.logs = directory / "logs"
        for folder in (directory, self.engines, self.logs):
            _make_private(folder)
        self.lock_path = directory / _LOCK
        self._lock = self._take()

    def _take(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            lock = os.open(self.lock_path, flags, 0o600)
        except OSError as error:
            raise AccessDenied(f"'{self.lock_path}' cannot be opened: {error.strerror}; remove it") from None
        until = time.monotonic() + _TAKE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.02)
                    continue
                owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
                os.close(lock)
                raise AlreadyExists(
                    f"a gateway uses '{self.directory}' already (process {owner}); add models to it with `elastickv "
                    "model add`, stop it, or name another directory with --state"
                ) from None
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode("ascii"), 0)
            return lock

    def place(self, replica: str) -> Path:
        """The file that the keeper of this engine locks."""
        return self.engines / f"{replica}.place"

    def log(self, replica: str) -> Path:
        """Where this engine prints."""
        return self.logs / f"{replica}.log"

    def write(self, record: Record) -> None:
        """Replaces this engine's record."""
        _replace(self._path(record.replica), msgspec.json.encode(record))

    def forget(self, replica: str) -> None:
        """Its engine has ended."""
        for path in (self._path(replica), self.place(replica)):
            path.unlink(missing_ok=True)

    def read(self) -> list[Record]:
        """Every engine that was started and not forgotten, by name; what cannot be read is no record."""
        found = []
        for path in sorted(self.engines.glob("*.json")):
            with suppress(OSError, msgspec.DecodeError, msgspec.ValidationError):
                record = msgspec.json.decode(path.read_bytes(), type=Record)
                if record.version == VERSION and record.replica == path.stem:
                    found.append(record)
        return found

    def write_view(self, url: str, models: Sequence[ModelView]) -> None:
        """How the models stand now. `url`: where the gateway listens."""
        view = GatewayView(os.getpid(), url, time.time(), tuple(models))
        _replace(self.directory / _VIEWS, msgspec.json.encode(view), sync=False)

    def close(self) -> None:
        """The gateway ends. Keepers that still keep an engine start to count."""
        (self.directory / _VIEWS).unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _path(self, replica: str) -> Path:
        return self.engines / f"{replica}.json"


def read_view(state: Path) -> GatewayView | None:
    """The living gateway of a state directory, or None."""
    try:
        lock = os.open(state / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not gateway_lives(lock):
            return None
        return msgspec.json.decode((state / _VIEWS).read_bytes(), type=GatewayView)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError):
        return None
    finally:
        os.close(lock)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise AccessDenied(
            f"cannot make the directory '{folder}': {error.strerror}; name another with --state"
        ) from None
    try:
        os.close(open_private(folder, "the gateway's directory"))
    except NotFound as error:
        raise AccessDenied(error.message) from None


def _replace(path: Path, content: bytes, *, sync: bool = True) -> None:
    fresh = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        fresh.unlink()
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    fresh.replace(path)

"""One engine's process: started under a keeper, or found running; its log; its end.

Whether it lives is told by the kernel alone: by the lock that its keeper holds, and by a descriptor of the keeper's
process. Whether it is ready is another question, which replica.py asks over HTTP.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from elastickv.errors import AccessDenied, DeadlineExceeded
from elastickv.gateway.keeper import SAYS, STOP_S

__all__ = ["EngineProcess", "is_kept", "tail"]

LOG_LINES: Final = 12
_KEEPER_S: Final = 60.0
"""A Python that starts, on a machine that is busy."""
_LINE: Final = 300
_READ: Final = 64 * 1024
LOG_MOST: Final = 64 * 1024 * 1024
"""A log that is longer is cut, so that an engine that runs for months fills no disk."""


class EngineProcess:
    """Belongs to the event loop. `engine`: the id of the engine's first process."""

    def __init__(self, keeper: int, engine: int, log: Path, child: subprocess.Popen[bytes] | None = None) -> None:
        self.engine = engine
        self.log = log
        self._child = child
        self._descriptor = os.pidfd_open(keeper)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._descriptor, self._gone)

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], *, lock: Path, place: Path, log: Path, grace: float
    ) -> EngineProcess:
        """Starts `command` under a keeper. AccessDenied where it cannot be started at all; the text has the reason."""
        _rotate(log)
        keeper = [sys.executable, "-m", "elastickv.gateway.keeper", "--lock", str(lock), "--place", str(place)]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        place.unlink(missing_ok=True)
        output = os.open(log, flags, 0o600)
        try:
            child = subprocess.Popen(
                [*keeper, "--grace", str(grace), "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C at the terminal is the gateway's affair
            )
        finally:
            os.close(output)
        try:
            return cls(child.pid, await _started(child, place, log), log, child)
        except BaseException:  # whatever it was, cancelling too, goes on to the caller; nothing may run unknown
            child.kill()  # the engine goes with its keeper
            child.wait()
            raise

    @classmethod
    def adopt(cls, place: Path, log: Path) -> EngineProcess | None:
        """The engine that a keeper keeps there, or None."""
        pids = _pids(place)
        if pids is None:
            return None
        try:
            process = cls(pids[0], pids[1], log)
        except ProcessLookupError:
            return None
        # Held still: then the descriptor is that keeper's, and not one of a process that got its number later.
        if _pids(place) == pids:
            return process
        process._close()
        return None

    @property
    def alive(self) -> bool:
        """Whether its keeper lives, which ends with the engine."""
        return not self.ended.done()

    async def stop(self, within: float = STOP_S + 5) -> None:
        """Asks the keeper to end it, and waits. The keeper kills what does not end; what is deaf to that too is
        killed after `within` seconds."""
        self._signal(signal.SIGTERM)
        if not await self._wait(within):
            with suppress(ProcessLookupError):
                os.killpg(self.engine, signal.SIGKILL)
            self._signal(signal.SIGKILL)
            await self._wait(5.0)

    async def kill(self) -> None:
        """At once. The keeper cleans up behind it."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.killpg(self.engine, signal.SIGKILL)
        if not await self._wait(5.0):
            self._signal(signal.SIGKILL)
            await self._wait(5.0)

    async def _wait(self, seconds: float) -> bool:
        await asyncio.wait({self.ended}, timeout=seconds)
        return self.ended.done()

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def _gone(self) -> None:
        self._close()
        if self._child is not None:
            self._child.wait()  # it has ended: this only takes its code
        said = [line for line in tail(self.log) if line.startswith(SAYS)]
        if not self.ended.done():
            self.ended.set_result(said[-1].removeprefix(SAYS) if said else "its keeper was killed, and it with it")

    def _close(self) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def let_go(self) -> None:
        """Stops watching it, without ending it."""
        self._close()
        if self._child is not None:
            self._child.returncode = self._child.returncode or 0  # not waited for: it is to outlive this process

    def trim_log(self) -> None:
        """Cuts a log that has grown too long; it is written by appending, so the next line goes to its new end."""
        with suppress(FileNotFoundError):
            if self.log.stat().st_size > LOG_MOST:
                _rotate(self.log, keep=True)


async def _started(child: subprocess.Popen[bytes], place: Path, log: Path) -> int:
    """The engine's process id, once the keeper has written it."""
    until = time.monotonic() + _KEEPER_S
    while time.monotonic() < until:
        pids = _pids(place)
        if pids is not None and pids[0] == child.pid:
            return pids[1]
        if child.poll() is not None:
            raise AccessDenied(f"the engine could not be started: {' '.join(tail(log, 2))}", lines=tail(log))
        await asyncio.sleep(0.05)
    raise DeadlineExceeded(
        f"waited {_KEEPER_S:.0f} s for the keeper of an engine; its log {log} ends: {' '.join(tail(log, 2))}"
    )


def is_kept(place: Path) -> bool:
    """Whether a keeper lives there."""
    return _pids(place) is not None


def tail(log: Path, lines: int = LOG_LINES) -> list[str]:
    """The last lines of a log that say something, cut to what a terminal shows."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _READ))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    printable = ("".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines())
    return [line[:_LINE] for line in printable if line][-lines:]


def _pids(place: Path) -> tuple[int, int] | None:
    """The keeper's and the engine's, if the keeper lives and has written them."""
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with suppress(ValueError, KeyError, TypeError):
            ids = json.loads(os.pread(descriptor, 200, 0))
            return int(ids["keeper"]), int(ids["engine"])
        return None
    finally:
        os.close(descriptor)
    return None


def _rotate(log: Path, *, keep: bool = False) -> None:
    """The log becomes NAME.log.1, and is empty; `keep`: as a copy, for somebody has it open."""
    older = log.with_name(f"{log.name}.1")
    with suppress(FileNotFoundError):
        if keep:
            older.write_bytes("\n".join(tail(log, 10_000)).encode())
            os.truncate(log, 0)
        else:
            log.replace(older)

"""A small process that keeps one engine: it ends the engine when nobody wants it any more.

The gateway holds an exclusive lock on one file for as long as it lives. The kernel drops that lock when the gateway
ends, however it ends. A keeper that finds the lock free for longer than the grace ends its engine; a gateway that is
started again within the grace takes the lock and goes on with the engines that it finds (records.py). So neither a
SIGKILL of the gateway leaves an engine behind for good, nor does its restart cost the engines' start.

Should the keeper itself be killed, the kernel kills the engine's first process with it, and the plug-in ends the rest.

    python -m elastickv.gateway.keeper --lock FILE --record FILE --grace SECONDS -- COMMAND [ARGS]...
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["Keeper", "gateway_lives", "main"]

LOOK_EVERY_S: Final = 0.5
STOP_S: Final = 20.0
"""Between SIGTERM and SIGKILL."""

_PR_SET_PDEATHSIG: Final = 1
_EXIT_SETUP: Final = 3


def gateway_lives(lock: int) -> bool:
    """Whether a process holds the gateway's lock. `lock`: an open descriptor of its file."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


class Keeper:
    """One engine and the wish to end it."""

    def __init__(
        self, command: Sequence[str], lock: int, grace: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lock = lock
        self._grace = grace
        self._clock = clock
        self._asked = False
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_keeper
        )

    def ask(self, *_: object) -> None:
        """End it; a handler of SIGTERM and SIGINT."""
        self._asked = True

    def run(self) -> int:
        """Until the engine has ended; its exit code, or 128 and the signal."""
        descriptor = os.pidfd_open(self.process.pid)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        alone_since: float | None = None
        while not poll.poll(int(LOOK_EVERY_S * 1000)):
            alone_since = None if gateway_lives(self._lock) else (alone_since or self._clock())
            if self._asked or (alone_since is not None and self._clock() - alone_since >= self._grace):
                self._end()
                break
        os.close(descriptor)
        code = self.process.wait()
        _signal_group(self.process.pid, signal.SIGKILL)  # whatever of it did not go along
        return code if code >= 0 else 128 - code

    def _end(self) -> None:
        _signal_group(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
            return
        _signal_group(self.process.pid, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with_keeper() -> None:
    # The keeper has one thread, so "the thread that made me" is the keeper for all its life.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Keeps what stands after --."""
    parser = argparse.ArgumentParser(prog="python -m elastickv.gateway.keeper", description="Keeps one engine.")
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    try:
        lock = os.open(given.lock, os.O_RDONLY | os.O_CLOEXEC)
        record = os.open(given.record, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)  # for life: who reads the record knows that we are there
    except OSError as error:
        sys.stderr.write(f"keeper: {error.filename or given.record}: {error.strerror}\n")
        return _EXIT_SETUP
    keeper = Keeper(given.command, lock, given.grace)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, keeper.ask)
    code = keeper.run()
    given.record.unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())

"""A small process that keeps one engine: it ends the engine when nobody wants it any more.

The gateway holds an exclusive lock on one file for as long as it lives. The kernel drops that lock when the gateway
ends, however it ends. A keeper that finds the lock free for longer than the grace ends its engine; a gateway that is
started again within the grace takes the lock and goes on with the engines that it finds (records.py). So neither a
SIGKILL of the gateway leaves an engine behind for good, nor does its restart cost the engines' start.

Should the keeper itself be killed, the kernel kills the engine's first process with it, and the plug-in ends the rest.

It holds a lock on the engine's own file for as long as the engine lives, and the process ids stand in that file: who
finds the lock free knows that nobody is there, whatever the file says.

    python -m elastickv.gateway.keeper --lock FILE --place FILE --grace SECONDS -- COMMAND [ARGS]...
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
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

__all__ = ["EXIT_SETUP", "Keeper", "describe", "gateway_lives", "main", "say"]

LOOK_EVERY_S: Final = 0.5
STOP_S: Final = 20.0
"""Between SIGTERM and SIGKILL."""

SAYS: Final = "keeper: "
EXIT_SETUP: Final = 70
"""Of a keeper that could not start its engine; an engine's own codes are passed on."""

_PR_SET_PDEATHSIG: Final = 1


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
        """Starts `command`, in a process group of its own. OSError where that cannot be."""
        self._lock = lock
        self._grace = grace
        self._clock = clock
        self._asked = False
        self._why = ""
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with(os.getpid())
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
            now = self._clock()
            if gateway_lives(self._lock):
                alone_since = None
            elif alone_since is None:
                alone_since = now
            alone = alone_since is not None and now - alone_since >= self._grace
            if self._asked or alone:
                self._why = "as asked" if self._asked else f"no gateway for {self._grace:.0f} s"
                self._end(descriptor)
                break
        os.close(descriptor)
        code = self.process.wait()
        _signal_group(self.process.pid, signal.SIGKILL)  # whatever of it did not go along
        say(f"the engine ended with {describe(code)}" + (f" ({self._why})" if self._why else ""))
        return code if code >= 0 else 128 - code

    def _end(self, descriptor: int) -> None:
        _signal_group(self.process.pid, signal.SIGTERM)
        if not select.select([descriptor], [], [], STOP_S)[0]:
            say(f"the engine did not end within {STOP_S:.0f} s of SIGTERM and is killed")
        _signal_group(self.process.pid, signal.SIGKILL)


def describe(code: int) -> str:
    """A code of Popen as people say it."""
    if code >= 0:
        return f"exit code {code}"
    return f"signal {-code} ({signal.strsignal(-code)})"


def say(text: str) -> None:
    """A line into the engine's log, which is this process's stderr."""
    sys.stderr.write(f"{SAYS}{text}\n")
    sys.stderr.flush()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with(keeper: int) -> Callable[[], None]:
    library = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        # The keeper has one thread, so "the thread that made me" is the keeper for all its life.
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:  # it died before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare


def _take(place: int) -> None:
    """For life. Somebody who only looks holds the lock for a moment too."""
    for _ in range(100):
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)
    fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)


def main(arguments: Sequence[str] | None = None) -> int:
    """Keeps what stands after --."""
    parser = argparse.ArgumentParser(prog="python -m elastickv.gateway.keeper", description="Keeps one engine.")
    parser.add_argument("--lock", type=Path, required=True, help="the gateway's")
    parser.add_argument("--place", type=Path, required=True, help="the engine's own: locked, and holds process ids")
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    try:
        lock = os.open(given.lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        place = os.open(given.place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        _take(place)
        keeper = Keeper(given.command, lock, given.grace)
    except OSError as error:
        say(f"{error.filename or given.place}: {error.strerror}")
        return EXIT_SETUP
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, keeper.ask)
    os.ftruncate(place, 0)
    os.pwrite(place, json.dumps({"keeper": os.getpid(), "engine": keeper.process.pid}).encode(), 0)
    return keeper.run()


if __name__ == "__main__":
    raise SystemExit(main())

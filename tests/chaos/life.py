"""One process of the run as its conductor sees it."""

from __future__ import annotations

import multiprocessing as mp
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from chaos import kernel
from chaos.choices import TenantSpec

CONTEXT = mp.get_context("forkserver")
PRELOAD = ["chaos.tenant", "chaos.monitor", "chaos.operator", "chaos.surroundings", "chaos.sockets"]


def start(target: Callable[..., None], *arguments: object) -> tuple[Any, Connection]:
    """A process that runs target(*arguments, pipe), and our end of the pipe."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def last_words(pipe: Connection) -> object:
    """What a process that has ended had still said; None: nothing."""
    try:
        return pipe.recv() if pipe.poll() else None
    except (EOFError, ConnectionResetError):
        return None


class Life:
    """A tenant's process: what was asked of it, what it said last, and why it may die."""

    def __init__(self, spec: TenantSpec, target: Callable[..., None]) -> None:
        self.spec = spec
        self.process, self.pipe = start(target, spec)
        self.pid: int = self.process.pid
        self.started = self.heard = time.monotonic()
        self.ready = False
        self.doom = ""
        """Why it is expected to end; empty: it is not."""
        self.killed_at = 0.0
        self.stopped = False
        self.stopping_at = ""
        """A fault point at which it will stop."""
        self.may_refuse = bool(spec.faults)
        self.refused = False
        self.ops = self.misses = 0
        self.used = 0
        self.longest = 0.0
        self.quiet: Mapping[str, Any] | None = None
        self.forking = False
        self._watch()

    def _watch(self) -> None:
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:  # it has ended already: its pipe says so
            self.pidfd = -1

    @property
    def name(self) -> str:
        return self.spec.name

    def is_ready(self, pid: int) -> None:
        """It has joined, as process `pid` (in a time namespace another one than was started)."""
        self.ready = True
        if pid != self.pid:
            self.pid = pid
            self.close_watch()
            self._watch()

    def tell(self, *message: object) -> None:
        """A command; one to a process that has ended is lost."""
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return

    def kill(self, why: str) -> None:
        """SIGKILL, now."""
        self.doom = why
        self.killed_at = time.monotonic()
        kernel.send(self.pid, signal.SIGKILL)

    def pause(self) -> None:
        self.stopped = True
        kernel.send(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        self.stopped = False
        self.heard = time.monotonic()
        kernel.send(self.pid, signal.SIGCONT)

    def ended(self) -> bool:
        """Whether the kernel is through with all of its threads: the first may be a zombie before the last is."""
        if self.pidfd < 0:
            return kernel.state(self.pid) in "XZ"
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def close_watch(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pidfd = -1

    def bury(self, timeout: float = 20.0) -> int | None:
        """Waits for the process that was started; its exit code."""
        self.process.join(timeout)
        code: int | None = self.process.exitcode
        self.close_watch()
        self.pipe.close()
        self.process.close()
        return code

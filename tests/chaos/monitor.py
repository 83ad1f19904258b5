"""The one who watches: a process of its own that reads the kernel and the ledger and belongs to no tenant."""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from chaos import checks, kernel
from chaos.tenant import footprint
from elastickv import _core
from elastickv.errors import DeadlineExceeded, ElasticKVError, NotFound
from elastickv.ledger import DeviceView, read_device

TICK_S = 0.02
RETRIES = 3
LOCK_MS = 200
SLOW_S = 0.25


@dataclass
class Seen:
    """Figures of the whole watch."""

    looks: int = 0
    unread: int = 0
    """Looks at which the ledger's lock was held to the deadline."""
    peak_kernel: int = 0
    peak_leased: int = 0
    recoveries: int = 0
    worst_recovery: float = 0.0
    """Seconds from the end of a process to the first look that shows its leases gone: no sooner than the next look."""
    worst_held: float = 0.0
    """Seconds after the end of a process at which its leases were still seen."""
    longest_gap: float = 0.0
    """Seconds between two looks: the monitor waits for a processor like everybody."""
    looked: float = field(default=0.0, repr=False)


@dataclass
class Death:
    """A process that has ended and whose row has not been seen gone yet."""

    name: str
    pid: int
    since: float
    still: float = 0.0
    """The latest time after the end at which its leases were still there."""


@dataclass
class Watcher:
    """Looks every TICK_S; told of processes by the conductor, through `pipe`."""

    directory: Path
    capacity: int
    pipe: Connection
    watched: dict[int, int] = field(default_factory=dict)
    """Process ids with a pidfd each: an id alone may be another process's by now."""
    deaths: list[Death] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    blocked: bool = False
    ledger: _core.Ledger | None = None

    def run(self) -> None:
        """Until the conductor says "end" or is gone."""
        while True:
            while self.pipe.poll(TICK_S):
                kind, *values = self.pipe.recv()
                if kind == "end":
                    self.pipe.send(("seen", self.seen))
                    return
                self.hear(kind, values)
            for text in self.look():
                self.pipe.send(("violation", text))

    def hear(self, kind: str, values: list[object]) -> None:
        if kind == "born":
            self._watch(int(str(values[1])))
        elif kind == "died":
            pid = int(str(values[1]))
            self.deaths.append(Death(str(values[0]), pid, float(str(values[2]))))
        elif kind == "blocked":
            self.blocked = bool(values[0])
            for death in self.deaths:  # nobody can lease while somebody sits on the lock
                death.since = time.monotonic()
        elif kind == "footprint":
            self.pipe.send(("footprint", footprint()))

    def _watch(self, pid: int) -> None:
        try:
            opened = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # it did not live to be looked at
        if pid in self.watched:
            os.close(self.watched[pid])
        self.watched[pid] = opened

    def _living(self) -> list[int]:
        """Those who have not ended; the others are dropped."""
        ended = set(select.select(list(self.watched.values()), [], [], 0)[0])
        for pid in [pid for pid, opened in self.watched.items() if opened in ended]:
            os.close(self.watched.pop(pid))
        return list(self.watched)

    def look(self) -> list[str]:
        """One look at the kernel, the ledger and the directory."""
        now = time.monotonic()
        self.seen.longest_gap = max(self.seen.longest_gap, now - (self.seen.looked or now))
        self.seen.looked = now
        self.seen.looks += 1
        found = self._kernel()
        found += checks.files_are_known(os.listdir(self.directory))  # noqa: PTH208 - names are what is wanted
        view = self._view()
        if view is None:
            self.seen.unread += 1
            return found
        self.seen.peak_leased = max(self.seen.peak_leased, view.held)
        return found + checks.ledger_holds(view) + self._mourn(view)

    def _kernel(self) -> list[str]:
        """A sum over the capacity counts only if it stands when it is taken again: files are read one by one."""
        living = self._living()
        total = kernel.allocated(living)
        for _ in range(RETRIES):
            if total <= self.capacity:
                break
            total = min(total, kernel.allocated(living))
        self.seen.peak_kernel = max(self.seen.peak_kernel, total)
        return checks.capacity_holds("memory by the kernel", total, self.capacity)

    def _view(self) -> DeviceView | None:
        try:
            if self.ledger is None:
                self.ledger = _core.Ledger.open(str(self.directory), "host", deadline_ms=LOCK_MS)
            return read_device(self.ledger)
        except (DeadlineExceeded, NotFound):
            return None

    def _mourn(self, view: DeviceView) -> list[str]:
        """Whose row still lives after its process has ended."""
        found, now = [], time.monotonic()
        living = {tenant.pid for tenant in view.living}
        for death in list(self.deaths):
            if death.pid in living:
                death.still = 0.0 if self.blocked else now - death.since
                self.seen.worst_held = max(self.seen.worst_held, death.still)
                found += checks.recovered(death.name, death.still)
                continue
            self.deaths.remove(death)
            if self.blocked:  # nobody could look, so there is no figure
                continue
            self.seen.recoveries += 1
            took = now - death.since
            self.seen.worst_recovery = max(self.seen.worst_recovery, took)
            if took > SLOW_S:
                self.pipe.send(
                    ("note", f"{death.name} ({death.pid}) seen gone after {took:.3f} s, held {death.still:.3f}")
                )
        return found


def main(directory: Path, capacity: int, pipe: Connection) -> None:
    """The process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Watcher(directory, capacity, pipe).run()
    except (BrokenPipeError, EOFError):
        return  # the conductor is gone
    except ElasticKVError as error:
        pipe.send(("violation", f"the ledger cannot be read: {error}"))

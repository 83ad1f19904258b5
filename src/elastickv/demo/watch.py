"""Samples of the ledger and of the kernel while the demo runs, and what a static split would have done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elastickv import _core
from elastickv.demo.traffic import Served
from elastickv.errors import ElasticKVError
from elastickv.ledger import DeviceView, read_device

__all__ = ["KernelMemory", "Watch", "queued_by_static_split"]

MEMORY_FILE = "/memfd:elastickv"
RETRIES = 3


class KernelMemory:
    """What the kernel has allocated for the elastic memory of some processes, in bytes.

    Each process's memory is one memory file; its st_blocks are the pages that are really there.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids
        self._files: list[Path] = []

    def find(self) -> int:
        """Looks for the files; returns how many there are."""
        self._files = [path for pid in self._pids() for path in _memory_files(pid)]
        return len(self._files)

    def bytes(self) -> int:
        """The sum at one moment.

        The files are read one after another, and memory may move between two of them meanwhile. So they are read
        forwards and backwards: memory that moved one way is counted once by the smaller reading of each file.
        """
        forwards = [_allocated(path) for path in self._files]
        backwards = [_allocated(path) for path in reversed(self._files)][::-1]
        return sum(map(min, forwards, backwards))


def _memory_files(pid: int) -> list[Path]:
    found = []
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            if str(path.readlink()).split(" ")[0] == MEMORY_FILE:
                found.append(path)
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except (FileNotFoundError, ProcessLookupError):
        return 0


@dataclass
class Watch:
    """Reads the ledger every `interval` seconds in a thread of its own; a context manager."""

    ledger: _core.Ledger
    interval: float = 0.05
    show: Callable[[DeviceView], None] | None = None
    kernel: Callable[[], int] | None = None
    samples: int = 0
    over_budget: int = 0
    peak_sum: int = 0
    peak_kernel: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    error: ElasticKVError | None = None

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elastickv-demo", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._look(read_device(self.ledger))
            except ElasticKVError as error:
                self.error = error
                return

    def _by_kernel(self, capacity: int) -> int:
        """What the kernel says; a reading over the capacity counts only if it stands when it is taken again."""
        if self.kernel is None:
            return 0
        reading = self.kernel()
        return reading if reading <= capacity else min(self.kernel() for _ in range(RETRIES))

    def _look(self, view: DeviceView) -> None:
        self.samples += 1
        for tenant in view.tenants:
            self.peaks[tenant.name] = max(self.peaks.get(tenant.name, 0), tenant.held)
        self.peak_sum = max(self.peak_sum, view.held)
        by_kernel = self._by_kernel(view.capacity)
        self.peak_kernel = max(self.peak_kernel, by_kernel)
        self.over_budget += view.held > view.capacity or by_kernel > view.capacity
        if self.show is not None:
            self.show(view)


def queued_by_static_split(served: Iterable[Served], engines: Sequence[str], budget: int, token_bytes: int) -> int:
    """How many requests would have waited for memory if each engine had an equal, fixed part of the budget.

    The requests' own times are kept: in the order of their arrival each takes its tokens' bytes for as long as it
    took here, and one that does not fit in its engine's part beside those that run is counted and left out.
    """
    part = budget // len(engines)
    queued = 0
    for name in engines:
        running: list[tuple[float, int]] = []
        for request in sorted((one for one in served if one.engine == name), key=lambda one: one.began):
            running = [entry for entry in running if entry[0] > request.began]
            need = request.tokens * token_bytes
            if sum(size for _, size in running) + need > part:
                queued += 1
            else:
                running.append((request.ended, need))
    return queued

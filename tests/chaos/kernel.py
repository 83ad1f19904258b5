"""What the kernel says of the tenants' processes: pages that are really there, and who is stopped or gone."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from elastickv.demo.watch import KernelMemory

STOP_S = 5.0


def allocated(pids: Iterable[int]) -> int:
    """Bytes allocated in the memory files of these processes, each read at a moment of its own."""
    fixed = list(pids)
    memory = KernelMemory(lambda: fixed)
    memory.find()
    return memory.bytes()


def mapped(pid: int) -> int:
    """Bytes of elastic memory in the process's page tables (smaps)."""
    total, ours = 0, False
    try:
        text = Path(f"/proc/{pid}/smaps").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in text.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = "/memfd:elastickv (" in line or line.endswith("/memfd:elastickv")
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def state(pid: int) -> str:
    """The letter of /proc/PID/stat; "X" for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def send(pid: int, number: int) -> None:
    """A signal to a process that may have gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def standing_still(pids: Iterable[int], already: Iterable[int] = ()) -> Iterator[None]:
    """All processes stopped at one moment; those in `already` were stopped before and stay so."""
    moving = [pid for pid in pids if pid not in set(already)]
    try:
        for pid in moving:
            send(pid, signal.SIGSTOP)
        until = time.monotonic() + STOP_S
        while any(state(pid) not in "TtXZ" for pid in moving) and time.monotonic() < until:
            time.sleep(0.0005)
        yield
    finally:
        for pid in moving:
            send(pid, signal.SIGCONT)

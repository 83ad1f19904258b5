"""Processes that send a load together, each its share: a client that is slower than its servers measures itself."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType

from benchmarks.common.client import Outcome, Request, send

READY_S = 60.0
SLACK_S = 30.0
CORES_EACH = 3
"""Of the machine, for one sender: the engines need the others."""
MOST = 8


def usual(requests: int) -> int:
    """How many senders suit this machine and a load of so many requests; with one, the caller sends by itself."""
    return max(1, min(MOST, (len(os.sched_getaffinity(0)) - 2) // CORES_EACH, requests // 8))


class Senders:
    """A context manager; once entered they wait for `send`. `processes`: 1 sends in the caller's own process."""

    def __init__(self, load: Sequence[Request], deadline: float, processes: int = 0) -> None:
        self._load, self._deadline = load, deadline
        self._count = processes or usual(len(load))
        self._most = max((one.arrival for one in load), default=0.0) + deadline + SLACK_S
        self._processes: list[tuple[BaseProcess, Connection]] = []

    def __enter__(self) -> Senders:
        if self._count > 1:
            try:
                self._start()
            except BaseException:
                self._end()
                raise
        return self

    def _start(self) -> None:
        # Not forked: the caller may have threads.
        context = multiprocessing.get_context("spawn")
        for number in range(self._count):
            ours, theirs = context.Pipe()
            share = self._load[number :: self._count]
            process = context.Process(target=_work, args=(theirs, share, self._deadline), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))
        self._answers(time.monotonic() + READY_S)

    def send(self, start: float) -> list[Outcome]:
        """One for each request, in their order. `start`: of time.monotonic(), which all processes share."""
        if not self._processes:
            return send(self._load, self._deadline, start)
        for _, connection in self._processes:
            with suppress(OSError):  # that of a process that has ended; _answers says so
                connection.send(start)
        shares = self._answers(start + self._most)
        return [shares[index % self._count][index // self._count] for index in range(len(self._load))]

    def _answers(self, until: float) -> list[list[Outcome]]:
        """What each process says next; RuntimeError as soon as one has ended, or at `until`."""
        waiting = {connection: number for number, (_, connection) in enumerate(self._processes)}
        found: list[list[Outcome]] = [[] for _ in waiting]
        while waiting:
            ready = wait(list(waiting), max(0.0, until - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{len(waiting)} processes that send requests did not answer in time")
            for connection in [one for one in waiting if one in ready]:
                number = waiting.pop(connection)
                try:
                    found[number] = connection.recv()
                except (EOFError, OSError):
                    process = self._processes[number][0]
                    process.join(5)
                    raise RuntimeError(f"a process that sends requests ended with code {process.exitcode}") from None
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        for process, connection in self._processes:
            connection.close()
            process.kill()
            process.join(20)


def _work(connection: Connection, load: Sequence[Request], deadline: float) -> None:
    # It ends soon anyway, and a pause to look for garbage would be in the latencies.
    gc.disable()
    connection.send([])
    try:
        start = connection.recv()
    except (EOFError, OSError):
        return
    # Nothing more is said to it: the end of the pipe means that the caller is gone.
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    connection.send(send(load, deadline, start))


def _end_with(connection: Connection) -> None:
    with suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)

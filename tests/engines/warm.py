"""Runs files as `python FILE` does, with modules that are imported already: an engine's take 15 s in each process.

    python warm.py SOCKET MODULE [MODULE ...]      imports the modules, then waits for orders on the socket

A run is a fork of this process, in a session of its own, with the environment and files that it was ordered with, and
ends as an interpreter ends. It has spare forks for what its multiprocessing spawns. Whatever else it starts is a new
interpreter as always.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final

ORDER_BYTES: Final = 1 << 17
READY: Final = b"ready"
SPAWNED: Final = "--multiprocessing-fork"
LOW: Final = 100
"""Descriptors below it are left for the numbers that an order asks for."""
IMPORT_SECONDS: Final = 180.0
FORK_SECONDS: Final = 30.0


class Process:
    """A run, as far as a subprocess.Popen of it would be used. Not thread-safe."""

    def __init__(self, pid: int, status: IO[bytes], stdin: IO[str]) -> None:
        self.pid = pid
        self.stdin: IO[str] | None = stdin
        self._status = status
        self._code: int | None = None

    def poll(self) -> int | None:
        return self._look(0.0)

    def wait(self, timeout: float) -> int:
        """Its exit code, a signal's as -N. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        code = self._look(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return code

    def _look(self, seconds: float) -> int | None:
        if self._code is None:
            line = _line(self._status, seconds)
            if line is None:
                return None
            self._code = int(line)
            self._status.close()
        return self._code


class Warm:
    """A process that has imported `modules` with `environment` and runs files. Not thread-safe."""

    def __init__(self, modules: Sequence[str], environment: dict[str, str]) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        self._socket.settimeout(IMPORT_SECONDS)
        if self._socket.recv(16) != READY:
            raise RuntimeError(f"the process that imports {', '.join(modules)} ended with {self._process.wait(10)}")

    def start(
        self, command: Sequence[str], environment: dict[str, str], output: IO[bytes], passed: int, spares: int
    ) -> Process:
        """Runs the file command[0]; `passed` is a descriptor that has the same number there, `spares` how many forks
        wait for what it spawns."""
        inward, outward = os.pipe()
        status, teller = os.pipe()
        order = {
            "argv": list(command),
            "environment": environment,
            "numbers": [0, 1, 2, passed],
            "spares": spares,
        }
        try:
            _send(self._socket, order, [inward, output.fileno(), output.fileno(), passed, teller])
        finally:
            os.close(inward)
            os.close(teller)
        told = os.fdopen(status, "rb", buffering=0)
        pid = _line(told, FORK_SECONDS)
        if pid is None:
            raise RuntimeError(f"no process came of {command} within {FORK_SECONDS:.0f} s")
        return Process(int(pid), told, os.fdopen(outward, "w"))


def _line(file: IO[bytes], seconds: float) -> bytes | None:
    """The next line of a pipe, b"-9" at its end: who should have written it was killed."""
    if not select.select([file], [], [], seconds)[0]:
        return None
    return file.readline() or b"-9"


def _send(channel: socket.socket, order: dict[str, Any], descriptors: Sequence[int]) -> None:
    socket.send_fds(channel, [json.dumps(order).encode()], list(descriptors))


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """An order and its descriptors; None: whoever gave orders is gone."""
    message, received, _, _ = socket.recv_fds(channel, ORDER_BYTES, 16)
    return (json.loads(message), [_raise(descriptor) for descriptor in received]) if message else None


def _raise(descriptor: int) -> int:
    """The same file under a number that no order asks for."""
    raised = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, LOW)
    os.close(descriptor)
    return raised


def _pair() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return tuple(socket.socket(fileno=_raise(end.detach())) for end in ends)  # type: ignore[return-value]


def _become(order: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Takes the order's environment and descriptors, each under its number."""
    for descriptor, number in zip(descriptors, order["numbers"], strict=False):
        os.dup2(descriptor, number, inheritable=True)
    for descriptor in descriptors:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = order["argv"]


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Forks for each order. Returns in the forks, with what they are to run, and at the end, with None."""
    while (received := _receive(channel)) is not None:
        order, descriptors = received
        status = descriptors.pop()
        if os.fork() == 0:
            channel.close()
            return _watch(order, descriptors, status)
        for descriptor in (*descriptors, status):
            os.close(descriptor)
    return None


def _watch(order: dict[str, Any], descriptors: Sequence[int], status: int) -> dict[str, Any]:
    """Forks the run, and tells its process id and, later, how it ended. Returns in the run."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        os.setsid()
        multiprocessing.util.spawnv_passfds = _spawner(  # type: ignore[assignment]
            [_spare(descriptors) for _ in range(order["spares"])]
        )
        _become(order, descriptors)
        return order
    for descriptor in descriptors:
        os.close(descriptor)
    os.write(status, b"%d\n" % pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, b"%d\n" % code)
    os._exit(0)


def _spare(held: Sequence[int]) -> tuple[int, socket.socket]:
    """A fork that waits to be what multiprocessing spawns: its process id and where it takes its order."""
    ours, theirs = _pair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    ours.close()
    for descriptor in held:
        os.close(descriptor)
    received = _receive(theirs)
    theirs.close()
    if received is None:
        os._exit(0)
    order, descriptors = received
    _become(order, descriptors)
    os.sched_setaffinity(0, order["cores"])
    os.chdir(order["place"])
    exec(order["code"], {"__name__": "__main__"})  # what multiprocessing gives a new interpreter after -c
    sys.exit(0)


def _spawner(spares: list[tuple[int, socket.socket]]) -> Callable[[Any, Any, Any], int]:
    new_interpreter = multiprocessing.util.spawnv_passfds

    def spawnv_passfds(path: Any, args: Any, passfds: Any) -> int:
        words = [os.fsdecode(word) for word in args]
        if SPAWNED not in words or not spares:
            return new_interpreter(path, args, passfds)
        pid, channel = spares.pop(0)
        numbers = [0, 1, 2, *sorted(map(int, passfds))]
        order = {
            "argv": ["-c", *words[words.index(SPAWNED) :]],
            "code": words[words.index("-c") + 1],
            "environment": dict(os.environ),
            "numbers": numbers,
            "cores": sorted(os.sched_getaffinity(0)),
            "place": str(Path.cwd()),
        }
        _send(channel, order, numbers)
        channel.close()
        return pid

    return spawnv_passfds


def main() -> None:
    channel = socket.socket(fileno=_raise(int(sys.argv[1])))
    kept = [os.open(os.devnull, os.O_RDONLY)]
    while kept[-1] < LOW:
        kept.append(os.dup(kept[-1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    for descriptor in kept:
        os.close(descriptor)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1 or "elastickv" in sys.modules:
        sys.exit(f"importing {sys.argv[2:]} has begun {threads - 1} threads or imported elastickv: no state to fork")
    importlib.import_module("setproctitle").getproctitle()  # looks for its place now: not without an environment
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    channel.send(READY)
    order = serve(channel)
    if order is not None:
        path = [str(Path(order["argv"][0]).parent), *order["environment"].get("PYTHONPATH", "").split(os.pathsep)]
        sys.path[:] = [*path, *(folder for folder in sys.path[1:] if folder not in path)]
        runpy.run_path(order["argv"][0], run_name="__main__")


if __name__ == "__main__":
    main()

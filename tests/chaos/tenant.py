"""A tenant of the chaos run: takes, fills, checks, caches and gives back blocks until it is told to end, or dies."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import random
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import elastickv
from chaos.blocks import Blocks
from chaos.choices import TenantSpec, stream
from elastickv import _core
from elastickv.errors import AccessDenied, ElasticKVError, IntegrityError

BEAT_S = 0.5
SETTLE_S = 10.0
CLONE_NEWTIME = 0x80
PR_SET_PDEATHSIG = 1


def footprint() -> dict[str, int]:
    """What must not grow in a process: descriptors, threads, and bytes of its own (the elastic memory is none)."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "fds": len(os.listdir("/proc/self/fd")) - 1,  # noqa: PTH208 - its own descriptor is one of them
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "anon": int(lines["RssAnon"].split()[0]) * 1024,
    }


class Worker:
    """The loop of one life. What it sends: ready, refused, beat, quiet, answer, failed."""

    def __init__(self, spec: TenantSpec, pipe: Connection) -> None:
        self.spec = spec
        self.pipe = pipe
        self.choose = stream(spec.seed, "work", spec.name, spec.life)
        self.ops = self.misses = 0
        self.longest = 0.0
        self.quiet = False
        self.done = False
        self.beat_at = 0.0

    def run(self) -> None:
        """Until told to end. Whatever is not an answer is sent as a failure."""
        for point, action, after in self.spec.faults:
            _core.set_fault(point, action, after)
        try:
            device = elastickv.open_device("host", capacity=self.spec.capacity, directory=self.spec.directory)
            member = device.join(
                self.spec.name,
                floor=self.spec.floor,
                weight=self.spec.weight,
                max_extent=self.spec.extent,
                priority=self.spec.priority,
                idle_release=0.2,
            )
            self.blocks = Blocks(member, self.spec)
        except ElasticKVError as error:
            self.pipe.send(("refused", type(error).__name__, str(error)))
            return
        self.pipe.send(("ready", os.getpid()))
        while not self.done:
            self.turn()
        self.blocks.cache.close()
        device.close()
        self.pipe.send(("ended", footprint()))

    def turn(self) -> None:
        """One command, or one operation."""
        wait = 0.05 if self.quiet else 0.0
        if self.pipe.poll(wait):
            self.obey(*self.pipe.recv())
        now = time.monotonic()
        if now >= self.beat_at:
            self.beat_at = now + BEAT_S
            beat = {"ops": self.ops, "misses": self.misses, "longest": self.longest, "used": len(self.blocks.used)}
            self.pipe.send(("beat", beat | footprint()))
            self.longest = 0.0
        if self.quiet or self.done:
            return
        self.operate()
        self.ops += 1
        self.longest = max(self.longest, time.monotonic() - now)
        time.sleep(self.spec.pace)

    def operate(self) -> None:
        """One random step, within what this life wants at most."""
        blocks, choose = self.blocks, self.choose
        kind = choose.random()
        if kind < 0.40:
            room = self.spec.most - len(blocks.used)
            n = min(room, choose.choice((1, 2, 4, 8, 24, 64)))
            if n > 0 and not blocks.take(n):
                self.misses += 1
                self.shed()
        elif kind < 0.62:
            self.give(choose.choice((1, 2, 4, 8, 24)), choose.random() < self.spec.cached_share)
        elif kind < 0.80:
            for block in choose.sample(sorted(blocks.cached.copy()), k=min(4, len(blocks.cached))):
                if len(blocks.used) < self.spec.most:
                    blocks.reuse(block)
        elif kind < 0.97:
            for block in choose.sample(sorted(blocks.used), k=min(4, len(blocks.used))):
                blocks.verify(block)
        elif kind < 0.995:
            blocks.cache.stats()
        else:
            self.give(len(blocks.used), choose.random() < 0.5)
            time.sleep(choose.choice((0.05, 0.4)))  # long enough for the idle clock

    def shed(self) -> None:
        """None now: an engine would preempt somebody of its own."""
        self.give(max(1, len(self.blocks.used) // 4), False)

    def give(self, n: int, cached: bool) -> None:
        ids = sorted(self.blocks.used)
        if ids:
            self.blocks.give(self.choose.sample(ids, k=min(n, len(ids))), cached)

    def obey(self, command: str, *arguments: Any) -> None:
        """What the conductor says."""
        if command == "end":
            self.done = True
        elif command == "fault":
            point, action, after, delay_us = arguments
            _core.set_fault(point, action, after, delay_us)
        elif command == "heal":
            _core.clear_faults()
        elif command == "quiet":
            self.quiet = True
            self.settle(*arguments)
        elif command == "go":
            self.quiet = False
        elif command == "fork":
            self.pipe.send(("answer", "fork", self.fork()))

    def settle(self, number: int) -> None:
        """Checks every pattern, then waits until the books stand still; says what they are."""
        checked = self.blocks.verify_all()
        gc.collect()
        until = time.monotonic() + SETTLE_S
        while True:
            try:
                self.blocks.cache.check_integrity()
                integrity = "ok"
                if self.blocks.cache.stats()["transit"] == 0:
                    break
                integrity = "pages are still in transit"
            except IntegrityError as error:  # a lease is given back an instant after its page: ask again
                integrity = str(error)
            if time.monotonic() >= until:
                break
            time.sleep(0.01)
        report = {"integrity": integrity, "checked": checked, "leaked": _core.leaked_calls()}
        self.pipe.send(("quiet", number, report | footprint()))

    def fork(self) -> str:
        """A forked child that goes on as if it were the tenant; "ok" when it can change nothing."""
        child = os.fork()
        if child == 0:
            os._exit(pretend(self.blocks))
        until = time.monotonic() + 15
        while time.monotonic() < until:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return "ok" if code == 0 else f"the child ended with {code}"
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "the child hung"


def pretend(blocks: Blocks) -> int:
    """In a forked child: every call is refused or does nothing. 0 when all of them did."""
    faulthandler.dump_traceback_later(10, exit=True)
    try:
        if blocks.cache.alloc(1) is not None:
            return 10
    except AccessDenied:
        pass  # an order of the parent's was about to be delivered: the child may not
    for call in (lambda: blocks.cache.free(list(blocks.used)[:1]), blocks.cache.check_integrity):
        try:
            call()
        except ElasticKVError:
            continue
        return 12
    blocks.cache.close()
    return 0


def with_clock_offset(seconds: int) -> None:
    """Goes on in a child whose monotonic clock is shifted; this process becomes a shell that ends as the child does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWTIME) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWTIME)")
    Path("/proc/self/timens_offsets").write_text(f"monotonic {seconds} 0\n", encoding="ascii")
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def main(spec: TenantSpec, pipe: Connection) -> None:
    """The process. An exit code other than 0 is a failure, and so is the message before it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    random.seed(0)
    if spec.clock_offset:
        with_clock_offset(spec.clock_offset)
    try:
        Worker(spec, pipe).run()
    except (BrokenPipeError, EOFError):
        sys.exit(3)  # the conductor is gone
    except Exception:  # noqa: BLE001 - the border of the process: the conductor must hear of it, whatever it is
        pipe.send(("failed", traceback.format_exc()))
        sys.exit(1)

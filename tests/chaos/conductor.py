"""The conductor: starts the processes, does one action after another, and hears what becomes of it.

It has one thread and belongs to no tenant. What step k does follows from the seed and k alone; when things happen is
the machine's choice, and the log says when they did.
"""

from __future__ import annotations

import heapq
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from chaos import actions, checks, kernel, monitor, operator, rogue, sockets, tenant
from chaos.choices import Options, tenant_spec
from chaos.life import Life, start
from chaos.monitor import Seen
from chaos.quiet import quiet_point
from chaos.report import Report
from chaos.tenant import footprint

HANG_S = 45.0
"""A tenant that says nothing for so long hangs; beats come every half second, the ledger's deadline is 2 s."""
QUIET_STEPS = 40
START_S = 60.0
ENOUGH = 20
SAMPLE_S = 5.0
ALWAYS_FAIR = {"Unavailable", "DeadlineExceeded"}
"""What a newcomer may be told at any time: everything is in use, or somebody sits on the lock."""


class Conductor:
    """One run."""

    def __init__(self, options: Options, report: Report) -> None:
        self.options = options
        self.report = report
        self.names = [f"tenant{i}" for i in range(options.tenants)]
        self.steady = set(self.names[: options.tenants // 2]) if options.soak else set()
        self.lives: dict[str, Life] = {}
        self.starts = 0
        self.kills = 0
        self.step_number = 0
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.holder: Life | None = None
        """Who is stopped with the ledger's lock, or is about to be."""
        self.next_faults: dict[str, tuple[tuple[str, str, int], ...]] = {}
        self.next_clock: dict[str, int] = {}
        self.samples: dict[str, list[tuple[float, dict[str, int]]]] = {}
        self.sampled = 0.0
        self.monitor, self.eye = start(monitor.main, options.directory, options.capacity)
        self.operator, self.phone = start(operator.main, str(options.directory))
        self.operator_doomed = False
        self.seen: Seen | None = None
        self.server: Any = None
        self.server_doomed = False
        self.others: list[Any] = []

    # running

    def run(self) -> None:
        """Until the time or the kills are reached; ends with a quiet point and everybody's departure."""
        for name in self.names:
            self.spawn(name)
        if self.options.control:
            self._start_server()
            self.others.append(start(sockets.intrude, str(self.options.directory), self.options.seed))
        if self.options.rogue:
            self.others.append(start(rogue.main, str(self.options.directory), self.options.capacity))
            self.eye.send(("born", "rogue", self.others[-1][0].pid))
        next_step = time.monotonic()
        while not self.over():
            self.pump(max(0.0, min(0.1, next_step - time.monotonic())))
            if time.monotonic() < next_step:
                continue
            self.step_number += 1
            gap = actions.step(self, self.step_number)
            if self.step_number % QUIET_STEPS == 0:
                quiet_point(self)
            next_step = time.monotonic() + gap
        if not self.hopeless():
            quiet_point(self)
        self.finish()

    def over(self) -> bool:
        """Time, kills, or enough found."""
        done = self.report.seconds >= self.options.seconds
        if self.options.kills is not None:
            done = done or self.kills >= self.options.kills
        return done or self.hopeless()

    def hopeless(self) -> bool:
        """Enough was found."""
        return len(self.report.violations) >= ENOUGH

    def finish(self) -> None:
        """Everybody leaves in peace; the monitor says what it saw."""
        for life in list(self.lives.values()):
            life.doom = "end"
            life.resume()
            life.tell("heal")
            life.tell("end")
        until = time.monotonic() + START_S
        while self.lives and time.monotonic() < until:
            self.pump(0.1, respawn=False)
        for life in self.lives.values():
            self.report.violation(f"{life.name} did not end within {START_S:.0f} s")
            life.kill("end")
        for process in [process for process, _ in self.others] + ([self.server] if self.server else []):
            process.kill()
        self.eye.send(("end",))
        while self.seen is None and self.eye.poll(10):
            self._hear_monitor()
        self.operator.kill()
        if self.seen is None:
            self.report.violation("the monitor did not answer")
            return
        seen = {name: value for name, value in vars(self.seen).items() if name != "looked"}
        self.report.figures |= seen | {"kills": self.kills, "starts": self.starts, "steps": self.step_number}
        self.report.figures["growth"] = {who: ends for who, kept in self.samples.items() if (ends := checks.ends(kept))}
        for who, samples in self.samples.items():
            for text in checks.grows(who, samples):
                self.report.violation(text)

    # processes

    def spawn(self, name: str) -> None:
        """The next life of a tenant."""
        faults = self.next_faults.pop(name, ())
        spec = tenant_spec(self.options, name, self.starts, faults, self.next_clock.pop(name, 0), name in self.steady)
        self.starts += 1
        life = self.lives[name] = Life(spec, tenant.main)
        self.eye.send(("born", name, life.pid))
        for point, action, _ in faults:
            if action == "kill":
                life.doom = f"at {point}"
                actions.kill_later(self, life)
        self.report.line(f"start {name} life {spec.life} as {life.pid} floor {spec.floor} faults {faults}")

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Does something later, between two messages."""
        heapq.heappush(self.timers, (time.monotonic() + seconds, id(what), what))

    def pump(self, seconds: float, respawn: bool = True) -> None:
        """Hears everybody for so long, and does what is due."""
        until = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            while self.timers and self.timers[0][0] <= now:
                heapq.heappop(self.timers)[2]()
            pipes: dict[Any, Life] = {life.pipe: life for life in self.lives.values()}
            ends = {life.pidfd: life for life in self.lives.values() if life.pidfd >= 0}
            due = self.timers[0][0] if self.timers else until
            rest = max(0.0, min(until, due) - now)
            for one in wait([*pipes, *ends, self.eye, self.phone], rest):
                if one is self.eye:
                    self._hear_monitor()
                elif one is self.phone:
                    self._hear_operator()
                elif one in pipes:
                    self._hear(pipes[one])
            for life in list(self.lives.values()):
                if life.ended():
                    self._bury(life, respawn)
            self._look_after()
            if time.monotonic() >= until:
                return

    def _hear(self, life: Life) -> None:
        try:
            while life.pipe.poll():
                self._take(life, *life.pipe.recv())
        except (EOFError, ConnectionResetError):
            if life.pidfd < 0:  # it had ended before it could be watched
                self._bury(life, True)

    def _take(self, life: Life, kind: str, *values: Any) -> None:
        life.heard = time.monotonic()
        if kind == "ready":
            born = life.pid
            life.is_ready(values[0])
            if life.pid != born:
                self.eye.send(("born", life.name, life.pid))
        elif kind == "beat":
            self._beat(life, values[0])
        elif kind == "quiet":
            life.quiet = values[1] if values[0] == self.step_number else life.quiet
        elif kind == "answer":
            life.forking = False
            self.report.counts["forks"] += 1
            if values[1] != "ok":
                self.report.violation(f"{life.name}: a forked child acted as its parent: {values[1]}")
        elif kind == "refused":
            life.refused = True
            self.report.done("refused starts", f"{life.name}: {values[0]}: {values[1]}")
            fair = ALWAYS_FAIR | actions.fair_refusals(self)
            if not life.may_refuse and values[0] not in fair:
                self.report.violation(f"{life.name} could not start: {values[0]}: {values[1]}")
        elif kind == "failed":
            self.report.violation(f"{life.name} life {life.spec.life} failed:\n{values[0]}")

    def _beat(self, life: Life, beat: dict[str, Any]) -> None:
        self.report.counts["operations"] += beat["ops"] - life.ops
        self.report.counts["none now"] += beat["misses"] - life.misses
        life.ops, life.misses, life.used = beat["ops"], beat["misses"], beat["used"]
        self.report.most("operation_s", beat["longest"])
        if life.spec.steady:
            kept = self.samples.setdefault(f"{life.name} life {life.spec.life}", [])
            if not kept or self.report.seconds - kept[-1][0] >= SAMPLE_S:
                kept.append((self.report.seconds, {what: beat[what] for what in ("fds", "threads", "tasks", "anon")}))

    def _bury(self, life: Life, respawn: bool) -> None:
        """Its process has ended."""
        ended = time.monotonic()
        try:
            while life.pipe.poll():
                self._take(life, *life.pipe.recv())
        except (EOFError, ConnectionResetError):
            pass  # it has said all that it will
        self.eye.send(("died", life.name, life.pid, ended))
        if life.killed_at:
            self.report.most("kill_to_end_s", ended - life.killed_at)
        if self.holder is life:
            actions.lock_is_free(self)
        code = life.bury()
        self.lives.pop(life.name)
        killed = code == -signal.SIGKILL
        if killed and life.doom:
            self.kills += 1
            self.report.done(f"killed {life.doom}", f"{life.name} life {life.spec.life} after {life.ops} operations")
        elif killed or (code != 0 and not life.doom):
            self.report.violation(f"{life.name} life {life.spec.life} ended with {code}")
        if respawn:
            pause = 0.2 if life.refused else 0.0
            self.after(pause, lambda: self.spawn(life.name))

    def _look_after(self) -> None:
        """Those who stopped at a fault point, those who hang, and the run's own footprint."""
        now = time.monotonic()
        for life in self.lives.values():
            if life.stopping_at and kernel.state(life.pid) in "Tt":
                actions.has_stopped(self, life)
            silent = now - life.heard
            if silent > HANG_S and not life.stopped and life.doom != "hang":
                kernel.send(life.pid, signal.SIGUSR1)  # its stacks go to stderr
                self.report.violation(f"{life.name} life {life.spec.life} has said nothing for {silent:.0f} s")
                life.kill("hang")
        self._look_after_server()
        if self.report.seconds - self.sampled >= SAMPLE_S:
            self.sampled = self.report.seconds
            files = len(os.listdir(self.options.directory))  # noqa: PTH208 - a count
            own = self.samples.setdefault("conductor", [])
            own.append((self.sampled, footprint() | {"files": files}))
            self.eye.send(("footprint",))

    def _hear_monitor(self) -> None:
        kind, value = self.eye.recv()
        if kind == "violation":
            self.report.violation(value)
        elif kind == "note":
            self.report.line(value)
        elif kind == "footprint":
            self.samples.setdefault("monitor", []).append((self.report.seconds, value))
        else:
            self.seen = value

    def _hear_operator(self) -> None:
        try:
            _, kind, name, outcome, took = self.phone.recv()
        except (EOFError, ConnectionResetError):
            self._replace_operator()
            return
        self.report.done(f"{kind} {outcome.split(':')[0]}", f"{name} in {took * 1000:.1f} ms")
        self.report.most(f"{kind}_s", took)
        if outcome.startswith("unexpected"):
            self.report.violation(f"operator, {kind} of {name}: {outcome}")

    def ask_operator(self, *message: object) -> None:
        """An order; one to an operator that has just died is lost."""
        try:
            self.phone.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return

    def _replace_operator(self) -> None:
        self.phone.close()
        self.operator.join(20)
        if self.operator_doomed:
            self.kills += 1
            self.report.done("killed operator", "")
        else:
            self.report.violation(f"the operator ended with {self.operator.exitcode}")
        self.operator_doomed = False
        self.operator, self.phone = start(operator.main, str(self.options.directory))

    def _start_server(self) -> None:
        self.server, self.server_pipe = start(sockets.serve, str(self.options.directory))

    def _look_after_server(self) -> None:
        if self.server is None or self.server.is_alive():
            return
        if self.server_doomed:
            self.kills += 1
            self.report.done("killed server", "")
        else:
            self.report.violation(f"the control server ended with {self.server.exitcode}")
        self.server_doomed = False
        self._start_server()

    def running(self) -> Sequence[Life]:
        """Those who work now."""
        return [life for life in self.lives.values() if life.ready and not life.stopped and not life.doom]

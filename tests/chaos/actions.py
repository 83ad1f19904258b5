"""What the conductor does: one action a step. Each choice of step k comes from the seed and k alone."""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from chaos import checks, kernel, surroundings
from chaos.choices import MIB, stream
from chaos.life import Life, start
from elastickv import _core
from elastickv.errors import DeadlineExceeded, NotFound
from elastickv.ledger import DeviceView, read_device

if TYPE_CHECKING:
    from chaos.conductor import Conductor

POINTS = [name for name, _, _ in _core.fault_points()]
RUNNING_POINTS = [
    name
    for name in POINTS
    if name.split(".")[0] in ("memory", "pool", "ledger")
    and not name.startswith(("ledger.create", "ledger.open", "ledger.attach", "ledger.join", "memory.table"))
    and name not in ("memory.rank.reserved", "ledger.lock.repair")
]
STARTING_POINTS = [name for name in POINTS if name.startswith(("ledger.join", "ledger.attach", "ledger.open"))] + [
    "ledger.lock.taken",
    "ledger.lock.release",
    "memory.table.create",
    "memory.table.open",
    "memory.rank.reserved",
    "memory.map.created",
    "pool.map.ordered",
]
FAILING_POINTS = ["ledger.lock.wait", "ledger.lease.begin", "memory.map.begin", "memory.map.created", "pool.grow.begin"]
HOLDING_POINTS = ["ledger.lock.taken", "ledger.lease.locked", "ledger.lease.granted", "ledger.lock.release"]
DOOM_S = 3.0
"""How long a tenant has to come to the fault point that shall kill it; then it is killed where it is."""
Action = Callable[["Conductor", Life, random.Random], None]


def step(conductor: Conductor, number: int) -> float:
    """One action on one tenant; the pause that follows, in seconds."""
    choose = stream(conductor.options.seed, "step", number)
    name = choose.choice(conductor.names)
    action = choose.choices([entry[0] for entry in ACTIONS], [entry[1] for entry in ACTIONS])[0]
    gap = choose.expovariate(1.0 / conductor.options.gap)
    life = conductor.lives.get(name)
    spared = name in conductor.steady and action in LETHAL
    if life is not None and life.ready and not (life.doom or life.stopped or life.stopping_at or spared):
        action(conductor, life, choose)
    return min(gap, 4 * conductor.options.gap)


def kill(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """SIGKILL, wherever it is."""
    life.kill("anywhere")


def kill_at(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """SIGKILL at a fault point, the ledger's lock held or not."""
    point, after = choose.choice(RUNNING_POINTS), choose.choice((0, 0, 1, 3, 10))
    life.doom = f"at {point}"
    life.tell("fault", point, "kill", after, 0)
    conductor.report.line(f"arm {life.name}: killed at pass {after + 1} of {point}")
    kill_later(conductor, life)


def kill_later(conductor: Conductor, life: Life) -> None:
    """It has DOOM_S to die as was ordered."""
    conductor.after(DOOM_S, lambda: life.kill("anywhere") if conductor.lives.get(life.name) is life else None)


def kill_while_starting(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """Kills it, and its next life while it joins."""
    point = choose.choice(STARTING_POINTS)
    conductor.next_faults[life.name] = ((point, "kill", 0),)
    life.kill("anywhere")
    conductor.report.line(f"arm the next {life.name}: killed at {point}")


def end(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """A departure in peace."""
    life.doom = "end"
    life.tell("end")
    conductor.report.done("ends", life.name)


def kill_the_operator(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """The one who orders a limit, or buries the dead, dies over it."""
    point = choose.choice(("ledger.limit.ordered", "ledger.lock.taken", "ledger.bury.cleared", "ledger.lock.release"))
    conductor.operator_doomed = True
    conductor.ask_operator("fault", point, "kill", 0)
    conductor.ask_operator("do", "limit", life.name, _limit(conductor, choose))
    conductor.report.line(f"arm the operator: killed at {point}")
    process = conductor.operator
    conductor.after(DOOM_S, lambda: process.kill() if process is conductor.operator else None)


def stop(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """SIGSTOP: it answers nobody. The others go on."""
    seconds = choose.uniform(0.1, 2.5)
    life.pause()
    conductor.report.done("stops", f"{life.name} for {seconds:.2f} s")
    conductor.after(seconds, lambda: life.resume() if conductor.lives.get(life.name) is life else None)


def stop_with_the_lock(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """It stops with the ledger's mutex in its hands."""
    if conductor.holder is not None:
        return
    point = choose.choice(HOLDING_POINTS)
    conductor.holder = life
    life.stopping_at = point
    life.tell("fault", point, "stop", choose.choice((0, 2, 5)), 0)
    conductor.eye.send(("blocked", True))
    conductor.report.line(f"arm {life.name}: stops at {point}")

    def lost_patience() -> None:
        if not life.stopping_at or conductor.lives.get(life.name) is not life:
            return
        if life.name not in conductor.steady:
            life.kill("anywhere")  # it may come to the point at any moment: nothing else is sure
            return
        life.stopping_at = ""
        life.tell("heal")
        conductor.after(1.0, life.resume)  # should it have come to it in between
        lock_is_free(conductor)

    conductor.after(2 * DOOM_S, lost_patience)


def has_stopped(conductor: Conductor, life: Life) -> None:
    """It stands at its point. In the end it goes on or dies, as the seed says."""
    point, life.stopping_at, life.stopped = life.stopping_at, "", True
    choose = stream(conductor.options.seed, "holder", life.spec.life)
    seconds, dies = choose.uniform(0.3, 3.0), choose.random() < 0.5 and life.name not in conductor.steady
    conductor.report.done("stops with the lock", f"{life.name} at {point} for {seconds:.2f} s, then killed: {dies}")

    def finish() -> None:
        if conductor.lives.get(life.name) is not life or conductor.holder is not life:
            return
        if dies:
            life.stopped = False
            life.kill(f"while stopped at {point}")
        else:
            life.resume()
            lock_is_free(conductor)

    conductor.after(seconds, finish)


def lock_is_free(conductor: Conductor) -> None:
    """Nobody is stopped with the mutex any more."""
    conductor.holder = None
    conductor.eye.send(("blocked", False))


def fair_refusals(conductor: Conductor) -> set[str]:
    """What a newcomer may be told now, besides what it may be told at any time."""
    return set()


def fail(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """A step fails once: an answer, not an end."""
    point = choose.choice(FAILING_POINTS)
    life.tell("fault", point, "fail", choose.choice((0, 1, 3)), 0)
    conductor.report.done("failed steps", f"{life.name} at {point}")


def delay(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """A step takes long for a while."""
    point, delay_us = choose.choice(RUNNING_POINTS), choose.choice((200, 1000, 5000))
    life.tell("fault", point, "delay", 0, delay_us)
    conductor.report.done("delays", f"{life.name} at {point}: {delay_us} us")
    conductor.after(choose.uniform(0.2, 1.0), lambda: life.tell("heal") if not life.doom else None)


def _limit(conductor: Conductor, choose: random.Random) -> int | None:
    most = conductor.options.capacity
    return choose.choice((None, most // 4, most // 3, most // 2, choose.randrange(most // 4, most)))


def limit(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """Another limit, often below what is in use."""
    conductor.ask_operator("do", "limit", life.name, _limit(conductor, choose))


def trim(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """It is asked to give back what it does not use."""
    if not hasattr(_core.Ledger, "order_trim"):
        conductor.report.skip("trims: this ledger knows none")
        return
    conductor.ask_operator("do", "trim", life.name, choose.randrange(1, 32) * MIB)


def read(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """Somebody reads the table, or wants a name forgotten that lives."""
    conductor.ask_operator("do", choose.choice(("view", "forget")), life.name, None)


def through_the_socket(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """A limit or a look by way of the control server, while others attack it."""
    kind = choose.choice(("socket limit", "socket list", "socket list"))
    conductor.ask_operator("do", kind, life.name, _limit(conductor, choose))


def kill_the_server(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """SIGKILL to the control server; the next one takes its place."""
    if conductor.server is not None:
        conductor.server_doomed = True
        conductor.server.kill()


def fork(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """It forks, and the child goes on as if it were the tenant."""
    if life.forking:
        return
    life.forking = True
    life.tell("fork")


def no_more_files(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """A running tenant's memory cannot grow for a while: its file may not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.prlimit(life.pid, resource.RLIMIT_FSIZE, (MIB, before[1]))
    except ProcessLookupError:
        return
    conductor.report.done("full memory files", life.name)

    def restore() -> None:
        if conductor.lives.get(life.name) is life and not life.ended():
            resource.prlimit(life.pid, resource.RLIMIT_FSIZE, before)

    conductor.after(choose.uniform(0.2, 1.0), restore)


def around(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """Full disks, denied locks and closed files, in a ledger directory of their own."""
    name = choose.choice(sorted(surroundings.CASES))
    place = Path(conductor.options.directory).parent / f"case-{conductor.step_number}"
    process, pipe = start(surroundings.main, name, place)
    answered = pipe.poll(30)
    said = pipe.recv()[1] if answered else "no answer within 30 s"
    process.join(10)
    shutil.rmtree(place, ignore_errors=True)
    conductor.report.done("surroundings", f"{name}: {said}")
    if said.startswith("skipped: "):
        conductor.report.skip(said.removeprefix("skipped: "))
    elif said != "ok":
        conductor.report.violation(f"{name}: {said}")


def clock(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """Its next life has another monotonic clock than everybody else."""
    if os.geteuid() != 0 or not Path("/proc/self/timens_offsets").exists():
        conductor.report.skip("clock jumps: a time namespace needs root and Linux 5.6")
        return
    seconds = choose.choice((-600, 3600, 86400))
    conductor.next_clock[life.name] = seconds if time.monotonic() + seconds > 60 else 3600
    life.kill("for another clock")


def freeze(conductor: Conductor, life: Life, choose: random.Random) -> None:
    """Everybody stands still: the kernel's figures at one moment, beside the ledger's."""
    lives = [one for one in conductor.lives.values() if not one.ended()]
    stopped = [one.pid for one in lives if one.stopped or one.stopping_at]
    with kernel.standing_still([one.pid for one in lives], stopped):
        held = {one.name: kernel.allocated([one.pid]) for one in lives}
        view = _view_of_the_stopped(conductor)
    conductor.report.most("frozen_bytes", sum(held.values()))
    found = checks.capacity_holds("memory at one moment", sum(held.values()), conductor.options.capacity)
    conductor.report.counts["frozen looks"] += 1
    if view is not None:
        conductor.report.counts["frozen looks with the ledger"] += 1
        for tenant in view.living:
            by_kernel = held.get(tenant.name, 0)
            if tenant.pid in {one.pid for one in lives}:
                found += checks.pages_are_leased(tenant.name, by_kernel, tenant.leased)
    for text in found:
        conductor.report.violation(text)


def _view_of_the_stopped(conductor: Conductor) -> DeviceView | None:
    """None when one of them stands there with the lock."""
    try:
        return read_device(_core.Ledger.open(str(conductor.options.directory), "host", deadline_ms=20))
    except (DeadlineExceeded, NotFound):
        return None


ACTIONS: list[tuple[Action, int]] = [
    (kill, 34),
    (kill_at, 22),
    (kill_while_starting, 6),
    (kill_the_operator, 2),
    (end, 3),
    (stop, 4),
    (stop_with_the_lock, 2),
    (fail, 5),
    (delay, 5),
    (limit, 10),
    (trim, 4),
    (read, 2),
    (through_the_socket, 6),
    (kill_the_server, 1),
    (fork, 3),
    (no_more_files, 2),
    (around, 2),
    (clock, 2),
    (freeze, 8),
]
LETHAL = (kill, kill_at, kill_while_starting, end, clock)

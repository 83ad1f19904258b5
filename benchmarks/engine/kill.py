"""SIGKILL of one of two engines under load, again and again: what the other one loses, and when the memory is back.

    python benchmarks/engine/kill.py [--small]

The survivor first answers its requests alone: these answers are what it must give later. Then, in turns, the other
engine is under load too and lives, or is killed in the midst of it. Measured are the survivor's failed requests,
answers that differ, and latency; and the time from the signal until the ledger counts nothing for the dead one, and
until the kernel has ended every thread of it, and with that taken its memory back.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import load, options, schedule
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.load import Background, Load
from benchmarks.common.result import Result, Row, Target
from benchmarks.common.schedule import Shape
from benchmarks.common.servers import MIB, Fleet, ended, processes
from benchmarks.common.stats import percentile
from elastickv.demo.engines import Engine
from elastickv.errors import NotFound

FULL = {
    **options.ENGINE,
    "shape": "512+128",
    "times": 20,
    "standby": 3,
    "requests": 32,
    "rate": 8.0,
    "kv_size": "12GiB",
    "request_deadline": 120.0,
    "minutes": 60.0,
    "seed": 0,
}
SMALL = {
    **options.SMALL,
    "shape": "64+32",
    "times": 1,
    "standby": 1,
    "requests": 10,
    "rate": 5.0,
    "kv_size": "4MiB",
}
ABOUT = {
    **options.ABOUT,
    "shape": "tokens of prompt+answer",
    "times": "kills",
    "standby": "victims that are started at the same moment; each is idle until it is its turn",
    "requests": "of the survivor in a round; the victim has as many at once",
    "rate": "arrivals a second at the survivor",
    "kv_size": "KV memory of both",
    "request_deadline": "seconds that a request may take",
    "minutes": "after which no further kill is begun",
}
NONE = Target("with", "most", 0)
SOON = Target("with", "most", 1.0)
GIVE_UP_S = 30.0
FILLED_S = 60.0


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    result = Result("engine/kill", chosen.engine, chosen.small, chosen.device, options.settings(chosen))
    result.sides = {"with": "neighbour killed", "without": "neighbour lives"}
    with Fleet(chosen.engine, chosen.device, chosen.model, chosen.kv_size, chosen.start_deadline) as fleet:
        bench = Kills(fleet, chosen, result)
        bench.measure()
        bench.rows()
    result.write(chosen.output)
    return 0


class Kills:
    """A survivor, and victims one after another."""

    def __init__(self, fleet: Fleet, chosen: argparse.Namespace, result: Result) -> None:
        self.fleet, self.chosen, self.result = fleet, chosen, result
        self.shape = Shape.parse(chosen.shape)
        self.expected: list[list[int]] = []
        self.loads: dict[str, list[Load]] = {"with": [], "without": []}
        self.changed = {"with": 0, "without": 0}
        self.back: dict[str, list[float]] = {"ledger": [], "kernel": []}

    def measure(self) -> None:
        until = time.monotonic() + 60 * self.chosen.minutes
        # On a GPU the answers depend on the batch unless the kernels are told otherwise.
        settings, arguments = ({}, ()) if self.fleet.device == "host" else self.fleet.kind.exact
        most = sum(self.shape) + 16
        survivor = Spec("left", True, 0, False, self.chosen.seqs, most, {}, arguments, settings)
        (left,) = self.fleet.up(survivor)
        alone = load.run(self.asked(left, self.arrivals()), self.chosen.request_deadline)
        self.result.account("without", "alone", alone)
        self.expected = [one.tokens for one in alone.outcomes]
        victims: list[Engine] = []
        for number in range(self.chosen.times):
            if time.monotonic() > until:
                self.result.note(f"{number} kills of {self.chosen.times}: --minutes was over")
                break
            if not victims:
                names = range(number, min(number + self.chosen.standby, self.chosen.times))
                victims = self.fleet.up(*(replace(survivor, name=f"right-{name}") for name in names))
            right = victims.pop(0)
            for side in ("without", "with") if number % 5 == 0 else ("with",):
                self.round(left, right, side, number)

    def round(self, left: Engine, right: Engine, side: str, number: int) -> None:
        victims = self.asked(right, schedule.at_once(self.chosen.requests))
        with Background(self.asked(left, self.arrivals()), self.chosen.request_deadline) as survivor:
            with Background(victims, self.chosen.request_deadline) as doomed:
                if side == "with":
                    self.kill(right, survivor)
            fate = doomed.wait()
            done = survivor.wait()
        if side == "without":
            self.result.account("without", "neighbour", fate)
        elif not fate.failures:
            self.result.note(f"round {number}: the neighbour had answered everything before it was killed")
        self.result.account(side, f"survivor, round {number}, {self.result.sides[side]}", done)
        self.loads[side].append(done)
        answers = zip(done.outcomes, self.expected, strict=True)
        self.changed[side] += sum(one.ok and one.tokens != expected for one, expected in answers)
        self.result.samples.setdefault(f"survivor, {self.result.sides[side]}", []).append(done.samples())

    def kill(self, right: Engine, survivor: Background) -> None:
        """Kills it once it holds a few blocks in use, and watches its memory go."""
        read = self.fleet.ledger_reader(right.name)
        pids = processes(right)
        waited = time.monotonic()
        while read().usage.used <= 2 * read().page_bytes or time.monotonic() < survivor.start:
            if time.monotonic() > waited + FILLED_S:
                raise RuntimeError(
                    f"{right.name} used no memory within {FILLED_S:.0f} s of its load's start:\n{right.tail()}"
                )
            time.sleep(0.002)
        held = read().held
        began = time.monotonic()
        self.fleet.kill(right.name)
        found: dict[str, float] = {}
        wanted = {"ledger", "kernel"}
        while wanted - found.keys() and time.monotonic() < began + GIVE_UP_S:
            if "ledger" not in found and gone(read):
                found["ledger"] = time.monotonic() - began
            if "kernel" not in found and all(ended(pid) for pid in pids):
                found["kernel"] = time.monotonic() - began
            time.sleep(0.001)
        for by in wanted:
            self.back[by].append(found.get(by, float("inf")))
        self.result.samples.setdefault("memory back, s", []).append({"held MiB": held / MIB, **found})
        self.fleet.reap(right.name)

    def arrivals(self) -> list[float]:
        return schedule.poisson(self.chosen.rate, self.chosen.requests, self.chosen.seed)

    def asked(self, server: Engine, arrivals: list[float]) -> list[load.Request]:
        seed = self.chosen.seed + (server.name != "left")
        return self.fleet.requests(server, arrivals, self.shape, seed)

    def rows(self) -> None:
        add = self.result.rows.append
        lost = {side: float(sum(len(one.failures) for one in loads)) for side, loads in self.loads.items()}
        add(Row("kills", "", float(len(self.loads["with"])), None))
        add(Row("requests that the other engine lost", "", lost["with"], lost["without"], NONE))
        add(Row("answers of the other engine that changed", "", self.changed["with"], self.changed["without"], NONE))
        for by, seconds in self.back.items():
            if seconds:
                add(Row(f"memory back by the {by}, slowest", "s", max(seconds), None, SOON))
                add(Row(f"memory back by the {by}, median", "s", percentile(seconds, 50), None))
        for name, of in (("TTFT", Load.ttft), ("TPOT", Load.tpot)):
            values = {side: [1e3 * one for done in loads for one in of(done)] for side, loads in self.loads.items()}
            p99 = {side: percentile(series, 99) if series else None for side, series in values.items()}
            add(Row(f"the other engine's {name} P99", "ms", p99["with"], p99["without"]))


def gone(read: load.Any) -> bool:
    """The ledger counts nothing for it, or has forgotten it."""
    try:
        tenant = read()
    except NotFound:
        return True
    return not tenant.alive and not tenant.held


if __name__ == "__main__":
    sys.exit(main())

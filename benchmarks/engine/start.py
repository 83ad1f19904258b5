"""Engines that start at the same moment, and one that starts while another serves at full load.

    python benchmarks/engine/start.py [--small]

Together: all engines at once, managed and plain, whether each of them comes up and after how many seconds. Beside a
busy one: the same requests, near the most that one engine serves, while a second engine starts and while none does; the
busy one's P99 of TTFT and TPOT with the start over that without (a result of its own, start_beside.json). The same with
plain engines is the control: a start loads weights and warms kernels up, and the busy one feels that in any case. What
has been measured is written at once, for the control may be cut off with the machine.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import load, options, schedule
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.load import Background, Load
from benchmarks.common.result import Result, Row, Target
from benchmarks.common.schedule import Shape
from benchmarks.common.servers import Fleet, plain_twin, try_ready
from benchmarks.common.stats import paired_ratio, percentile
from elastickv.demo.engines import Engine

FULL = {
    **options.ENGINE,
    "engines": 3,
    "shape": "512+128",
    "saturation_requests": 384,
    "share": 0.8,
    "repeats": 2,
    "together": 1,
    "control": 1,
    "kv_size": "18GiB",
    "weights_size": "0",
    "settings": "",
    "request_deadline": 300.0,
    "seed": 0,
}
SMALL = {
    **options.SMALL,
    "engines": 2,
    "shape": "32+16",
    "saturation_requests": 12,
    "repeats": 1,
    "kv_size": "4MiB",
    "weights_size": "8MiB",
    "request_deadline": 120.0,
}
ABOUT = {
    **options.ABOUT,
    "engines": "that start at the same moment",
    "shape": "tokens of prompt+answer",
    "saturation_requests": "at once, to find the most that one engine serves",
    "share": "of that, which the busy engine is given",
    "together": "1: that many at the same moment; 0: only the start beside a busy engine",
    "control": "1: the start beside a busy engine is also measured with plain ones",
    "kv_size": "KV memory of all engines together",
    "weights_size": "room for an engine's weights; on a GPU elastickv finds that out by itself",
    "settings": "more of elastickv for each engine, as ELASTICKV_STOCK=0,ELASTICKV_LOG=debug",
    "request_deadline": "seconds that a request may take",
}
CALM = Target("ratio", "most", 1.1)
LONGEST_S = 300.0
"""Of the load beside which an engine starts."""
CLOCK = re.compile(r"\b(\d\d):(\d\d):(\d\d)\b")
SAID = 400
"""Lines of a log that a result keeps at most, and characters of a line."""


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    settings = options.settings(chosen)
    together = Result("engine/start", chosen.engine, chosen.small, chosen.device, settings)
    beside = Result("engine/start_beside", chosen.engine, chosen.small, chosen.device, settings)
    beside.sides = {"with": "another starts", "without": "none starts"}
    # On a GPU elastickv finds out by itself what is there; on the host it is told, KV memory and weights.
    capacity = chosen.kv_size + (chosen.engines + 1) * chosen.weights_size if chosen.device == "host" else 0
    with Fleet(chosen.engine, chosen.device, chosen.model, capacity, chosen.start_deadline) as fleet:
        if chosen.together:
            Starts(fleet, chosen, together).together()
            together.write(chosen.output)
        for side in ("with", "without") if chosen.control else ("with",):
            Starts(fleet, chosen, beside).beside_a_busy_one(side)
            beside.write(chosen.output)
    return 0


class Starts:
    """Servers that come and go, and loads on the one that stays."""

    def __init__(self, fleet: Fleet, chosen: argparse.Namespace, result: Result) -> None:
        self.fleet, self.chosen, self.result = fleet, chosen, result
        self.shape = Shape.parse(chosen.shape)
        self.more = options.variables(chosen.settings)

    def spec(self, name: str, side: str = "with") -> Spec:
        """Of a managed engine; for "without", of a plain one with its part of the KV memory."""
        most = sum(self.shape) + 16
        settings = {"ELASTICKV_STATIC": "checkpoint"} | self.more
        managed = Spec(name, True, self.chosen.kv_size, False, self.chosen.seqs, most, environment=settings)
        return managed if side == "with" else plain_twin(managed, name, self.chosen.kv_size // self.chosen.engines)

    def together(self) -> None:
        """All at once, plain ones first."""
        found: dict[str, list[float]] = {}
        for side in ("without", "with"):
            names = [f"{'ours' if side == 'with' else 'plain'}-{n}" for n in range(self.chosen.engines)]
            specs = [self.spec(name, side) for name in names]
            began = time.monotonic()
            servers = [self.fleet.start(spec) for spec in specs]
            for server in servers:
                why = try_ready(self.fleet, server)
                if why:
                    self.result.fail(side, [f"{server.name} did not come up: {why}"])
                else:
                    found.setdefault(side, []).append(time.monotonic() - began)
            self.answered(servers, side)
            for server in servers:
                self.fleet.stop(server.name)
            print(f"{len(found.get(side, []))} of {len(servers)} came up ({self.result.sides[side]})", flush=True)
        self.result.samples["seconds until each served"] = found
        up = {side: float(len(found.get(side, []))) for side in ("with", "without")}
        all_up = Target("with", "least", float(self.chosen.engines))
        self.result.rows.append(
            Row(f"engines that came up of {self.chosen.engines}", "", up["with"], up["without"], all_up)
        )
        last = {side: max(found[side], default=None) if side in found else None for side in ("with", "without")}
        self.result.rows.append(Row("until the last of them served", "s", last["with"], last["without"]))

    def answered(self, servers: list[Engine], side: str) -> None:
        """One that came up answers too."""
        for server in servers:
            if server.process is not None and server.process.poll() is None:
                done = load.run(self.asked(server, [0.0]), self.chosen.request_deadline)
                self.result.account(side, f"{server.name}, which came up", done)

    def beside_a_busy_one(self, engines: str) -> None:
        """`engines`: "with", managed ones, or "without". The sides of the result are with a start and without one.

        The load lasts half as long again as the busy engine's own start took, alone.
        """
        label = "" if engines == "with" else "plain "
        began = time.monotonic()
        (busy,) = self.fleet.up(self.spec("busy" if engines == "with" else "plain-busy", engines))
        seconds = time.monotonic() - began
        done = load.run(
            self.asked(busy, schedule.at_once(self.chosen.saturation_requests)), self.chosen.request_deadline
        )
        self.result.account("without", f"{label}saturation", done)
        rate = self.chosen.share * done.requests_per_second
        if not rate:
            self.result.note(f"the {label}busy engine answered nothing at saturation: nothing to start another beside")
            return
        window = min(LONGEST_S, 1.5 * seconds + 3.0)
        self.result.samples[f"{label}busy engine"] = {"requests a second": rate, "seconds": window}
        loads: dict[str, list[Load]] = {"with": [], "without": []}
        for number, side in enumerate(schedule.alternate(self.chosen.repeats, ("without", "with"))):
            arrivals = schedule.poisson(rate, max(2, round(rate * window)), self.chosen.seed + number // 2)
            with Background(self.asked(busy, arrivals), self.chosen.request_deadline) as background:
                if side == "with":
                    self.start_beside(background, f"{busy.name}-late-{number}", engines)
            loads[side].append(background.wait())
        self.fleet.stop(busy.name)
        self.rows(loads, label)

    def start_beside(self, background: Background, name: str, engines: str) -> None:
        time.sleep(max(0.0, background.start + 1.0 - time.monotonic()))
        late = self.fleet.start(self.spec(name, engines))
        began = time.monotonic()
        why = try_ready(self.fleet, late)
        if why:
            self.result.fail("with", [f"{late.name} did not come up beside a busy one: {why}"])
        self.result.samples.setdefault("start beside a busy one, s", []).append(time.monotonic() - began)
        began_at = datetime.now() - timedelta(seconds=time.monotonic() - background.start)
        self.result.samples.setdefault(f"what {name} logged, s after the load began", said(late.log, began_at))
        if not background.running():
            self.result.note(f"{late.name} started for longer than the load beside it lasted")
        self.fleet.stop(late.name)

    def rows(self, loads: dict[str, list[Load]], label: str) -> None:
        """Of managed engines with their targets; those of plain ones are there to compare with."""
        for side, series in loads.items():
            for done in series:
                self.result.account(side, f"{label}busy engine, {self.result.sides[side]}", done)
                self.result.samples.setdefault(f"{label}busy engine, {self.result.sides[side]}", []).append(
                    done.samples()
                )
        spoilt = sum(len(done.failures) for done in loads["with"])
        for name, of in (("TTFT", Load.ttft), ("TPOT", Load.tpot)):
            for figure, percent, target in (("P99", 99, None if label else CALM), ("median", 50, None)):
                values = {
                    side: [1e3 * percentile(of(one), percent) for one in series] for side, series in loads.items()
                }
                given = paired_ratio(values["with"], values["without"])
                medians = (statistics.median(values["with"]), statistics.median(values["without"]))
                what = f"{label}busy engine's {name}, {figure}"
                self.result.rows.append(Row(what, "ms", *medians, target, given, spoilt))

    def asked(self, server: Engine, arrivals: list[float]) -> list[load.Request]:
        return self.fleet.requests(server, arrivals, self.shape, self.chosen.seed)


def said(log: Path, began: datetime) -> list[tuple[float, str]]:
    """The lines of an engine's log that tell the time of day, with the seconds between `began` and then: what it did
    while another's requests waited. Logs tell whole seconds, so each may be up to one too few."""
    midnight = began.replace(hour=0, minute=0, second=0, microsecond=0)
    lines = []
    for line in log.read_text(errors="replace").splitlines():
        if found := CLOCK.search(line):
            hours, minutes, seconds = map(int, found.groups())
            after = (midnight + timedelta(hours=hours, minutes=minutes, seconds=seconds) - began).total_seconds()
            lines.append((round(after if after > -3600 else after + 86400, 2), line[:SAID]))
    return lines[:SAID]


if __name__ == "__main__":
    sys.exit(main())

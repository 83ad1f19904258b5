"""TTFT in bursts: three engines on one device that share its KV memory, against a static split of the same memory.

    python benchmarks/engine/burst.py [--small]

Each engine's arrivals ramp up to a peak and down again by 1 request a second each second; each ramp begins when the one
before is at its peak. First the requests a second at which one engine with its static part is saturated are measured.
Then every peak, a share of that, is run on both sides. Both sides do not fit on one device at once (the weights would
be there twice), so the sides run one after the other, with new servers for each. Every peak is reported.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import load, options, schedule
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.load import Load, Request
from benchmarks.common.result import Result, Row, Target
from benchmarks.common.schedule import Shape
from benchmarks.common.servers import MIB, Fleet, plain_twin
from benchmarks.common.stats import ratio, summary
from elastickv.demo.engines import Engine
from elastickv.demo.watch import Watch
from elastickv.ledger import DeviceView

FULL = {
    **options.ENGINE,
    "seqs": 1024,
    "engines": 3,
    "shape": "256+256",
    "shares": "0.5,0.75,1,1.25,1.5",
    "peaks": "",
    "saturation_requests": 384,
    "step": 1.0,
    "stagger": 0.5,
    "repeats": 1,
    "kv_size": "22GiB",
    "request_deadline": 300.0,
    "minutes": 60.0,
    "seed": 0,
}
SMALL = {
    **options.SMALL,
    "engines": 2,
    "shape": "32+16",
    "shares": "0.5,1.25",
    "peaks": "4,8",
    "saturation_requests": 12,
    "step": 0.15,
    "kv_size": "4MiB",
    "request_deadline": 60.0,
    "minutes": 10.0,
}
ABOUT = {
    **options.ABOUT,
    "seqs": "requests that an engine runs at once; 1024 is vLLM's own default on such GPUs: memory is what runs short",
    "engines": "that share the device",
    "shape": "tokens of prompt+answer",
    "shares": "peaks as shares of the saturation, by commas",
    "peaks": "requests a second instead of shares",
    "saturation_requests": "at once, to find the saturation",
    "step": "seconds until the rate changes by 1; with 1 the rates are in requests a second",
    "stagger": "when the next engine's ramp begins, as a share of a ramp",
    "kv_size": "KV memory of all engines together",
    "request_deadline": "seconds that a request may take",
    "minutes": "of which each side has half; then it begins no further peak, and what was left out is said",
}
NOT_WORSE = Target("ratio", "most", 1.0)
BEST = Target("ratio", "most", 1 / 28)
LOOK_S = 0.25
"""Between looks at the ledger."""


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    result = Result("engine/burst", chosen.engine, chosen.small, chosen.device, options.settings(chosen))
    result.sides = {"with": "elastickv", "without": "static split"}
    shape = Shape.parse(chosen.shape)
    with Fleet(chosen.engine, chosen.device, chosen.model, chosen.kv_size, chosen.start_deadline) as fleet:
        Burst(fleet, shape, chosen, result).measure()
    result.write(chosen.output)
    return 0


class Burst:
    """The sides in turn, each with servers of its own."""

    def __init__(self, fleet: Fleet, shape: Shape, chosen: argparse.Namespace, result: Result) -> None:
        self.fleet, self.shape, self.chosen, self.result = fleet, shape, chosen, result
        self.until = 0.0
        self.peaks = [int(text) for text in chosen.peaks.split(",")] if chosen.peaks else []
        self.loads: dict[tuple[int, str], list[Load]] = {}

    def measure(self) -> None:
        for side in schedule.alternate(self.chosen.repeats, ("without", "with")):
            self.until = time.monotonic() + 60 * self.chosen.minutes / (2 * self.chosen.repeats)
            servers = self.fleet.up(*self.specs(side))
            for server in servers:
                self.send(self.asked([server], schedule.at_once(4)), f"warm-up of {server.name}", side)
            self.saturation(servers, side)
            for peak in self.peaks:
                self.peak(servers, peak, side)
            for server in servers:
                self.fleet.stop(server.name)
        for peak in sorted(self.peaks):
            self.rows(peak)
        self.best()

    def specs(self, side: str) -> list[Spec]:
        part = self.chosen.kv_size // self.chosen.engines
        found = []
        for number in range(self.chosen.engines):
            shared = Spec(f"shared-{number}", True, seqs=self.chosen.seqs, max_len=sum(self.shape) + 16)
            found.append(shared if side == "with" else plain_twin(shared, f"static-{number}", part))
        return found

    def saturation(self, servers: list[Engine], side: str) -> None:
        """Requests a second of one engine alone; where there are no peaks yet, they are shares of that."""
        arrivals = schedule.at_once(self.chosen.saturation_requests)
        done = self.send(self.asked(servers[:1], arrivals), f"{servers[0].name} saturated", side)
        rate = done.requests_per_second
        self.result.samples.setdefault("saturation of one engine, requests a second", {}).setdefault(side, []).append(
            rate
        )
        if not self.peaks:
            shares = [float(text) for text in self.chosen.shares.split(",")]
            self.peaks = list(dict.fromkeys(max(1, round(rate * share)) for share in shares))

    def asked(self, servers: list[Engine], arrivals: list[float], stagger: float = 0.0) -> list[Request]:
        """The same arrivals on each server, each `stagger` seconds after the one before."""
        found: list[Request] = []
        for number, server in enumerate(servers):
            later = [at + number * stagger for at in arrivals]
            seed = self.chosen.seed + number
            found += self.fleet.requests(server, later, self.shape, seed)
        return found

    def peak(self, servers: list[Engine], peak: int, side: str) -> None:
        if time.monotonic() > self.until:
            self.result.note(f"peak {peak}, {self.result.sides[side]}: left out, for --minutes was over")
            return
        arrivals = schedule.ramp(peak, self.chosen.step)
        length = len(schedule.ramp_rates(peak)) * self.chosen.step
        asked = self.asked(servers, arrivals, length * self.chosen.stagger)
        with ExitStack() as stack:
            if side == "with":
                memory = Memory([server.name for server in servers])
                stack.enter_context(Watch(self.fleet.ledger(), LOOK_S, show=memory.look))
                self.result.samples.setdefault("memory", {}).setdefault(f"peak {peak}", []).append(memory.series)
            done = self.send(asked, f"peak {peak}, {self.result.sides[side]}", side)
        self.loads.setdefault((peak, side), []).append(done)
        self.result.samples.setdefault(f"peak {peak}, {side}", []).append(done.samples())

    def send(self, asked: list[Request], what: str, side: str) -> Load:
        done = load.run(asked, self.chosen.request_deadline)
        self.result.account(side, what, done)
        figures = summary(done.ttft())
        print(f"{what}: TTFT mean {figures['mean']:.3f} s, P99 {figures['p99']:.3f} s", flush=True)
        return done

    def rows(self, peak: int) -> None:
        """A side without a figure, for its time was over, is a target missed."""
        for name, seconds in (("TTFT", Load.ttft), ("TPOT", Load.tpot)):
            found = {
                side: summary([1e3 * one for done in self.loads.get((peak, side), []) for one in seconds(done)])
                for side in ("with", "without")
            }
            for figure in ("mean", "p99"):
                target = NOT_WORSE if name == "TTFT" else None
                values = found["with"].get(figure), found["without"].get(figure)
                spoilt = sum(len(one.failures) for one in self.loads.get((peak, "with"), []))
                self.result.rows.append(Row(f"peak {peak}: {name} {figure}", "ms", *values, target, spoilt=spoilt))

    def best(self) -> None:
        """The peak at which sharing gains most by P99 of TTFT."""
        name = "TTFT p99"
        found = [
            row for row in self.result.rows if row.what.endswith(name) and row.ratio is not None and not row.spoilt
        ]
        if found:
            row = min(found, key=lambda one: one.ratio or 0.0)
            self.result.rows.append(Row(f"best of all peaks ({row.what})", "ms", row.with_, row.without, BEST))
            gain = ratio(1.0, row.ratio)
            self.result.note(f"{row.what}: {gain:.2f} times better than the static split" if gain else row.what)


class Memory:
    """What each engine holds and what of that is in use, in MiB; how many extents it has mapped and unmapped since the
    first look, and how often it was refused a lease; and when: seconds from the first look.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.began = time.monotonic()
        self.first: dict[tuple[str, str], int] = {}
        kinds = ("held", "used", "maps", "unmaps", "misses")
        self.series: dict[str, Any] = {"at": [], **{kind: {name: [] for name in names} for kind in kinds}}

    def look(self, view: DeviceView) -> None:
        self.series["at"].append(round(time.monotonic() - self.began, 3))
        for name in self.names:
            tenant = view.tenant(name)
            self.series["held"][name].append(round(tenant.held / MIB, 2))
            self.series["used"][name].append(round(tenant.usage.used / MIB, 2))
            self.count("maps", name, tenant.histograms.map.count)
            self.count("unmaps", name, tenant.histograms.unmap.count)
            self.count("misses", name, tenant.counters.misses)

    def count(self, kind: str, name: str, value: int) -> None:
        self.series[kind][name].append(value - self.first.setdefault((kind, name), value))


if __name__ == "__main__":
    sys.exit(main())

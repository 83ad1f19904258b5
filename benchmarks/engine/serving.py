"""Throughput at saturation, and latency at half load: elastickv against plain vLLM with as many bytes of KV cache.

    python benchmarks/engine/serving.py [--small]

Two servers of one model on one device, one plain and one managed, take turns on the same requests while the other one
waits: plain managed, managed plain, ... First all requests of a shape at once (rate = infinite), for tokens a second;
then Poisson arrivals at half the rate that the plain one reached, for TTFT and TPOT. Ratios are the medians of the
ratios of neighbouring rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import load, options, schedule
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.load import Load
from benchmarks.common.result import Result, Row, Target
from benchmarks.common.schedule import Shape
from benchmarks.common.servers import Fleet, plain_twin
from benchmarks.common.stats import paired_ratio, percentile
from elastickv.demo.engines import Engine

FULL = {
    **options.ENGINE,
    "shapes": "512+128,8000+128",
    "requests": 512,
    "long_requests": 96,
    "half_requests": 200,
    "repeats": 5,
    "kv_size": "18GiB",
    "plain_settings": "",
    "request_deadline": 300.0,
    "seed": 0,
}
SMALL = {
    **options.SMALL,
    "shapes": "32+8,128+8",
    "requests": 12,
    "long_requests": 6,
    "half_requests": 8,
    "repeats": 1,
    "kv_size": "8MiB",
    "request_deadline": 60.0,
}
ABOUT = {
    **options.ABOUT,
    "shapes": "tokens of prompt+answer, by commas",
    "requests": "in a round at saturation",
    "long_requests": "the same for prompts of 4,000 tokens and more, and for the last shape of a small run",
    "half_requests": "in a round at half load",
    "kv_size": "KV cache of each engine",
    "plain_settings": "variables of the plain engine, as VLLM_KV_CACHE_LAYOUT=BLNHC, which is elastickv's layout",
    "request_deadline": "seconds that a request may take",
}
SIDES = ("without", "with")
THROUGHPUT = Target("ratio", "least", 0.99)
LATENCY = Target("ratio", "most", 1.01)


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    shapes = [Shape.parse(text) for text in chosen.shapes.split(",")]
    variables = options.variables(chosen.plain_settings)
    result = Result("engine/serving", chosen.engine, chosen.small, chosen.device, options.settings(chosen))
    with Fleet(chosen.engine, chosen.device, chosen.model, chosen.kv_size, chosen.start_deadline) as fleet:
        managed = Spec("managed", True, chosen.kv_size, seqs=chosen.seqs, max_len=max(map(sum, shapes)) + 16)
        twin = replace(plain_twin(managed, "plain", chosen.kv_size), environment=variables)
        plain, ours = fleet.up(twin, managed)
        bench = Bench(fleet, {"without": plain, "with": ours}, chosen, result)
        for number, shape in enumerate(shapes):
            long = shape.prompt >= 4000 or (chosen.small and number == len(shapes) - 1 > 0)
            bench.shape(shape, chosen.long_requests if long else chosen.requests)
    result.write(chosen.output)
    return 0


class Bench:
    """Both servers and the loads that they take turns on."""

    def __init__(self, fleet: Fleet, servers: dict[str, Engine], chosen: argparse.Namespace, result: Result) -> None:
        self.fleet, self.servers, self.chosen, self.result = fleet, servers, chosen, result

    def shape(self, shape: Shape, count: int) -> None:
        rounds = self._rounds(f"{shape} at saturation", lambda _: schedule.at_once(count), shape)
        speeds = {side: [one.tokens_per_second for one in rounds[side]] for side in SIDES}
        self._row(f"{shape}: tokens a second at saturation", "1/s", speeds, THROUGHPUT, rounds)
        rates = [one.requests_per_second for one in rounds["without"]]
        rate = statistics.median(rates) / 2
        if not rate:
            self.result.note(f"{shape}: no half load, for the plain engine answered nothing at saturation")
            return
        self.result.samples[f"{shape} half load, requests a second"] = rate
        halves = min(count, self.chosen.half_requests)
        half = self._rounds(
            f"{shape} at half load", lambda number: schedule.poisson(rate, halves, self.chosen.seed + number), shape
        )
        for name, seconds in (("TTFT", Load.ttft), ("TPOT", Load.tpot)):
            for figure, percent, target in (("median", 50, LATENCY), ("P99", 99, None)):
                values = {side: [1e3 * percentile(seconds(one), percent) for one in half[side]] for side in SIDES}
                self._row(f"{shape}: {name} at half load, {figure}", "ms", values, target, half)

    def _rounds(self, what: str, arrivals: Any, shape: Shape) -> dict[str, list[Load]]:
        """`repeats` rounds of each side after one that does not count; the same requests on both sides."""
        found: dict[str, list[Load]] = {side: [] for side in SIDES}
        for turn, side in enumerate(schedule.alternate(self.chosen.repeats + 1, SIDES)):
            number = turn // 2
            server = self.servers[side]
            seed = self.chosen.seed + 1000 * number
            asked = self.fleet.requests(server, arrivals(number), shape, seed)
            done = load.run(asked, self.chosen.request_deadline)
            self.result.account(side, f"{what}, round {number}, {server.name}", done)
            print(f"{what}, round {number}, {server.name}: {done.tokens_per_second:.1f} tokens/s", flush=True)
            if number:
                found[side].append(done)
                self.result.samples.setdefault(f"{what}, {side}", []).append(done.samples())
        return found

    def _row(
        self, what: str, unit: str, values: dict[str, list[float]], wanted: Target | None, rounds: dict[str, list[Load]]
    ) -> None:
        with_, without = (statistics.median(values[side]) for side in ("with", "without"))
        spoilt = sum(len(one.failures) for one in rounds["with"])
        given = paired_ratio(values["with"], values["without"])
        self.result.rows.append(Row(what, unit, with_, without, wanted, given, spoilt))


if __name__ == "__main__":
    sys.exit(main())

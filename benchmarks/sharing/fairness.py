"""Four engines that always want more than there is: what each holds, against its weight; and does anybody starve?

    python benchmarks/sharing/fairness.py [--seconds 30] [--weights 1,1,2,4] [--extent 1]

Each tenant is a process with a real pool on the host driver. Its rounds are steps as an engine makes them: do what
neighbours ask, free the requests that have ended (half of them stay as cached prefixes), start new requests until
"none now". The budget is a quarter of what they would take together. From two seconds after the last one began, what
each holds is read off the ledger every 5 ms; the means are compared with the weights.

Then the first tenant leaves and comes back, --visits times, with a floor of a quarter of the budget, while the others
hold everything: counted are the rounds of give-back, each as long as the longest request runs, until the others have
given what its floor needs, and until it has taken it all.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any

import common

from elastickv import _core

BLOCK = 64 * 1024
SIZES = (1, 8)
"""Blocks of a request."""
LIVES = (8, 40)
"""Steps that a request runs."""
STEP_S = 0.001
SETTLE_S = 2.0
GIVEN_ROUNDS = 1.25
"""A round, and ten steps besides: two that send the order and see it done, the rest for steps that come late."""


class Worker:
    """An engine's scheduler without the engine: requests that begin, hold blocks for some steps, and end."""

    def __init__(self, directory: str, name: str, capacity: int, extent: int, options: dict[str, int]) -> None:
        self._hand = common.Hand(
            directory,
            name,
            blocks=capacity // BLOCK,
            block=BLOCK,
            capacity=capacity,
            page=BLOCK,
            max_extent=extent * BLOCK,
            give_back_wait=0,
            **options,
        )
        self._random = random.Random(name)
        self._running: list[tuple[int, list[int]]] = []
        self.rounds = self.requests = self.longest = 0
        self.longest_s = 0.0
        self._last, self._last_s = 0, time.monotonic()
        self.floor_s: float | None = None

    def step(self) -> None:
        pool = self._hand.pool
        if pool.attention():
            pool.maintain(False)
        self.rounds += 1
        ended = [ids for end, ids in self._running if end <= self.rounds]
        self._running = [one for one in self._running if one[0] > self.rounds]
        for ids in ended:
            pool.release(ids, self._random.random() < 0.5)
        while (got := pool.alloc(self._random.randint(*SIZES))) is not None:
            self._running.append((self.rounds + self._random.randint(*LIVES), got[0]))
            self.requests += 1
            self._last, self._last_s = self.rounds, time.monotonic()
        self.longest = max(self.longest, self.rounds - self._last)
        self.longest_s = max(self.longest_s, time.monotonic() - self._last_s)
        self._hand.deliver()

    def report(self) -> dict[str, Any]:
        self._hand.pool.check_integrity()
        return {
            "rounds": self.rounds,
            "requests": self.requests,
            "most rounds without a new request": self.longest,
            "most seconds without a new request": round(self.longest_s, 3),
        }

    def leave(self) -> None:
        self._hand.close()


def work(directory: str, name: str, capacity: int, extent: int, weight: int, floor: int) -> None:
    """Obeys lines: "go" begins, "report" answers, "leave" ends."""
    worker = Worker(directory, name, capacity, extent, {"weight": weight, "floor": floor})
    running = False
    while True:
        if select.select([sys.stdin], [], [], STEP_S if running else None)[0]:
            word = sys.stdin.readline().strip()
            running = running or word == "go"
            common.answer(worker.report() if word == "report" else {})
            if word in ("leave", ""):
                worker.leave()
                return
        if running:
            worker.step()


def jain(parts: list[float]) -> float:
    """1 when all parts are equal."""
    return sum(parts) ** 2 / (len(parts) * sum(part * part for part in parts))


def sample(ledger: _core.Ledger, names: list[str], seconds: float) -> dict[str, float]:
    """Mean bytes held by each over the time."""
    held: dict[str, list[int]] = {name: [] for name in names}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        view = ledger.view()
        for tenant in view["tenants"]:
            if tenant["name"] in held:
                held[tenant["name"]].append(tenant["leased"])
        if sum(tenant["leased"] for tenant in view["tenants"]) > view["capacity"]:
            raise RuntimeError("more is leased than there is")
        time.sleep(0.005)
    return {name: statistics.fmean(values) for name, values in held.items()}


def reach_floor(ledger: _core.Ledger, directory: str, arguments: list[str], floor: int, others: Any) -> dict[str, Any]:
    """A tenant comes with a floor that the others hold: how long until it has it, and how many rounds of theirs."""
    until = time.monotonic() + common.DEADLINE_S
    while (view := ledger.view())["capacity"] - sum(tenant["leased"] for tenant in view["tenants"]) > floor / 8:
        if time.monotonic() > until:
            raise RuntimeError(f"the others did not take all there is: {view}")
        time.sleep(0.01)
    with common.neighbour(__file__, "--work", directory, "late", *arguments, "1", str(floor)) as late:
        late.say("report")  # it has joined, and holds block 0
        before = [other.say("report")["rounds"] for other in others]
        began = time.monotonic()
        late.say("go")
        moments: dict[str, dict[str, float]] = {}
        while len(moments) < 2:
            if time.monotonic() > began + common.DEADLINE_S:
                raise RuntimeError(f"the floor was not reached in time: {ledger.view()}")
            view = ledger.view()
            held = {tenant["name"]: tenant["leased"] for tenant in view["tenants"]}
            own = held.pop("late")
            given = view["capacity"] - sum(held.values()) >= floor
            for what in [what for what, yes in {"given": given, "held": own >= floor}.items() if yes]:
                if what not in moments:
                    after = [other.say("report")["rounds"] for other in others]
                    steps = max(b - a for a, b in zip(before, after, strict=True))
                    seconds = round(time.monotonic() - began, 4)
                    moments[what] = {"seconds": seconds, "steps": steps, "give-back rounds": steps / LIVES[1]}
            time.sleep(0.0005)
        late.say("leave")
    return {"floor": floor, **moments}


def measure(weights: list[int], chosen: argparse.Namespace) -> dict[str, Any]:
    seconds, rounds, capacity, extent = chosen.seconds, chosen.rounds, chosen.capacity, chosen.extent
    names = [f"t{i}-weight-{weight}" for i, weight in enumerate(weights)]
    with tempfile.TemporaryDirectory(prefix="elastickv-benchmark-") as place, ExitStack() as stack:
        directory = f"{place}/ledgers"
        shape = [str(capacity), str(extent)]
        workers = {}
        for name, weight in zip(names, weights, strict=True):
            arguments = ("--work", directory, name, *shape, str(weight), "0")
            workers[name] = stack.enter_context(common.neighbour(__file__, *arguments))
        for worker in workers.values():
            worker.say("go")
        ledger = _core.Ledger.open(directory, "host")
        time.sleep(SETTLE_S)
        held = sample(ledger, names, seconds)
        while any(worker.say("report")["rounds"] < rounds for worker in workers.values()):
            time.sleep(0.2)
        reports = {name: worker.say("report") for name, worker in workers.items()}
        workers[names[0]].say("leave")
        others = [workers[name] for name in names[1:]]
        floors = [reach_floor(ledger, directory, shape, capacity // 4, others) for _ in range(chosen.visits)]
    parts = [held[name] / weight for name, weight in zip(names, weights, strict=True)]
    share = sum(held.values()) / sum(weights)
    tenants = {
        name: {"weight": weight, "held": round(held[name]), "of its share": round(part / share, 4), **reports[name]}
        for name, weight, part in zip(names, weights, parts, strict=True)
    }
    used = sum(held.values()) / capacity
    return {"jain": round(jain(parts), 5), "held of the budget": round(used, 4), "tenants": tenants, "floors": floors}


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        directory, name, *numbers = sys.argv[2:]
        capacity, extent, weight, floor = map(int, numbers)
        work(directory, name, capacity, extent, weight, floor)
        return 0
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of sampling, after the first two (30)")
    parser.add_argument("--rounds", type=int, default=10_000, help="that each tenant makes at least (10000)")
    parser.add_argument("--weights", default="1,1,2,4")
    parser.add_argument("--visits", type=int, default=10, help="of the tenant with a floor (10)")
    parser.add_argument("--capacity", type=int, default=96 * common.MIB, help="bytes")
    parser.add_argument("--extent", type=int, default=1, help="most pages of an extent (1)")
    parser.add_argument("--name", default="fairness", help="of the result file")
    chosen = parser.parse_args()
    os.environ.pop("ELASTICKV_CONFIG", None)
    weights = [int(weight) for weight in chosen.weights.split(",")]
    figures = measure(weights, chosen)
    tenants = figures["tenants"].values()
    given = [floor["given"]["give-back rounds"] for floor in figures["floors"]]
    targets = {
        "Jain index of held / weight": (figures["jain"], "least", 0.98),
        "largest distance from the share": (max(abs(t["of its share"] - 1) for t in tenants), "most", 0.05),
        "seconds without a new request": (max(t["most seconds without a new request"] for t in tenants), "most", 2.0),
        "give-back rounds until the floor is given, median": (statistics.median(given), "most", 1.0),
        "the same, the slowest": (max(given), "most", GIVEN_ROUNDS),
    }
    for name, tenant in figures["tenants"].items():
        print(name, tenant)
    return common.write(
        chosen.name,
        {"page": BLOCK, "extent": chosen.extent, "capacity": chosen.capacity, **figures},
        targets,
        chosen.output,
    )


if __name__ == "__main__":
    sys.exit(main())

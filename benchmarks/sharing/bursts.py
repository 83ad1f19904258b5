"""The bursts of engine/burst.py without a model: does the sharing policy hold when all that there is is wanted?

    python benchmarks/sharing/bursts.py [--peaks 18,28,36]

Three processes schedule as vLLM does: they admit what fits, each running request takes a block for every 16 tokens, and
the youngest is preempted where there is none. Their blocks are a real pool's, on the host; what a step would take on a
GPU is slept (`step_seconds`). Each engine's arrivals ramp up to a peak and down by 1 request/s each second, the next
engine's begin when the one before is at its peak. One side shares the memory, the other has a third of it for each.

The times are a model's, not a GPU's: what counts is who waits for memory, and for how long.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import common

from benchmarks.common.result import Result, Row, Target
from benchmarks.common.schedule import ramp, ramp_rates
from benchmarks.common.stats import summary
from elastickv import _core
from elastickv.memory.asking import Asking

ENGINES = 3
PROMPT = ANSWER = 256
BLOCK_TOKENS = 16
BLOCK = 64 * 1024
"""In place of the 2 MiB that 16 tokens of a Llama-3.1-8B take."""
BUDGET_BLOCKS = 11_264
"""22 GiB of such blocks."""
MAX_EXTENT_BLOCKS = 64
STEP_TOKENS = 8192
IDLE_S = 0.005
STARVED_US = 10_000
SAMPLE_S = 0.25


def step_seconds(running: int, prefilled: int) -> tuple[float, float]:
    """What a step takes of the processor, and of the GPU alone, fitted to engine/burst.py on an H200 (2026-12-01).

    A step that prefills launches its kernels one by one, one that only decodes is a CUDA graph.
    """
    if not prefilled:
        return 0.004, 0.0043 + 1.25e-5 * running
    return 0.024 + 4e-5 * running, 0.011 + 5.5e-5 * running + 2.8e-5 * prefilled


class Blocks(Protocol):
    """Where a scheduler's blocks come from."""

    def take(self, count: int, patient: bool, growing: bool = False) -> list[int] | None: ...
    def free(self, ids: Sequence[int]) -> None: ...
    def between_steps(self, idle: bool) -> None: ...
    def starve(self) -> None: ...
    def backlog(self, blocks: int) -> None: ...


class Fixed:
    """A part of the memory that is this engine's own."""

    def __init__(self, count: int) -> None:
        self._left = count

    def take(self, count: int, patient: bool, growing: bool = False) -> list[int] | None:
        if count > self._left:
            return None
        self._left -= count
        return [0] * count

    def free(self, ids: Sequence[int]) -> None:
        self._left += len(ids)

    def between_steps(self, idle: bool) -> None:
        pass

    def starve(self) -> None:
        time.sleep(STARVED_US / 1e6)

    def backlog(self, blocks: int) -> None:
        pass


class Shared:
    """An elastic pool, driven as the vLLM plug-in drives it."""

    def __init__(self, directory: str, name: str) -> None:
        self._hand = common.Hand(
            directory,
            name,
            blocks=BUDGET_BLOCKS,
            block=BLOCK,
            capacity=BUDGET_BLOCKS * BLOCK,
            page=BLOCK,
            max_extent=MAX_EXTENT_BLOCKS * BLOCK,
            stock=None,
            idle_release=None,
        )
        self._pool = self._hand.pool
        self._asking = Asking(self._pool)

    def take(self, count: int, patient: bool, growing: bool = False) -> list[int] | None:
        self._asking.ensure(count, patient=patient, growing=growing)
        if self._pool.num_available() < count:
            return None
        ids: list[int] = self._pool.take(count)[0]
        return ids

    def free(self, ids: Sequence[int]) -> None:
        self._pool.release(list(ids))

    def between_steps(self, idle: bool) -> None:
        if idle or self._pool.attention():
            self._pool.maintain(idle)
        self._hand.deliver()

    def starve(self) -> None:
        self._pool.wait_freed(self._pool.freed_word(), STARVED_US)

    def backlog(self, blocks: int) -> None:
        self._pool.set_backlog(blocks)


@dataclass(eq=False)
class Request:
    """`arrival`: seconds from the start. `tokens`: of the answer so far."""

    arrival: float
    tokens: int = 0
    ids: list[int] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0

    @property
    def length(self) -> int:
        return PROMPT + self.tokens


class Device:
    """What each engine's last step took of the GPU, in a file that all of them map."""

    SIZE = 8 * ENGINES

    def __init__(self, path: Path, number: int) -> None:
        if not path.exists():
            path.write_bytes(bytes(self.SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.SIZE)
        self._number = number

    def use(self, seconds: float) -> float:
        """How long the work takes beside the others', who get as much of the GPU as this one, as long as they want."""
        struct.pack_into("d", self._map, 8 * self._number, seconds)
        others = struct.unpack_from(f"{ENGINES}d", self._map)
        return seconds + sum(min(seconds, one) for i, one in enumerate(others) if i != self._number)


class Scheduler:
    """One engine. `begin`: of time.monotonic(), what arrivals count from."""

    def __init__(self, blocks: Blocks, device: Device) -> None:
        self.blocks, self.device = blocks, device
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0

    def run(self, arrivals: Sequence[float], begin: float, until: float) -> list[Request]:
        """Returns once all have been answered, and keeps its memory as an idle engine does `until` then."""
        done: list[Request] = []
        todo = deque(Request(arrival) for arrival in arrivals)
        while todo or self.waiting or self.running or time.monotonic() < begin + until:
            now = time.monotonic() - begin
            while todo and todo[0].arrival <= now:
                self.waiting.append(todo.popleft())
            idle = not self.waiting and not self.running
            self.blocks.between_steps(idle)
            if idle:
                self.device.use(0.0)
                time.sleep(IDLE_S)
                continue
            self.step(begin, done)
        return done

    def step(self, begin: float, done: list[Request]) -> None:
        """Runs what runs, admits what fits, sleeps for as long as that takes; then the tokens are there."""
        started = time.monotonic()
        for request in list(self.running):
            if request in self.running:
                self.grow(request)
        ran = list(self.running)
        prefilled = self.admit()
        if not self.running:
            self.blocks.starve()
            return
        processor, gpu = step_seconds(len(self.running), prefilled)
        seconds = max(processor, self.device.use(gpu))
        time.sleep(max(0.0, started + seconds - time.monotonic()))
        now = time.monotonic() - begin
        for request in self.running:
            request.tokens += 1
            request.first = request.first or now
        for request in [one for one in ran if one.tokens >= ANSWER]:
            request.last = now
            self.running.remove(request)
            self.blocks.free(request.ids)
            done.append(request)

    def grow(self, request: Request) -> None:
        """A block for the next token, if it begins one; where there is none, who came last gives its own up."""
        while request.length >= len(request.ids) * BLOCK_TOKENS:
            ids = self.blocks.take(1, patient=True, growing=True)
            if ids is not None:
                request.ids += ids
                return
            last = self.running.pop()
            self.blocks.free(last.ids)
            last.ids = []
            self.waiting.appendleft(last)
            self.preemptions += 1
            if last is request:
                return

    def admit(self) -> int:
        """Tokens to prefill."""
        prefilled = 0
        self.blocks.backlog(sum(-(-one.length // BLOCK_TOKENS) for one in self.waiting))
        while self.waiting and prefilled + self.waiting[0].length <= STEP_TOKENS:
            request = self.waiting[0]
            ids = self.blocks.take(-(-request.length // BLOCK_TOKENS), patient=not self.running)
            if ids is None:
                break
            request.ids = ids
            self.running.append(self.waiting.popleft())
            prefilled += request.length
        return prefilled


class Part(NamedTuple):
    """What one engine found."""

    arrival: list[float]
    ttft: list[float]
    tpot: list[float]
    preemptions: int


def work(side: str, place: str, number: int) -> None:
    """Obeys lines: BEGIN UNTIL ARRIVAL...: runs them and answers with what came of them."""
    device = Device(Path(place) / "device", number)
    name = f"engine-{number}"
    blocks: Blocks = Shared(f"{place}/ledgers", name) if side == "with" else Fixed(BUDGET_BLOCKS // ENGINES)
    common.answer({"ready": number})
    for line in iter(sys.stdin.readline, ""):
        begin, until, *arrivals = map(float, line.split())
        scheduler = Scheduler(blocks, device)
        found = sorted(scheduler.run(arrivals, begin, until), key=lambda one: one.arrival)
        part = Part(
            [round(one.arrival, 4) for one in found],
            [round(one.first - one.arrival, 4) for one in found],
            [round((one.last - one.first) / (ANSWER - 1), 5) for one in found],
            scheduler.preemptions,
        )
        common.answer(part._asdict())


def one_peak(side: str, peak: int, samples: dict[str, Any]) -> list[Part]:
    arrivals = ramp(peak)
    length = len(ramp_rates(peak))
    with tempfile.TemporaryDirectory(prefix="elastickv-benchmark-") as place, ExitStack() as stack:
        engines = []
        for number in range(ENGINES):
            engines.append(stack.enter_context(common.neighbour(__file__, "--work", side, place, str(number))))
            engines[-1].expect()
        begin = time.monotonic() + 0.5
        until = length * (1 + (ENGINES - 1) / 2)
        for number, engine in enumerate(engines):
            later = [f"{at + number * length / 2:.4f}" for at in arrivals]
            engine.send(" ".join([f"{begin:.4f}", f"{until:.4f}", *later]))
        if side == "with":
            samples[f"memory, peak {peak}"] = watch(f"{place}/ledgers", begin, begin + until)
        return [Part(**engine.expect()) for engine in engines]


def watch(directory: str, begin: float, until: float) -> dict[str, Any]:
    """Blocks that each tenant holds and uses, and how often it was refused, every SAMPLE_S."""
    ledger = _core.Ledger.open(directory, "host")
    series: dict[str, Any] = {"at": []}
    while time.monotonic() < until:
        series["at"].append(round(time.monotonic() - begin, 2))
        for tenant in ledger.view()["tenants"]:
            row = series.setdefault(tenant["name"], {"held": [], "used": [], "misses": []})
            row["held"].append(tenant["leased"] // BLOCK)
            row["used"].append(tenant["usage"]["used"] // BLOCK)
            row["misses"].append(tenant["counters"]["misses"])
        time.sleep(SAMPLE_S)
    return series


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        side, place, number = sys.argv[2:]
        work(side, place, int(number))
        return 0
    parser = common.parser(__doc__)
    parser.add_argument("--peaks", default="18,28,36", help="requests a second, by commas (18,28,36)")
    parser.add_argument("--sides", default="without,with", help="to run only one of them")
    chosen = parser.parse_args()
    os.environ.pop("ELASTICKV_CONFIG", None)
    result = Result("sharing/bursts", "", False, "host", {"peaks": chosen.peaks})
    result.sides = {"with": "elastickv", "without": "static split"}
    for peak in map(int, chosen.peaks.split(",")):
        found: dict[str, dict[str, float]] = {}
        for side in chosen.sides.split(","):
            parts = one_peak(side, peak, result.samples)
            result.samples[f"peak {peak}, {side}"] = [part._asdict() for part in parts]
            found[side] = summary([1e3 * one for part in parts for one in part.ttft])
            waits = "; ".join(f"{summary(part.ttft)['p99']:.2f}" for part in parts)
            print(f"peak {peak}, {side}: TTFT P99 {found[side]['p99']:.0f} ms, by engine {waits} s, ", end="")
            print(f"{sum(part.preemptions for part in parts)} preemptions", flush=True)
        for figure in ("mean", "p99"):
            values = [found.get(side, {}).get(figure) for side in ("with", "without")]
            result.rows.append(Row(f"peak {peak}: TTFT {figure}", "ms", *values, Target("ratio", "most", 1.0)))
    result.write(chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmarks of sharing have in common: a cache driven by hand, neighbours in processes, result files."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.result import RESULTS as ALL_RESULTS
from benchmarks.common.result import Result, Row, Target
from elastickv.config import Settings
from elastickv.memory import Cache, RankGeometry, RankMemory

MIB = 1024 * 1024
GIB = 1024 * MIB
RESULTS = ALL_RESULTS / "cpu"
HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
DEADLINE_S = 60.0


class Hand:
    """A tenant on the host whose pool and memory are driven by hand: no steward, no stock, no idle clock."""

    def __init__(self, directory: str, name: str, *, blocks: int, block: int, capacity: int, **more: Any) -> None:
        arguments = {"directory": directory, "device": "host", "capacity": capacity, "name": name, "stock": 0}
        settings = Settings.load(arguments={**arguments, "idle_release": 0, **more}, environ={})
        self.cache = Cache.create(settings, num_blocks=blocks, ranks=[RankGeometry("host", 1, block)], engine="bench")
        self.memory = RankMemory.attach(self.cache.rank_spec(0))
        self.cache.wait_ready(10)
        self.pool = self.cache.pool

    def insist(self, count: int) -> list[int]:
        """The blocks, asked for until they are there."""
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            got = self.pool.alloc(count)
            self.deliver()  # under pressure it may have ordered free pages back first
            if got is not None:
                return got[0]
        raise RuntimeError(f"{count} blocks were not given within {DEADLINE_S} s: {self.pool.stats()}")

    def deliver(self) -> None:
        """What goes along with a step of an engine: the newest order to unmap."""
        self.memory.fence(self.pool.ticket())

    def give_up(self, ids: list[int]) -> None:
        """Frees the blocks, unmaps them and waits until that is so."""
        self.pool.release(ids)
        until = time.monotonic() + DEADLINE_S
        while self.pool.stats()["mapped_free"] + self.pool.stats()["transit"] and time.monotonic() < until:
            self.pool.maintain(True)
            self.deliver()
            self.pool.poll()

    def close(self) -> None:
        self.memory.close()
        self.cache.close()


class Neighbour:
    """A process that obeys lines: `say()` writes one and returns the line that answers it, as JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def say(self, word: str) -> Any:
        self.send(word)
        return self.expect()

    def send(self, word: str) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the neighbour's pipes are missing")
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def expect(self) -> Any:
        """The next line that it says."""
        if self._process.stdout is None:
            raise RuntimeError("the neighbour's pipes are missing")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the neighbour ended with {self._process.wait(20)}")
        return json.loads(line)


@contextmanager
def neighbour(script: str, *arguments: str) -> Iterator[Neighbour]:
    """Starts `script` in a process of its own and ends it, whatever happens."""
    command = [sys.executable, script, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Neighbour(process)
        finally:
            process.kill()
            process.wait(20)


def answer(value: object) -> None:
    """Says a line to whoever started this process."""
    print(json.dumps(value), flush=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """The 50th and 99th percentile (nearest rank) and the largest value."""
    ordered = sorted(values)
    rank = {p: ordered[max(0, math.ceil(p / 100 * len(ordered)) - 1)] for p in (50, 99)}
    return {"p50": round(rank[50], 4), "p99": round(rank[99], 4), "max": round(ordered[-1], 4)}


def huge_pages() -> str:
    """The kernel's setting for huge pages in memory files."""
    text = HUGE.read_text(encoding="ascii") if HUGE.exists() else "[absent]"
    return text.partition("[")[2].partition("]")[0]


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the result (benchmarks/results/cpu)")
    return made


def write(name: str, figures: dict[str, Any], targets: dict[str, tuple[float, str, float]], folder: Path) -> int:
    """Writes NAME.json. `targets`: what, (measured, "most" or "least", wanted). A table; 1 if one is missed."""
    result = Result(f"sharing/{name}", "", False, "host", {"huge pages in memory files": huge_pages()})
    result.samples = figures
    result.rows = [
        Row(what, "", have, None, Target("with", "most" if side == "most" else "least", want))
        for what, (have, side, want) in targets.items()
    ]
    result.write(folder)
    return int(any(row.met is False for row in result.rows))

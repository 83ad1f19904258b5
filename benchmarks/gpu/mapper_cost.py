"""What the mapper takes for an extent, over what the driver calls it makes take by themselves.

    python benchmarks/gpu/mapper_cost.py

For extents of each size, in turns: a process that makes the raw calls one after another, and a cache that maps and
unmaps as many extents. `map` is the mapper thread's own time an extent, `map wall` the time that the pool's caller
waits for all of them, over their number. Needs a C++ compiler.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import GIB, MIB, Bare, options, scratch, spread, write

SIZES = (2 * MIB, 16 * MIB, 64 * MIB, 128 * MIB)
BLOCK = 2 * MIB


def main() -> int:
    chosen = options(__doc__)
    figures: dict[str, Any] = {}
    targets: dict[str, tuple[float, float]] = {}
    with scratch() as place:
        program = build(Path(place))
        for size in SIZES:
            count = min(128, 8 * GIB // size)
            raw: list[dict[str, float]] = []
            ours: list[dict[str, float]] = []
            with_cache = Extents(place, size, count)
            for _ in range(chosen.repeats + 1):
                raw += measure_raw(program, size, count)
                ours.append(with_cache.measure())
            with_cache.bare.close()
            label = f"{size // MIB} MiB"
            figures[label] = {
                "extents": count,
                "raw us": {key: spread([one[key] for one in raw[1:]]) for key in ("map", "clear", "unmap")},
                "elastickv us": {key: spread([one[key] for one in ours[1:]]) for key in ours[0]},
            }
            for key in ("map", "unmap"):
                pairs = [mine[key] / theirs[key] for mine, theirs in zip(ours[1:], raw[1:], strict=True)]
                figures[label][f"{key} ratio"] = spread(pairs)
                targets[f"{key} an extent of {label}, mapper / raw calls"] = (statistics.median(pairs), 1.10)
            print(label, json.dumps(figures[label]), flush=True)
    return write("mapper_cost", figures, targets, chosen.output)


class Extents:
    """A cache that holds enough for extents of `size`, and maps and unmaps `count` of them."""

    def __init__(self, place: str, size: int, count: int) -> None:
        self.blocks = count * size // BLOCK
        base = 16 * size // BLOCK
        total = self.blocks + base + 2 * size // BLOCK
        self.bare = Bare(place, f"extents-{size}", blocks=total + 1, block=BLOCK, capacity=64 * GIB, max_extent=size)
        self.count = count
        self.base = self.bare.pool.alloc(base)

    def measure(self) -> dict[str, float]:
        pool = self.bare.pool
        before, began = self.bare.done(), time.perf_counter()
        pool.ensure(self.blocks)
        seconds = time.perf_counter() - began
        after, began = self.bare.done(), time.perf_counter()
        self.bare.give_back()
        back = time.perf_counter() - began
        end = self.bare.done()
        maps, unmaps = after["maps"] - before["maps"], end["unmaps"] - after["unmaps"]
        return {
            "extents": maps,
            "map": (after["map_ns"] - before["map_ns"]) / maps / 1000,
            "map wall": seconds / maps * 1e6,
            "unmap": (end["unmap_ns"] - after["unmap_ns"]) / unmaps / 1000,
            "unmap wall": back / unmaps * 1e6,
        }


def build(place: Path) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        sys.exit("no C++ compiler on the PATH")
    program = place / "raw_calls"
    source = Path(__file__).with_name("raw_calls.cpp")
    subprocess.run([compiler, "-O2", "-std=c++20", str(source), "-o", str(program), "-ldl"], check=True, timeout=120)
    return program


def measure_raw(program: Path, size: int, count: int) -> list[dict[str, float]]:
    """Two rounds of the raw calls, the first of them for warming up."""
    command = [str(program), str(size), str(count), "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return [json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    sys.exit(main())

"""What the mapper takes for an extent, over what the driver calls it makes take by themselves.

    python benchmarks/gpu/mapper_cost.py

For extents of each size, in turns: a process that makes the raw calls one after another, and a cache that maps and
unmaps as many extents. The ratio is of medians over the rounds. Ours is the wall time from the caller's request until
all of it is there, over the number of extents; the mapper thread's own time stands beside it. Needs a C++ compiler.
"""

from __future__ import annotations

import json
import shutil
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
            with Raw(program, size, count) as calls:
                for _ in range(chosen.repeats + 2):
                    raw.append(calls.measure())
                    ours.append(with_cache.measure())
            with_cache.bare.close()
            label = f"{size // MIB} MiB"
            figures[label] = {
                "extents": count,
                "raw us": {key: spread([one[key] for one in raw[2:]]) for key in raw[0]},
                "elastickv us": {key: spread([one[key] for one in ours[2:]]) for key in ours[0]},
            }
            for key in ("map", "unmap"):
                mine = figures[label]["elastickv us"][f"{key} wall"]["median"]
                ratio = mine / figures[label]["raw us"][key]["median"]
                figures[label][f"{key} ratio"] = ratio
                targets[f"{key} an extent of {label}, elastickv / raw calls"] = (ratio, 1.10)
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


class Raw:
    """The process that makes the raw calls. A context manager."""

    def __init__(self, program: Path, size: int, count: int) -> None:
        command = [str(program), str(size), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)

    def measure(self) -> dict[str, float]:
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self.process.stdout.readline())
        return found


if __name__ == "__main__":
    sys.exit(main())

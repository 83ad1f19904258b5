"""What the mapper takes for an extent, over what the driver calls it makes take by themselves.

    python benchmarks/gpu/mapper_cost.py [--small]

For extents of each size, in turns: a process that makes the raw calls one after another, and a cache that maps and
unmaps as many extents. Ours is the wall time from the caller's request until all of it is there, over the number of
extents; the mapper thread's own time stands beside it.

Driver calls are the processor's work, and the cores of a virtual machine differ by half, and change. So both sides of a
round run on one core, which is another one in the next round, and the ratio is the median of the rounds' ratios. The
raw calls are CUDA's and need a C++ compiler; on the host our side runs alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import options
from benchmarks.common.cache import Bare, Raw, scratch, spread
from benchmarks.common.result import Result, Row, Target
from benchmarks.common.stats import paired_ratio
from elastickv.units import format_size, parse_size

FULL = {"repeats": 32, "sizes": "2MiB,16MiB,64MiB,128MiB", "block_size": "2MiB", "most_size": "8GiB"}
SMALL = {"repeats": 2, "sizes": "64KiB,1MiB", "block_size": "64KiB", "most_size": "8MiB"}
ABOUT = {
    **options.ABOUT,
    "sizes": "of an extent, by commas",
    "block_size": "of a block",
    "most_size": "to map in a round; 128 extents at most",
}
WARM_UP = 2
CHEAP = Target("ratio", "most", 1.10)


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    result = Result("gpu/mapper_cost", "", chosen.small, chosen.device, options.settings(chosen))
    result.sides = {"with": "elastickv", "without": "raw calls"}
    if chosen.device == "host":
        result.note("no raw calls on the host: they are CUDA's")
    with scratch() as place:
        for text in chosen.sizes.split(","):
            size = parse_size(text, "--sizes")
            one_size(result, place, chosen.device, size, min(128, chosen.most_size // size), chosen)
    result.write(chosen.output)
    return 0


def one_size(result: Result, place: str, device: str, size: int, count: int, chosen: argparse.Namespace) -> None:
    label = format_size(size)
    raw: list[dict[str, float]] = []
    ours: list[dict[str, float]] = []
    with ExitStack() as stack:
        calls = None if device == "host" else stack.enter_context(Raw(place, size, count))
        extents = Extents(place, device, size, count, chosen.block_size)
        stack.callback(extents.bare.close)
        for turn in range(chosen.repeats + WARM_UP):
            with on_one_core(turn, extents.mapper, *([calls.process.pid] if calls else [])):
                for side in ("raw", "ours") if turn % 2 else ("ours", "raw"):
                    if side == "ours":
                        ours.append(extents.measure())
                    elif calls is not None:
                        raw.append(calls.measure())
    for side, rounds in (("elastickv", ours[WARM_UP:]), ("raw calls", raw[WARM_UP:])):
        if rounds:
            figures = {key: spread([one[key] for one in rounds]) for key in rounds[0]}
            result.samples[f"{label}, {side}, us"] = figures
    for key in ("map", "unmap"):
        mine, its = [one[f"{key} wall"] for one in ours[WARM_UP:]], [one[key] for one in raw[WARM_UP:]]
        medians = (statistics.median(mine), statistics.median(its) if its else None)
        given = paired_ratio(mine, its) if its else None
        result.rows.append(Row(f"{key} an extent of {label}", "us", *medians, CHEAP if its else None, given))


@contextmanager
def on_one_core(turn: int, *threads: int) -> Iterator[None]:
    """Those threads on one core of this machine, the caller on the others, if there are others."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[turn % len(cores)]
    for thread in threads:
        os.sched_setaffinity(thread, {core})
    os.sched_setaffinity(0, set(cores) - {core} or {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class Extents:
    """A cache that holds enough for extents of `size`, and maps and unmaps `count` of them."""

    def __init__(self, place: str, device: str, size: int, count: int, block: int) -> None:
        self.blocks = count * size // block
        base = 16 * size // block
        total = self.blocks + base + 2 * size // block
        shape = {"blocks": total + 1, "block": block, "capacity": 2 * total * block + 64 * size}
        name = f"extents-{size}"
        # A ledger has one capacity as long as a tenant runs on it: each size has its own.
        self.bare = Bare(str(Path(place, name)), device, name, **shape, max_extent=size)
        self.base = self.bare.pool.alloc(base)
        self.mapper = self.bare.mapper()

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
            "extents": float(maps),
            "map": (after["map_ns"] - before["map_ns"]) / maps / 1000,
            "map wall": seconds / maps * 1e6,
            "unmap": (end["unmap_ns"] - after["unmap_ns"]) / unmaps / 1000,
            "unmap wall": back / unmaps * 1e6,
        }


if __name__ == "__main__":
    sys.exit(main())

"""How long a cache takes to grow by 8 GiB, to give it back, and to grow into memory that was freed a moment ago.

    python benchmarks/gpu/growth.py [--small]

Cold: nothing but block 0 is mapped; one request for all blocks. Warm: the blocks were freed a moment ago, and are
mapped still. The same driver calls are made by themselves in turns with it, for absolute times differ from machine to
machine; on the host there are none to make, and the figures stand alone. Blocks of 2 MiB, as a Llama-3.1-8B with 16
tokens a block has them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import options
from benchmarks.common.cache import Bare, Raw, scratch, spread
from benchmarks.common.result import Result, Row, Target
from benchmarks.common.servers import GIB
from elastickv.units import format_size

FULL = {"repeats": 7, "bytes_size": "8GiB", "block_size": "2MiB", "extent_size": "128MiB"}
SMALL = {"repeats": 2, "bytes_size": "32MiB", "block_size": "64KiB", "extent_size": "1MiB"}
ABOUT = {
    **options.ABOUT,
    "bytes_size": "to grow by",
    "block_size": "of a block",
    "extent_size": "the most that one mapping covers",
}
STEPS = 64
KEYS = ("grow ms", "give back ms", "warm us a block", "warm driver calls")


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    result = Result("gpu/growth", "", chosen.small, chosen.device, options.settings(chosen))
    result.sides = {"with": "elastickv", "without": "raw calls"}
    rounds: dict[str, list[float]] = {}
    blocks, count = chosen.bytes_size // chosen.block_size, chosen.bytes_size // chosen.extent_size
    with ExitStack() as stack:
        place = stack.enter_context(scratch())
        calls = None if chosen.device == "host" else stack.enter_context(Raw(place, chosen.extent_size, count))
        more: dict[str, Any] = {"max_extent": chosen.extent_size}
        shape = {"blocks": 2 * blocks, "block": chosen.block_size, "capacity": 4 * chosen.bytes_size}
        bare = Bare(place, chosen.device, "growing", **shape, **more)
        stack.callback(bare.close)
        for number in range(chosen.repeats + 1):
            figures = measure(bare, blocks)
            if calls is not None:
                raw = calls.measure()
                figures |= {"raw up ms": raw["map"] * count / 1000, "raw down ms": raw["unmap"] * count / 1000}
            if number:
                for key, value in figures.items():
                    rounds.setdefault(key, []).append(value)
        result.samples = {key: spread(values) for key, values in rounds.items()}
        result.samples["in steps"] = steps(bare, blocks)
    if calls is None:
        result.note("no raw calls on the host: they are CUDA's")
    rows(result, rounds, chosen)
    result.write(chosen.output)
    return 0


def rows(result: Result, rounds: dict[str, list[float]], chosen: argparse.Namespace) -> None:
    """The two targets in ms are for 8 GiB on a GPU."""
    size = format_size(chosen.bytes_size)
    as_wanted = chosen.bytes_size == 8 * GIB and chosen.device != "host"
    median = {key: statistics.median(values) for key, values in rounds.items()}
    for what, key, raw, most in (
        (f"cold growth by {size}", "grow ms", "raw up ms", 5.0),
        (f"giving {size} back", "give back ms", "raw down ms", 7.0),
    ):
        target = Target("with", "most", most) if as_wanted else None
        result.rows.append(Row(what, "ms", median[key], median.get(raw), target))
    result.rows.append(Row("warm growth, a block", "us", median["warm us a block"], None, Target("with", "most", 1.0)))
    calls = max(rounds["warm driver calls"])
    result.rows.append(Row("driver calls of the warm growth", "", calls, None, Target("with", "most", 0)))


def measure(bare: Bare, blocks: int) -> dict[str, float]:
    pool = bare.pool
    began = time.perf_counter()
    ids, _ = pool.alloc(blocks)
    grown = time.perf_counter()
    extents = float(pool.stats()["extents"])
    pool.release(ids)
    calls = bare.done()["maps"]
    again = time.perf_counter()
    ids, _ = pool.alloc(blocks)
    warm = time.perf_counter()
    calls = bare.done()["maps"] - calls
    pool.release(ids)
    give = time.perf_counter()
    bare.give_back()
    gone = time.perf_counter()
    values = ((grown - began) * 1e3, (gone - give) * 1e3, (warm - again) * 1e6 / blocks, float(calls))
    return {**dict(zip(KEYS, values, strict=True)), "extents": extents}


def steps(bare: Bare, blocks: int) -> dict[str, float]:
    """The same bytes in STEPS requests, as an engine's steps bring them."""
    began = time.perf_counter()
    ids: list[int] = []
    slowest = 0.0
    while len(ids) < blocks:
        start = time.perf_counter()
        ids += bare.pool.alloc(min(max(1, blocks // STEPS), blocks - len(ids)))[0]
        slowest = max(slowest, time.perf_counter() - start)
    seconds = time.perf_counter() - began
    extents = bare.pool.stats()["extents"]
    bare.pool.release(ids)
    bare.give_back()
    return {"grow ms": seconds * 1e3, "slowest step ms": slowest * 1e3, "extents": extents}


if __name__ == "__main__":
    sys.exit(main())

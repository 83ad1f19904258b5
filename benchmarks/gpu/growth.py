"""How long a cache takes to grow by 8 GiB, to give it back, and to grow into memory that was freed a moment ago.

    python benchmarks/gpu/growth.py

Cold: nothing but block 0 is mapped; one request for all blocks. Warm: the blocks were freed a moment ago, and are
mapped still. The same driver calls are made by themselves in turns with it, for absolute times differ from machine to
machine. Blocks of 2 MiB, as a Llama-3.1-8B with 16 tokens a block has them.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import GIB, MIB, Bare, options, scratch, spread, write
from mapper_cost import Raw, build

from elastickv.units import parse_size

BLOCK = 2 * MIB
BLOCKS = 8 * GIB // BLOCK


def main() -> int:
    chosen = options(__doc__, lambda parser: parser.add_argument("--max-extent", help="instead of the default"))
    rounds: dict[str, list[float]] = {}
    more: dict[str, Any] = {} if chosen.max_extent is None else {"max_extent": chosen.max_extent}
    size = 128 * MIB if chosen.max_extent is None else parse_size(chosen.max_extent, "--max-extent")
    count = 8 * GIB // size
    with scratch() as place, Raw(build(Path(place)), size, count) as calls:
        bare = Bare(place, "growing", blocks=2 * BLOCKS, block=BLOCK, capacity=32 * GIB, **more)
        extents = 0
        for number in range(chosen.repeats + 1):
            figures, extents = measure(bare)
            raw = calls.measure()
            figures["raw calls up ms"] = raw["map"] * count / 1000
            figures["raw calls down ms"] = raw["unmap"] * count / 1000
            if number:
                for key, value in figures.items():
                    rounds.setdefault(key, []).append(value)
        stepwise = steps(bare)
        bare.close()
    figures = {key: spread(values) for key, values in rounds.items()}
    figures["extents"] = extents
    figures["in steps of 128 MiB"] = stepwise
    print(figures)
    targets = {
        "cold growth by 8 GiB, ms": (statistics.median(rounds["grow ms"]), 5.0),
        "giving 8 GiB back, ms": (statistics.median(rounds["give back ms"]), 7.0),
        "warm growth, us a block": (statistics.median(rounds["warm us a block"]), 1.0),
        "driver calls of the warm growth": (max(rounds["warm driver calls"]), 0.0),
    }
    return write("growth", figures, targets, chosen.output)


def measure(bare: Bare) -> tuple[dict[str, float], int]:
    pool = bare.pool
    began = time.perf_counter()
    ids, _ = pool.alloc(BLOCKS)
    grown = time.perf_counter()
    extents = pool.stats()["extents"]
    pool.release(ids)
    calls = bare.done()["maps"]
    again = time.perf_counter()
    ids, _ = pool.alloc(BLOCKS)
    warm = time.perf_counter()
    calls = bare.done()["maps"] - calls
    pool.release(ids)
    give = time.perf_counter()
    bare.give_back()
    gone = time.perf_counter()
    return {
        "grow ms": (grown - began) * 1e3,
        "warm us a block": (warm - again) * 1e6 / BLOCKS,
        "warm driver calls": float(calls),
        "give back ms": (gone - give) * 1e3,
    }, extents


def steps(bare: Bare) -> dict[str, float]:
    """The same bytes in 64 requests, as an engine's steps bring them."""
    began = time.perf_counter()
    ids: list[int] = []
    slowest = 0.0
    while len(ids) < BLOCKS:
        start = time.perf_counter()
        ids += bare.pool.alloc(64)[0]
        slowest = max(slowest, time.perf_counter() - start)
    seconds = time.perf_counter() - began
    extents = bare.pool.stats()["extents"]
    bare.pool.release(ids)
    bare.give_back()
    return {"grow ms": seconds * 1e3, "slowest step ms": slowest * 1e3, "extents": extents}


if __name__ == "__main__":
    sys.exit(main())

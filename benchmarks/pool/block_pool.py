"""Allocate and free of blocks: the elastic block pool against vLLM's own, in one process, side by side.

    python benchmarks/pool/block_pool.py [--small]

Every block has memory mapped behind it before the clock starts: what is measured is what a step pays when nothing has
to be mapped.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import options
from benchmarks.common.result import Result, Row, Target
from benchmarks.common.stats import paired_ratio

FULL = {"seconds": 1.0, "repeats": 5}
SMALL = {"seconds": 0.05, "repeats": 1}
ABOUT = {**options.ABOUT, "seconds": "of each measurement"}
TARGETS = {1: 2.0, 64: 1.2, 1000: 1.2}
"""By the number of blocks: the most that ours may take, as a multiple of vLLM's."""

SIZES = (5_000, 100_000)
BLOCK_BYTES = 4096
PAGE = 64 * 1024


def plain(blocks: int) -> Any:
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(blocks, enable_caching=True, hash_block_size=32)


def elastic(blocks: int, directory: str) -> tuple[Any, Callable[[], None]]:
    """Our pool with every block mapped, and what closes it."""
    from elastickv.config import Settings
    from elastickv.engines.vllm.blockpool import adopt
    from elastickv.memory import Cache, RankGeometry, RankMemory

    settings = Settings.load(
        arguments={
            "directory": directory,
            "name": f"bench-{blocks}",
            "device": "host",
            "page": PAGE,
            "max_extent": "4MiB",
            "capacity": 2 * max(SIZES) * BLOCK_BYTES,
            "idle_release": "1h",
        }
    )
    cache = Cache.create(settings, num_blocks=blocks, ranks=[RankGeometry("host", 1, BLOCK_BYTES)], engine="benchmark")
    memory = RankMemory.attach(cache.rank_spec(0))
    cache.wait_ready(10)
    if cache.pool.ensure(blocks - 1) < blocks - 1:
        raise SystemExit(f"not every one of {blocks} blocks could be mapped: {cache.pool.stats()}")
    pool = adopt(plain(blocks), cache.pool, lambda: blocks)

    def close() -> None:
        memory.close()
        cache.close()

    return pool, close


def cycle(pool: Any, count: int, ensure: bool) -> None:
    """What one request pays: the engine asks ours before it allocates, so that is part of it."""
    if ensure:
        pool.ensure(count, patient=True)
    pool.free_blocks(pool.get_new_blocks(count))


def measure(work: Callable[[], None], seconds: float) -> float:
    """Median µs of one call, of batches that take about 1 ms each."""
    began = time.perf_counter()
    repeat = 0
    while time.perf_counter() - began < 0.02:
        work()
        repeat += 1
    batch = max(1, repeat // 20)
    samples = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter_ns()
        for _ in range(batch):
            work()
        samples.append((time.perf_counter_ns() - start) / batch / 1000)
    return statistics.median(samples)


def measure_all(chosen: Any, result: Result) -> None:
    with tempfile.TemporaryDirectory(prefix="elastickv-benchmark-") as place:
        for blocks in SIZES:
            ours, close = elastic(blocks, str(Path(place, "ledgers")))
            theirs = plain(blocks)
            for count, most in TARGETS.items():
                # Interleaved, so that a busy neighbour on the machine troubles both alike.
                sides: dict[str, list[float]] = {"without": [], "with": []}
                for _ in range(chosen.repeats):
                    for side, pool in (("without", theirs), ("with", ours)):
                        work = functools.partial(cycle, pool, count, side == "with")
                        sides[side].append(measure(work, chosen.seconds / chosen.repeats))
                what = f"allocate and free {count:,} of {blocks:,} blocks"
                result.samples[f"{what}, us"] = sides
                ratio = paired_ratio(sides["with"], sides["without"])
                figures = statistics.median(sides["with"]), statistics.median(sides["without"])
                result.rows.append(Row(what, "us", *figures, Target("ratio", "most", most), ratio))
            close()


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    result = Result("pool/block_pool", "", chosen.small, "host", options.settings(chosen))
    result.sides = {"with": "elastickv", "without": "vLLM's pool"}
    measure_all(chosen, result)
    result.write(chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

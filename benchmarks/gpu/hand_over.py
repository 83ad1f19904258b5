"""A neighbour's cached memory becomes ours: until the first extent, until all 8 GiB.

    python benchmarks/gpu/hand_over.py

A is a process of its own whose 8 GiB hold cached blocks and no request; the budget is little more. B asks for one
block, then for the rest.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from common import GIB, MIB, device_id, options, scratch, spread, write

import elastickv

BLOCK = 2 * MIB
BLOCKS = 8 * GIB // BLOCK
CAPACITY = 8 * GIB + 32 * MIB
"""Room for block 0 of each."""
DEADLINE_S = 20.0
IDLE_S = {"a": 60.0, "b": 0.5}


def cache_of(directory: str, name: str, lost: list[int]) -> Any:
    device = elastickv.open_device(device_id(), capacity=CAPACITY, directory=directory)
    member = device.join(name, stock=0, idle_release=IDLE_S[name])
    return member.cache(num_blocks=BLOCKS + 64, block_bytes=BLOCK, on_evict=lost.extend)


def neighbour(directory: str) -> None:
    """A: whenever a line comes it fills itself again and says so."""
    lost: list[int] = []
    cache = cache_of(directory, "a", lost)
    for _ in sys.stdin:
        until = time.monotonic() + DEADLINE_S
        held = int(cache.stats()["cached_blocks"])
        while held < BLOCKS and time.monotonic() < until:
            got = cache.alloc(min(64, BLOCKS - held))
            if got:
                cache.free(got, cached=True)
            held = int(cache.stats()["cached_blocks"])
        print(cache.stats()["cached_blocks"], flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--neighbour"]:
        neighbour(sys.argv[2])
        return 0
    chosen = options(__doc__)
    rounds: dict[str, list[float]] = {}
    with scratch() as place:
        command = [sys.executable, __file__, "--neighbour", place]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                cache = cache_of(place, "b", [])
                for number in range(chosen.repeats + 1):
                    figures = measure(cache, process)
                    if number:
                        for key, value in figures.items():
                            rounds.setdefault(key, []).append(value)
                cache.close()
            finally:
                process.kill()
                process.wait(20)
    figures = {key: spread(values) for key, values in rounds.items()}
    print(figures)
    targets = {
        "until the first extent, ms": (statistics.median(rounds["first ms"]), 2.0),
        "until all 8 GiB, ms": (statistics.median(rounds["all ms"]), 40.0),
    }
    return write("hand_over", figures, targets, chosen.output)


def measure(cache: Any, process: subprocess.Popen[str]) -> dict[str, float]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the neighbour's pipes are missing")
    process.stdin.write("fill\n")
    process.stdin.flush()
    cached = int(process.stdout.readline())
    time.sleep(0.3)  # A is idle
    if cached < BLOCKS:
        raise RuntimeError(f"the neighbour holds {cached} of {BLOCKS} blocks")
    began = time.perf_counter()
    first, _ = insist(cache, 1, began)
    at_first = time.perf_counter()
    rest, tries = insist(cache, BLOCKS - 1, began)
    done = time.perf_counter()
    cache.free(first + rest)
    give_up(cache)
    return {
        "first ms": (at_first - began) * 1e3,
        "all ms": (done - began) * 1e3,
        "refusals": float(tries),
    }


def insist(cache: Any, count: int, began: float) -> tuple[list[int], int]:
    """The blocks, and how often the answer was "none now" before."""
    tries = 0
    while time.perf_counter() < began + DEADLINE_S:
        got: list[int] | None = cache.alloc(count)
        if got is not None:
            return got, tries
        tries += 1
    raise RuntimeError(f"{count} blocks were not given within {DEADLINE_S} s: {cache.stats()}")


def give_up(cache: Any) -> None:
    """Waits until the idle clock has unmapped what B held: the next round starts from A holding everything."""
    until = time.monotonic() + DEADLINE_S
    while cache.mapped_bytes > 2 * BLOCK and time.monotonic() < until:
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())

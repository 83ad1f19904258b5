"""A neighbour's cached memory becomes ours: until the first extent, until all 8 GiB.

    python benchmarks/gpu/hand_over.py [--small]

A is a process of its own whose 8 GiB hold cached blocks and no request; the budget is little more. B asks for one
block, then for the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import elastickv
from benchmarks.common import options
from benchmarks.common.cache import host_settings, scratch, spread
from benchmarks.common.result import Result, Row, Target
from benchmarks.common.servers import GIB, device_id
from elastickv.units import format_size

FULL = {"repeats": 7, "bytes_size": "8GiB", "block_size": "2MiB"}
SMALL = {"repeats": 2, "bytes_size": "32MiB", "block_size": "64KiB"}
ABOUT = {**options.ABOUT, "bytes_size": "that change hands", "block_size": "of a block"}
SPARE = 16
"""Blocks beyond those that change hands: block 0 of each, and more."""
DEADLINE_S = 20.0
IDLE_S = {"a": 60.0, "b": 0.5}


def cache_of(shape: dict[str, Any], name: str, lost: list[int]) -> Any:
    blocks, block = shape["blocks"], shape["block"]
    capacity = (blocks + SPARE) * block
    device = elastickv.open_device(device_id(shape["device"]), capacity=capacity, directory=shape["directory"])
    member = device.join(name, stock=0, idle_release=IDLE_S[name], **host_settings(shape["device"]))
    return member.cache(num_blocks=blocks + 64, block_bytes=block, on_evict=lost.extend)


def neighbour(shape: dict[str, Any]) -> None:
    """A: whenever a line comes it fills itself again and says so."""
    lost: list[int] = []
    cache = cache_of(shape, "a", lost)
    for _ in sys.stdin:
        until = time.monotonic() + DEADLINE_S
        held = int(cache.stats()["cached_blocks"])
        while held < shape["blocks"] and time.monotonic() < until:
            got = cache.alloc(min(64, shape["blocks"] - held))
            if got:
                cache.free(got, cached=True)
            held = int(cache.stats()["cached_blocks"])
        print(cache.stats()["cached_blocks"], flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--neighbour"]:
        neighbour(json.loads(sys.argv[2]))
        return 0
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    result = Result("gpu/hand_over", "", chosen.small, chosen.device, options.settings(chosen))
    rounds: dict[str, list[float]] = {}
    blocks = chosen.bytes_size // chosen.block_size
    with ExitStack() as stack:
        place = stack.enter_context(scratch())
        shape = {"directory": place, "device": chosen.device, "blocks": blocks, "block": chosen.block_size}
        command = [sys.executable, __file__, "--neighbour", json.dumps(shape)]
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(process.kill)
        cache = stack.enter_context(cache_of(shape, "b", []))
        for number in range(chosen.repeats + 1):
            figures = measure(cache, process, blocks)
            if number:
                for key, value in figures.items():
                    rounds.setdefault(key, []).append(value)
            give_up(cache, chosen.block_size)
    result.samples = {key: spread(values) for key, values in rounds.items()}
    rows(result, rounds, chosen)
    result.write(chosen.output)
    return 0


def rows(result: Result, rounds: dict[str, list[float]], chosen: argparse.Namespace) -> None:
    """The targets are for 8 GiB on a GPU."""
    as_wanted = chosen.bytes_size == 8 * GIB and chosen.device != "host"
    size = format_size(chosen.bytes_size)
    for what, key, most in (("the first extent", "first ms", 2.0), (f"all {size}", "all ms", 40.0)):
        target = Target("with", "most", most) if as_wanted else None
        result.rows.append(Row(f"until {what}", "ms", statistics.median(rounds[key]), None, target))
    result.rows.append(Row("refusals before that, most", "", max(rounds["refusals"])))


def measure(cache: Any, process: subprocess.Popen[str], blocks: int) -> dict[str, float]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the neighbour's pipes are missing")
    process.stdin.write("fill\n")
    process.stdin.flush()
    cached = int(process.stdout.readline())
    time.sleep(0.3)  # A is idle
    if cached < blocks:
        raise RuntimeError(f"the neighbour holds {cached} of {blocks} blocks")
    began = time.perf_counter()
    first, _ = insist(cache, 1, began)
    at_first = time.perf_counter()
    rest, tries = insist(cache, blocks - 1, began)
    done = time.perf_counter()
    cache.free(first + rest)
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


def give_up(cache: Any, block: int) -> None:
    """Waits until the idle clock has unmapped what B held: the next round starts from A holding everything."""
    until = time.monotonic() + DEADLINE_S
    while cache.mapped_bytes > 2 * block and time.monotonic() < until:
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())

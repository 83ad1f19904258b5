"""A neighbour's 1 GiB of cached pages becomes ours: how long, from an idle and from a busy neighbour.

    python benchmarks/sharing/give_back.py [--rounds 1000] [--page 2MiB] [--name give_back]

The budget is 1 GiB and a little. In each round the neighbour, a process of its own, fills it with cached blocks; then
we ask for all of it, and the clock runs. "leased": until the bytes are ours on the ledger, which is when the neighbour
has unmapped them and the kernel has them back. "mapped": until our pool hands out blocks for all of it, mapped and
reading as zero. An idle neighbour is woken by its bell. A busy one looks between two steps (of --step ms), and the
steps that it began from our asking until all was leased are counted.
"""

from __future__ import annotations

import os
import select
import sys
import tempfile
import time
from typing import Any

import common

import elastickv
from elastickv import _core
from elastickv.units import parse_size

BLOCK = 2 * common.MIB
BLOCKS = common.GIB // BLOCK
STEP_BLOCKS = 2
"""What a busy neighbour allocates and frees in every step."""


def capacity(page: int, extent: int) -> int:
    """1 GiB, block 0 of each, and the extents that a busy neighbour works in, which it cannot give."""
    return common.GIB + 4 * max(BLOCK, page) + 4 * extent


def filling(page: int, extent: int) -> int:
    """The cached blocks of the neighbour when it has all but block 0 of each."""
    return (capacity(page, extent) - 4 * max(BLOCK, page)) // BLOCK


def idle_neighbour(directory: str, page: int, extent: int) -> None:
    full = filling(page, extent)
    with elastickv.open_device("host", capacity=capacity(page, extent), directory=directory) as device:
        member = device.join("neighbour", page=page, max_extent=extent, stock=0, idle_release=600)
        cache = member.cache(num_blocks=2 * BLOCKS, block_bytes=BLOCK)
        for _ in sys.stdin:
            while cache.stats()["cached_blocks"] < full:
                got = cache.alloc(full - int(cache.stats()["cached_blocks"]))
                if got:
                    cache.free(got, cached=True)
            common.answer(cache.stats()["cached_blocks"])


def busy_neighbour(directory: str, page: int, extent: int, step_s: float) -> None:
    """Steps as an engine does: looks after the pool, allocates, sends the order along, works."""
    hand = common.Hand(
        directory,
        "neighbour",
        blocks=2 * BLOCKS,
        block=BLOCK,
        capacity=capacity(page, extent),
        page=page,
        max_extent=extent,
        idle_release=600,
    )
    full = filling(page, extent)
    steps: list[float] = []
    held: list[int] = []
    os.set_blocking(sys.stdin.fileno(), False)
    while True:
        steps.append(time.monotonic())
        if hand.pool.attention():
            hand.pool.maintain(False)
        if held:
            hand.pool.release(held)
        got = hand.pool.alloc(STEP_BLOCKS)
        held = got[0] if got else []
        hand.deliver()
        if select.select([sys.stdin], [], [], step_s)[0]:
            word = sys.stdin.readline().strip()
            if not word:
                return
            if word == "fill":
                while (missing := full - STEP_BLOCKS - int(hand.pool.stats()["cached_blocks"])) > 0:
                    hand.pool.release(hand.insist(missing), True)
                steps.clear()
            common.answer(steps)


class Asker:
    """Us: a pool for "mapped", a bare place on the ledger for "leased"."""

    def __init__(self, directory: str, page: int, extent: int) -> None:
        self._hand = common.Hand(
            directory,
            "asker",
            blocks=2 * BLOCKS,
            block=BLOCK,
            capacity=capacity(page, extent),
            page=page,
            max_extent=extent,
        )
        self._bare = _core.Ledger.open(directory, "host").join("bare")

    def leased(self) -> tuple[float, float]:
        """When it was asked and when it was had."""
        began = time.monotonic()
        while not self._bare.lease(common.GIB, ring=True):
            if time.monotonic() > began + common.DEADLINE_S:
                raise RuntimeError("1 GiB was not leased in time")
            self._bare.wait_freed(self._bare.freed_word(), 2_000)
        done = time.monotonic()
        self._bare.give(common.GIB)
        return began, done

    def mapped(self) -> tuple[float, float]:
        began = time.monotonic()
        ids = self._hand.insist(BLOCKS)
        done = time.monotonic()
        self._hand.give_up(ids)
        return began, done


def measure(kind: str, rounds: int, page: int, extent: int, step_s: float) -> dict[str, Any]:
    milliseconds: dict[str, list[float]] = {"leased": [], "mapped": []}
    steps: list[float] = []
    with tempfile.TemporaryDirectory(prefix="elastickv-benchmark-") as place:
        directory = f"{place}/ledgers"
        with common.neighbour(__file__, "--neighbour", kind, directory, str(page), str(extent), str(step_s)) as other:
            other.say("fill")
            asker = Asker(directory, page, extent)
            for what, ask in {"leased": asker.leased, "mapped": asker.mapped}.items():
                for number in range(rounds + 2):
                    other.say("fill")
                    time.sleep(0.005 + number % 7 * step_s / 7)  # at another moment of its step each time
                    began, done = ask()
                    if number < 2:
                        continue  # the machine's memory may be new to it
                    milliseconds[what].append((done - began) * 1e3)
                    if kind == "busy" and what == "leased":
                        steps.append(float(sum(began < step <= done for step in other.say("steps"))))
    out: dict[str, Any] = {f"{what}, ms": common.spread(values) for what, values in milliseconds.items()}
    if steps:
        out["steps of the neighbour"] = common.spread(steps)
    return out


def main() -> int:
    if sys.argv[1:2] == ["--neighbour"]:
        kind, directory, page, extent, step_s = sys.argv[2:7]
        if kind == "idle":
            idle_neighbour(directory, int(page), int(extent))
        else:
            busy_neighbour(directory, int(page), int(extent), float(step_s))
        return 0
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--page", default="2MiB", help="page of the host driver (2MiB)")
    parser.add_argument("--extent", default="64MiB", help="largest extent (64MiB)")
    parser.add_argument("--step", type=float, default=10.0, help="a busy neighbour's step, milliseconds (10)")
    parser.add_argument("--name", default="give_back", help="of the result file")
    chosen = parser.parse_args()
    page, extent = parse_size(chosen.page, "--page"), parse_size(chosen.extent, "--extent")
    figures: dict[str, Any] = {"bytes": common.GIB, "rounds each": chosen.rounds, "page": page, "extent": extent}
    for kind in ("idle", "busy"):
        figures[kind] = measure(kind, chosen.rounds, page, extent, chosen.step / 1e3)
        print(kind, figures[kind])
    targets = {
        "an idle neighbour's 1 GiB leased, p50 ms": (figures["idle"]["leased, ms"]["p50"], "most", 50.0),
        "an idle neighbour's 1 GiB leased, p99 ms": (figures["idle"]["leased, ms"]["p99"], "most", 50.0),
        "the same mapped and zero, p50 ms": (figures["idle"]["mapped, ms"]["p50"], "most", 50.0),
        "a busy neighbour's steps, p99": (figures["busy"]["steps of the neighbour"]["p99"], "most", 2.0),
    }
    return common.write(chosen.name, figures, targets, chosen.output)


if __name__ == "__main__":
    sys.exit(main())

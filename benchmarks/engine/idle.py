"""The KV cache that an engine still holds 2 s after its last request: managed (prefix caching off, on) and plain.

    python benchmarks/engine/idle.py [--small]

Weights and graphs are not counted. The managed engines' figure is the ledger's; on the host the kernel's stands beside
it. With prefix caching `cache_release` is 1 s. A plain engine's cache is as large as at its start, always.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import load, options, schedule
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.result import Result, Row, Target
from benchmarks.common.schedule import Shape
from benchmarks.common.servers import MIB, Fleet, plain_twin
from elastickv.demo.engines import Engine

FULL = {**options.ENGINE, "shape": "512+128", "requests": 128, "kv_size": "6GiB", "repeats": 3, "seed": 0}
SMALL = {**options.SMALL, "shape": "64+16", "requests": 12, "kv_size": "8MiB", "repeats": 1}
ABOUT = {
    **options.ABOUT,
    "shape": "tokens of prompt+answer",
    "requests": "before it is left alone",
    "kv_size": "KV cache of each engine",
}
AFTER_S = 2.0
WATCH_S = 3.0
KEPT_MIB = 8.0
"""The target, for a cache of 256 MiB and more; 1/32 of a smaller one."""
RELEASE = {"--idle-release": "1s", "--cache-release": "1s"}


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    result = Result("engine/idle", chosen.engine, chosen.small, chosen.device, options.settings(chosen))
    shape = Shape.parse(chosen.shape)
    # A budget of its own for each of the two, as the plain one has it.
    with Fleet(chosen.engine, chosen.device, chosen.model, 2 * chosen.kv_size, chosen.start_deadline) as fleet:
        off = Spec("off", True, chosen.kv_size, seqs=chosen.seqs, max_len=sum(shape) + 16, options=RELEASE)
        on = Spec("on", True, chosen.kv_size, True, chosen.seqs, sum(shape) + 16, RELEASE)
        servers = fleet.up(plain_twin(off, "plain", chosen.kv_size), off, on)
        for name, server in zip(("plain", "prefix caching off", "prefix caching on"), servers, strict=True):
            for number in range(chosen.repeats):
                arrivals = schedule.at_once(chosen.requests)
                seed = chosen.seed + number
                asked = fleet.requests(server, arrivals, shape, seed)
                done = load.run(asked)
                result.account("with" if server.managed else "without", name, done)
                if server.managed:
                    found = watch(fleet, server)
                    print(f"{name}: {found}", flush=True)
                    result.samples.setdefault(name, []).append(found)
    rows(result, chosen)
    result.write(chosen.output)
    return 0


def watch(fleet: Fleet, server: Engine) -> dict[str, Any]:
    """What it holds from the last answer on, for WATCH_S seconds, in MiB."""
    ended = time.monotonic()
    ledger = fleet.ledger_reader(server.name)
    kernel = fleet.kernel_memory(server) if fleet.device == "host" else None
    found: dict[str, Any] = {"at once MiB": ledger().leased / MIB, "after 2 s MiB": None, "seconds until 8 MiB": None}
    while (now := time.monotonic()) < ended + WATCH_S:
        held = ledger().leased / MIB
        if found["seconds until 8 MiB"] is None and held <= KEPT_MIB:
            found["seconds until 8 MiB"] = round(now - ended, 3)
        if found["after 2 s MiB"] is None and now >= ended + AFTER_S:
            found["after 2 s MiB"] = held
            found["after 2 s MiB, kernel"] = kernel.bytes() / MIB if kernel else None
        time.sleep(0.01)
    return found


def rows(result: Result, chosen: argparse.Namespace) -> None:
    plain = chosen.kv_size / MIB
    kept = Target("with", "most", min(KEPT_MIB, plain / 32))
    for name in ("prefix caching off", "prefix caching on"):
        # The worst round: one engine that keeps its memory is one too many.
        held = max(one["after 2 s MiB"] for one in result.samples[name])
        what = f"{name}: KV held {AFTER_S:g} s after the last request"
        result.rows.append(Row(what, "MiB", held, plain, kept, spoilt=result.failures["with"]))
        kernel = [one["after 2 s MiB, kernel"] for one in result.samples[name]]
        if None not in kernel:
            result.rows.append(Row(f"{name}: the same by the kernel", "MiB", max(kernel), plain, kept))


if __name__ == "__main__":
    sys.exit(main())

"""From the call that wakes a sleeping engine until its first token, managed and plain.

    python benchmarks/engine/wake.py

Its sleep is vLLM's of level 1, or SGLang's release of its memory, for which torch_memory_saver has to be installed.
Needs a GPU: engines on the CPU do not sleep, and the stand-in knows no sleep. What the device has free while the engine
sleeps is measured too.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import load, options, schedule
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.result import Result, Row, Target, gpu_uuid
from benchmarks.common.schedule import Shape
from benchmarks.common.servers import GIB, Fleet, plain_twin
from benchmarks.common.stats import paired_ratio
from elastickv.demo.engines import Engine
from elastickv.engines import Server, adapter
from elastickv.memory import gpu

FULL = {**options.ENGINE, "shape": "128+16", "repeats": 7, "kv_size": "8GiB", "seed": 0}
SMALL = {**options.SMALL, "repeats": 1, "kv_size": "8MiB"}
ABOUT = {**options.ABOUT, "shape": "tokens of prompt+answer", "kv_size": "KV cache of each engine"}
CALL_S = 120.0
SOON = Target("with", "most", 0.7)


def main() -> int:
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    if chosen.device == "host" or chosen.engine == "stand-in":
        what = "the stand-in has no sleep" if chosen.engine == "stand-in" else "engines on the CPU do not sleep"
        print(f"error: wake: {what}, so there is nothing to measure; run it on a machine with a GPU", file=sys.stderr)
        return 3
    shape = Shape.parse(chosen.shape)
    result = Result("engine/wake", chosen.engine, chosen.small, chosen.device, options.settings(chosen))
    # Weights are on the ledger here, for waking has to lease them first; what there is elastickv finds out by itself.
    with Fleet(chosen.engine, chosen.device, chosen.model, 0, chosen.start_deadline) as fleet:
        most = sum(shape) + 16
        calls = adapter(chosen.engine).server
        settings = {"ELASTICKV_STATIC": "auto"} | dict(calls.environment)
        managed = Spec("managed", True, chosen.kv_size, False, chosen.seqs, most, {}, calls.sleep_arguments, settings)
        plain, ours = fleet.up(plain_twin(managed, "plain", chosen.kv_size), managed)
        found: dict[str, list[float]] = {"with": [], "without": []}
        for turn, side in enumerate(schedule.alternate(chosen.repeats + 1, ("without", "with"))):
            server = ours if side == "with" else plain
            one = wake(calls, server, fleet.requests(server, [0.0], shape, chosen.seed), result, side)
            if turn >= 2 and one is not None:
                found[side].append(one)
    medians = {side: statistics.median(series) if series else None for side, series in found.items()}
    given = paired_ratio(found["with"], found["without"]) if len(found["with"]) == len(found["without"]) else None
    what = "from waking until the first token"
    spoilt = result.failures["with"]
    result.rows.append(Row(what, "s", medians["with"], medians["without"], SOON, given, spoilt))
    result.samples["seconds"] = found
    result.write(chosen.output)
    return 0


def wake(calls: Server, server: Engine, asked: list[load.Request], result: Result, side: str) -> float | None:
    """Seconds; None where it failed, which is counted."""

    def ask() -> load.Load:
        return load.run(asked)

    def call(path: str) -> None:
        httpx.post(f"{server.url}{path}", json={}, timeout=CALL_S).raise_for_status()

    try:
        before = ask()
        awake = used_bytes(result.device)
        call(calls.sleep)
        freed = awake - used_bytes(result.device)
        began = time.monotonic()
        call(calls.wake)
        called = time.monotonic() - began
        after = ask()
    except httpx.HTTPError as error:
        result.fail(side, [f"{type(error).__name__}: {error}"])
        return None
    result.fail(side, [one.error for one in (*before.failures, *after.failures)])
    sample = {"wake_up call, s": called, "freed by sleep, GiB": freed / GIB}
    result.samples.setdefault(f"rounds, {side}", []).append(sample)
    if before.failures or after.failures:
        return None
    return called + after.outcomes[0].first


def used_bytes(device: str) -> int:
    """Of the GPU, by all processes."""
    return gpu.device_memory(gpu_uuid(device))[1]


if __name__ == "__main__":
    sys.exit(main())

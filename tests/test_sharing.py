"""Sharing with real pools: weights, floors, and the prefix cache's own budget."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elastickv
from elastickv import _core
from elastickv.config import process_environment
from support import Outcome

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024 * 1024
BLOCK = 64 * 1024


def fairness(folder: Path, *options: str) -> dict[str, Any]:
    """The figures of the benchmark, on a small scale."""
    script = ROOT / "benchmarks/sharing/fairness.py"
    command = [sys.executable, str(script), "--rounds", "300", "--visits", "4", "--output", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=process_environment(), check=False)
    assert done.returncode in (0, 1), done.stderr
    figures: dict[str, Any] = json.loads((folder / "fairness.json").read_text(encoding="utf-8"))["samples"]
    return figures


def check_fair(figures: dict[str, Any]) -> None:
    assert figures["jain"] >= 0.98
    assert all(abs(tenant["of its share"] - 1) <= 0.05 for tenant in figures["tenants"].values())
    assert min(floor["given"]["give-back rounds"] for floor in figures["floors"]) <= 1.25
    assert figures["held of the budget"] > 0.9
    for name, tenant in figures["tenants"].items():
        assert tenant["requests"] > 100, name
        # One that has waited for a second goes ahead of everybody; the rest is the machine's.
        assert tenant["most rounds without a new request"] < tenant["rounds"] / 2, name


def test_saturating_tenants_hold_by_weight_and_a_floor_is_met(tmp_path: Path) -> None:
    check_fair(fairness(tmp_path, "--seconds", "3"))


def test_the_same_where_an_extent_has_many_blocks(tmp_path: Path) -> None:
    """A block in use keeps its whole extent: without draining, nothing would ever come back."""
    check_fair(fairness(tmp_path, "--seconds", "3", "--extent", "16"))


def test_cached_blocks_stay_within_their_own_budget_and_the_oldest_go(tmp_path: Path) -> None:
    lost: list[int] = []
    with elastickv.open_device("host", capacity=8 * MIB, directory=str(tmp_path / "d")) as device:
        cache = device.join("one", cache_limit=MIB).cache(num_blocks=100, block_bytes=BLOCK, on_evict=lost.extend)
        ids = cache.alloc(40)
        assert ids is not None
        cache.free(ids[:20], cached=True)
        until = time.monotonic() + 10
        while len(lost) < 4:
            assert time.monotonic() < until, "nothing was evicted"
            time.sleep(0.005)
        assert lost == ids[:4]
        stats = cache.stats()
        (tenant,) = device.view().tenants
        assert (stats["cached"], tenant.counters.evicted_budget) == (MIB, 4)
        assert stats["leased"] >= 41 * BLOCK  # what was evicted stays mapped, for the next allocation
        cache.check_integrity()


def test_an_idle_tenants_whole_cache_goes_before_a_working_one_is_held_to_its_share(tmp_path: Path) -> None:
    with elastickv.open_device("host", capacity=64 * BLOCK, directory=str(tmp_path / "d")) as device:
        idle, busy = (device.join(name, stock=0).cache(num_blocks=80, block_bytes=BLOCK) for name in ("idle", "busy"))
        ids = idle.alloc(50)
        assert ids is not None
        idle.free(ids, cached=True)
        until = time.monotonic() + 20
        while busy.stats()["leased"] < 60 * BLOCK:  # of 63; a request for four more cannot be met beyond
            assert time.monotonic() < until, (idle.stats(), busy.stats())
            got = busy.alloc(4)
            if got is not None:
                busy.free(got, cached=True)
            time.sleep(0.002)
        idle.check_integrity()
        busy.check_integrity()


def test_a_tenant_that_does_not_answer_is_shown_as_late(
    directory: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = _core.Ledger.open(str(directory), "host", capacity=64 * MIB)
    silent, waiting = ledger.join("silent"), ledger.join("waiting")
    assert silent.lease(60 * MIB)
    silent.publish(cached=60 * MIB)
    until = time.monotonic() + 20
    while not any(row["counters"]["late"] for row in ledger.view()["tenants"]):
        assert time.monotonic() < until
        assert not waiting.lease(10 * MIB, ring=True)
        time.sleep(0.02)
    monkeypatch.setenv("COLUMNS", "200")
    lines = cli("status", "--dir", directory, "--device", "host").out.splitlines()
    (line,) = [line for line in lines if "silent" in line]
    assert "answered late 1x" in line
    assert not any("late" in line for line in lines if "waiting" in line)

"""What a rank of SGLang on a GPU leases and publishes besides its cache, with figures of PyTorch and NVML put in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastickv._core import Ledger
from elastickv.config import Settings
from elastickv.ledger import TenantView, read_device
from elastickv.memory import Tenancy, gpu
from elastickv.planning.static import allowance

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

MIB = 1 << 20
WEIGHTS = 64 * MIB


@dataclass
class Figures:
    """MiB: of PyTorch now and at most, and of the whole process by NVML."""

    reserved: int = 900
    peak: int = 900
    process: int = 1500
    enabled: bool = False
    """Whether SGLang's memory saver is on."""


@dataclass
class Rank:
    figures: Figures
    holdings: Any
    directory: Path

    @property
    def row(self) -> TenantView:
        return read_device(Ledger.open(str(self.directory), "host")).tenant("one")


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Iterator[Rank]:
    """Its lease is on the host's ledger; all else is as on a GPU."""
    import torch

    from elastickv.engines.sglang import holdings, ranks
    from elastickv.engines.static import StaticLease

    figures = Figures()
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: figures.reserved * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: figures.peak * MIB)
    for name in ("empty_cache", "reset_peak_memory_stats", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(gpu, "process_memory", lambda uuid, pid: figures.process * MIB)
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine])
    monkeypatch.setattr(holdings, "_EVERY_S", 0.0)
    model = torch.nn.Linear(WEIGHTS // 4 // 1024, 1024, bias=False)
    runner = SimpleNamespace(model=model, memory_saver_adapter=figures)
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    settings = {"directory": str(directory), "name": "one", "capacity": 1 << 40, "static": "checkpoint"}
    tenancy = Tenancy.join(Settings.load(arguments=settings), ["host"])
    lease = StaticLease(tenancy, ["host"], lambda: None, logging.getLogger("test"))
    lease.reserve([4096 * MIB])
    made = holdings.Holdings("GPU-AAAA", lease, tenancy.place(["host"], publishes=True)[0], scheduler)
    yield Rank(figures, made, directory)
    made.close()
    tenancy.close()


def test_the_allowance_stays_on_top_of_what_was_loaded(rank: Rank) -> None:
    """The first lease was too large, and is corrected; graphs fit the allowance, and then they do not."""
    rank.holdings.loaded()
    first = 1500 * MIB + allowance(WEIGHTS, on_gpu=True)
    assert rank.row.static_bytes == first
    rank.figures.reserved, rank.figures.peak, rank.figures.process = 1000, 1100, 1700
    rank.holdings.ready()
    assert (rank.row.static_bytes, rank.row.static_used) == (first, 1700 * MIB)
    rank.figures.reserved, rank.figures.peak, rank.figures.process = 9000, 9100, 9700
    rank.holdings.ready()
    assert (rank.row.static_bytes, rank.row.static_used) == (9800 * MIB, 9700 * MIB)


def test_what_grows_later_is_said_and_the_cache_is_not_in_it(rank: Rank) -> None:
    rank.holdings.memory = SimpleNamespace(mapped_bytes=300 * MIB)
    rank.holdings.ready()
    assert rank.row.static_used == 1200 * MIB
    rank.figures.reserved += 50
    rank.holdings.tick()
    assert rank.row.static_used == 1250 * MIB


def test_what_the_memory_saver_has_taken_goes_back(rank: Rank) -> None:
    """PyTorch goes on counting it."""
    rank.figures.enabled = True
    rank.holdings.loaded()
    rank.holdings.ready()
    before = rank.row.static_bytes
    rank.figures.process -= 64 + 100  # graphs went as well, and nobody counts them
    rank.holdings.shrink(["weights", "cuda_graph"])
    assert (rank.row.static_bytes, rank.row.static_used) == (1336 * MIB, 1336 * MIB)
    rank.holdings.lease.grow_to_wake([rank.holdings.publish(["weights", "cuda_graph"])], weights=True)
    assert rank.row.static_bytes == before


def test_without_a_memory_saver_nothing_goes(rank: Rank) -> None:
    rank.holdings.loaded()
    before = rank.row.static_bytes
    rank.holdings.shrink(["weights", "cuda_graph"])
    assert rank.row.static_bytes == before

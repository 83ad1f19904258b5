"""What a process caches for itself is given back before the device counts as full."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import elastickv
from elastickv import _core
from elastickv.memory import BlockCache

MIB = 1024 * 1024
BLOCK = 256 * 1024


@pytest.fixture
def faulty() -> _core.FaultyDriver:
    return _core.faulty(_core.open_driver("host", page_bytes=64 * 1024))


@pytest.fixture
def cache(tmp_path: Path, faulty: _core.FaultyDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockCache]:
    """A cache whose driver finds no memory from now on, until something heals it."""
    monkeypatch.setattr(_core, "open_driver", lambda *_, **__: faulty)
    with (
        elastickv.open_device("host", capacity=64 * MIB, directory=str(tmp_path / "d")) as device,
        device.join("one", stock=0).cache(num_blocks=1024, block_bytes=BLOCK) as made,
    ):
        yield made
        made.check_integrity()


def no_memory(faulty: _core.FaultyDriver) -> None:
    faulty.fail_every("create", 1)


def test_the_mapping_goes_on_with_what_was_given_back(cache: BlockCache, faulty: _core.FaultyDriver) -> None:
    given: list[str] = []

    def give_up() -> None:
        given.append("back")
        faulty.heal()

    cache.set_reclaimer(give_up)
    no_memory(faulty)
    assert cache.alloc(8) is not None
    assert given == ["back"]
    assert cache.stats()["map_failures"] == 0


def test_without_anybody_to_ask_it_is_none_now(cache: BlockCache, faulty: _core.FaultyDriver) -> None:
    no_memory(faulty)
    assert cache.alloc(8) is None
    faulty.heal()
    cache.set_reclaimer(faulty.heal)
    cache.set_reclaimer(None)
    no_memory(faulty)
    assert cache.alloc(8) is None
    faulty.heal()
    assert cache.alloc(8) is not None


def fails() -> None:
    raise RuntimeError("the allocator is busy")


@pytest.mark.parametrize(("gives", "warnings"), [(lambda: None, 0), (fails, 1)])
def test_nothing_to_give_is_none_now_and_is_asked_once_a_second_at_most(
    cache: BlockCache,
    faulty: _core.FaultyDriver,
    gives: Callable[[], object],
    warnings: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = 0

    def give_up() -> None:
        nonlocal asked
        asked += 1
        gives()

    cache.set_reclaimer(give_up)
    no_memory(faulty)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "elastickv"):
        assert cache.alloc(8) is None
        assert asked == 1
        while time.monotonic() < start + 0.5:
            assert cache.alloc(8) is None
        assert asked <= 1 + (time.monotonic() - start)
        assert len([record for record in caplog.records if "has failed" in record.message]) == asked * warnings
    faulty.heal()
    assert cache.alloc(8) is not None


def test_one_that_takes_long_is_not_waited_for(cache: BlockCache, faulty: _core.FaultyDriver) -> None:
    """The wait has a deadline, after which the mapping is tried once more."""
    go_on, finished = threading.Event(), threading.Event()

    def give_up() -> None:
        faulty.heal()
        go_on.wait(60)
        finished.set()

    cache.set_reclaimer(give_up)
    no_memory(faulty)
    assert cache.alloc(8) is not None
    assert not finished.is_set()
    go_on.set()


def test_what_the_driver_does_not_let_go_stays_leased(tmp_path: Path, faulty: _core.FaultyDriver) -> None:
    """As where an engine is made anew in a process whose tenant stays."""
    page, blocks = 64 * 1024, 60
    (tmp_path / "d").mkdir(mode=0o700)
    ledger = _core.Ledger.open(str(tmp_path / "d"), "host", capacity=64 * MIB)
    tenant = ledger.join("one")
    table = _core.PageTable.create(blocks, 1, tenant.incarnation)
    pool = _core.Pool.make(table, [(tenant, page)], blocks, page, page, 1, stock_pages=0)
    member = ledger.attach(tenant.slot, tenant.incarnation)
    opened = _core.PageTable.open(table.path, tenant.incarnation)
    rank = _core.Rank.attach(faulty, opened, member, 0, 1, blocks * page, page)
    pool.wait_ready(5000)
    assert pool.alloc(20)
    assert tenant.leased == faulty.stats()["mapped_bytes"] == 21 * page
    faulty.fail_every("unmap", 1)
    rank.close()
    assert tenant.leased == faulty.stats()["mapped_bytes"] == 21 * page
    faulty.heal()

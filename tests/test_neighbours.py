"""Processes outside elastickv: measured, subtracted from what tenants share, and made room for."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

import elastickv
from elastickv import _core
from elastickv.errors import DriverError
from elastickv.ledger import read_device
from elastickv.memory import gpu, neighbours
from elastickv.memory.neighbours import Neighbours

GPU = "GPU-aaaaaaaa-0000-0000-0000-000000000000"
MIB = 1024 * 1024
BLOCK = 2 * MIB


class Meter:
    """What the driver would say: everything that is used on the device."""

    def __init__(self) -> None:
        self.used = 0
        self.error: DriverError | None = None

    def __call__(self, device: str) -> tuple[int, int]:
        assert device == GPU
        if self.error is not None:
            raise self.error
        return 100 * MIB, self.used


@pytest.fixture
def ledger(directory: Path) -> _core.Ledger:
    return _core.Ledger.open(str(directory), GPU, capacity=80 * MIB)


def unmanaged(ledger: _core.Ledger) -> int:
    return read_device(ledger).unmanaged // MIB


def test_a_rise_counts_when_two_looks_agree_and_a_fall_at_once(ledger: _core.Ledger) -> None:
    meter = Meter()
    watch = Neighbours({GPU: ledger}, meter)
    seen = []
    for used in (10, 10, 30, 12, 12, 40, 50, 44, 6, 6):
        meter.used = used * MIB
        watch.measure()
        seen.append(unmanaged(ledger))
    assert seen == [0, 10, 10, 12, 12, 12, 40, 44, 6, 6]


def test_what_tenants_hold_under_leases_is_not_somebody_elses(ledger: _core.Ledger) -> None:
    meter = Meter()
    watch = Neighbours({GPU: ledger}, meter)
    with_weights = ledger.join("a")
    assert with_weights.lease_static(20 * MIB)
    meter.used = 15 * MIB
    for _ in range(2):
        watch.measure()
    assert unmanaged(ledger) == 0  # it is loading: all that is used may be its own
    with_weights.publish_static_used(8 * MIB)
    for _ in range(2):
        watch.measure()
    assert unmanaged(ledger) == 8  # of 7, in whole units
    with_weights.publish_static_used(30 * MIB)  # more than it has a lease for: the rest is on nobody's lease
    meter.used = 30 * MIB
    for _ in range(2):
        watch.measure()
    assert unmanaged(ledger) == 10
    with_weights.close()
    for _ in range(2):
        watch.measure()
    assert unmanaged(ledger) == 30


def test_a_capacity_that_leaves_room_for_others_is_not_charged_with_them(ledger: _core.Ledger) -> None:
    """80 of 100 MiB are the tenants' and 4 stay free: the others may have 16 before the tenants have less."""
    meter = Meter()
    watch = Neighbours({GPU: ledger}, meter, headroom=4 * MIB)
    seen = []
    for used in (10, 16, 17, 30, 90, 0):
        meter.used = used * MIB
        for _ in range(2):
            watch.measure()
        seen.append(unmanaged(ledger))
    assert seen == [0, 0, 2, 14, 74, 0]


def test_several_may_measure(ledger: _core.Ledger) -> None:
    meter = Meter()
    meter.used = 20 * MIB
    one, other = Neighbours({GPU: ledger}, meter), Neighbours({GPU: ledger}, meter)
    for _ in range(3):
        one.measure()
        other.measure()
    assert unmanaged(ledger) == 20


def test_a_failure_is_logged_once_and_changes_nothing(ledger: _core.Ledger, caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter()
    meter.used = 20 * MIB
    watch = Neighbours({GPU: ledger}, meter)
    watch.measure()
    watch.measure()
    meter.error = DriverError("the GPU is lost")
    with caplog.at_level(logging.WARNING, "elastickv"):
        for _ in range(3):
            watch.measure()
        assert unmanaged(ledger) == 20
        meter.error = None
        watch.measure()
        meter.error = DriverError("the GPU is lost again")
        watch.measure()
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == [
        "the GPU is lost",
        "the GPU is lost again",
    ]


def test_the_host_is_not_measured(directory: Path) -> None:
    host = _core.Ledger.open(str(directory), "host", capacity=MIB)
    watch = Neighbours({"host": host}, Meter())
    watch.start()
    watch.stop()
    assert read_device(host).unmanaged == 0


def test_cached_blocks_make_room_for_outsiders_although_nobody_waits(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is the host's under a GPU's name; the meter adds what outsiders use to what is mapped."""
    driver = _core.open_driver("host", page_bytes=2 * MIB)
    outside = 0

    def read(device: str) -> tuple[int, int]:
        return 100 * MIB, driver.stats()["mapped_bytes"] + outside

    monkeypatch.setattr(_core, "open_driver", lambda *_, **__: driver)
    monkeypatch.setattr(gpu, "device_memory", read)
    monkeypatch.setattr(neighbours, "EVERY_S", 0.02)
    lost: list[int] = []
    until = time.monotonic() + 60
    with elastickv.open_device(GPU, capacity=80 * MIB, directory=str(directory)) as device:
        cache = device.join("one", stock=0).cache(num_blocks=256, block_bytes=BLOCK, on_evict=lost.extend)
        ids = cache.alloc(36)
        assert ids is not None
        cache.free(ids[6:], cached=True)
        assert device.view().held >= 74 * MIB
        outside = 40 * MIB
        while device.view().held > 40 * MIB or device.view().unmanaged != 40 * MIB:
            assert time.monotonic() < until, device.view()
            time.sleep(0.01)
        assert lost
        assert set(lost).isdisjoint(ids[:6])
        assert cache.alloc(36) is None
        outside = 0
        while device.view().unmanaged:
            assert time.monotonic() < until, device.view()
            time.sleep(0.01)
        assert cache.alloc(30) is not None
        cache.check_integrity()
    assert "elastickv-neighbours" not in {thread.name for thread in threading.enumerate()}

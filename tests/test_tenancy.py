"""A tenant's place on its devices: there before any memory is taken, static bytes that wait their turn, all or none."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastickv._core import Ledger
from elastickv.config import Settings
from elastickv.errors import InvalidArgument, LimitExceeded, Unavailable
from elastickv.ledger import DeviceView, order_limit, read_device
from elastickv.memory import Cache, RankGeometry, Tenancy
from support import Outcome

MIB = 1024 * 1024
GPUS = ("GPU-1", "GPU-2")


def settings(directory: Path, name: str, **more: Any) -> Settings:
    arguments = {"directory": str(directory), "name": name, "capacity": 64 * MIB, **more}
    return Settings.load(arguments=arguments, environ={})


def look(directory: Path, device: str = "host") -> DeviceView:
    return read_device(Ledger.open(str(directory), device))


def take(tenancy: Tenancy, wait_s: float = 0.0, said: list[str] | None = None, **sizes: int) -> None:
    wanted = {name.replace("_", "-"): size for name, size in sizes.items()}
    told = [] if said is None else said
    tenancy.set_static(wanted, wait_s, "weights", told.append, lambda: None)


def until(what: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_static_bytes_grow_and_shrink(directory: Path) -> None:
    tenancy = Tenancy.join(settings(directory, "one"), ["host", "host"], engine="test")
    take(tenancy, host=20 * MIB)
    assert tenancy.static_bytes == {"host": 20 * MIB}
    assert tenancy.budget("host") == 44 * MIB
    take(tenancy, host=8 * MIB)
    row = look(directory).tenant("one")
    assert (row.static_bytes, row.leased, row.held, row.engine) == (8 * MIB, 0, 8 * MIB, "test")
    tenancy.close()
    assert look(directory).held == 0


def test_it_waits_its_turn_and_says_so(directory: Path) -> None:
    first = Tenancy.join(settings(directory, "first", floor=8 * MIB), ["host"])
    take(first, host=50 * MIB)
    second = Tenancy.join(settings(directory, "second"), ["host"])
    said: list[str] = []
    thread = threading.Thread(target=lambda: take(second, 60.0, said, host=20 * MIB))
    thread.start()
    until(lambda: look(directory).tenant("second").demand == 20 * MIB and said != [])
    take(first, host=40 * MIB)
    thread.join(30)
    assert not thread.is_alive()
    assert second.static_bytes == {"host": 20 * MIB}
    assert said[0] == (
        "elastickv waits for 20 MiB of host for weights: of 64 MiB, 'first' holds 50 MiB (50 MiB static, 0 bytes in "
        "use, of a floor of 8 MiB), 'second' (this one) holds 0 bytes (0 bytes static, 0 bytes in use)"
    )
    assert look(directory).tenant("second").demand == 0
    second.close()
    first.close()


def test_who_does_not_fit_says_who_holds_what(directory: Path) -> None:
    first = Tenancy.join(settings(directory, "first"), ["host"])
    take(first, host=50 * MIB)
    second = Tenancy.join(settings(directory, "second"), ["host"])
    with pytest.raises(Unavailable) as caught:
        take(second, 0.2, host=20 * MIB)
    assert str(caught.value) == (
        "waited 0 s for 20 MiB of host for weights: of 64 MiB, 'first' holds 50 MiB (50 MiB static, 0 bytes in use), "
        "'second' (this one) holds 0 bytes (0 bytes static, 0 bytes in use); stop one of them, lower its limit, or "
        "wait longer (ELASTICKV_START_WAIT)"
    )
    assert caught.value.attributes["bytes"] == 20 * MIB
    row = look(directory).tenant("second")
    assert (row.held, row.demand) == (0, 0)
    take(second, host=14 * MIB)
    second.close()
    first.close()


def test_a_neighbour_is_asked_for_what_it_only_caches(directory: Path) -> None:
    """The neighbour's own thread answers: its cached pages become the other's static bytes."""
    import elastickv

    with elastickv.open_device("host", capacity=64 * MIB, directory=str(directory)) as device:
        neighbour = device.join("neighbour", page=64 * 1024).cache(num_blocks=1024, block_bytes=64 * 1024)
        ids = neighbour.alloc(900)
        assert ids is not None
        neighbour.free(ids, cached=True)
        tenancy = Tenancy.join(settings(directory, "one"), ["host"])
        take(tenancy, 60.0, host=40 * MIB)
        neighbour.check_integrity()
        view = look(directory)
        assert view.tenant("neighbour").counters.answered > 0
        assert view.held <= view.capacity
        tenancy.close()


def test_a_limit_that_forbids_it(directory: Path) -> None:
    tenancy = Tenancy.join(settings(directory, "one", limit=16 * MIB), ["host"])
    take(tenancy, host=4 * MIB)
    assert tenancy.budget("host") == 12 * MIB
    with pytest.raises(LimitExceeded) as caught:
        take(tenancy, 60.0, host=20 * MIB)
    assert str(caught.value) == ("20 MiB of host are needed for weights, and this tenant's limit is 16 MiB; raise it")
    assert tenancy.static_bytes == {"host": 4 * MIB}
    tenancy.close()


def test_all_devices_or_none(directory: Path) -> None:
    other = Tenancy.join(settings(directory, "other"), [GPUS[1]])
    take(other, GPU_2=60 * MIB)
    both = Tenancy.join(settings(directory, "both"), GPUS)
    with pytest.raises(Unavailable, match=r"waited 0 s for 10 MiB of GPU-2 for weights: of 64 MiB, 'other' holds 60"):
        take(both, 0.1, GPU_1=10 * MIB, GPU_2=10 * MIB)
    assert [look(directory, gpu).tenant("both").held for gpu in GPUS] == [0, 0]
    both.close()
    other.close()


def test_two_who_want_the_same_devices_both_get_them(directory: Path) -> None:
    """Neither keeps on one device what the other waits for, whatever order they name them in."""
    tenancies = [Tenancy.join(settings(directory, name), devices) for name, devices in (("a", GPUS), ("b", GPUS[::-1]))]
    got: list[str] = []

    def work(tenancy: Tenancy, name: str) -> None:
        for _ in range(20):
            take(tenancy, 60.0, GPU_1=40 * MIB, GPU_2=40 * MIB)
            got.append(name)
            take(tenancy, 0.0, GPU_1=0, GPU_2=0)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(tenancies, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (got.count("a"), got.count("b")) == (20, 20)
    for tenancy in tenancies:
        tenancy.close()


def test_limits_are_acknowledged_before_there_is_a_cache(directory: Path) -> None:
    tenancy = Tenancy.join(settings(directory, "one"), ["host"])
    tenancy.watch_limits()
    ledger = Ledger.open(str(directory), "host")
    order_limit(ledger, "one", 10 * MIB, 10_000)
    assert look(directory).tenant("one").applied.bytes == 10 * MIB
    with pytest.raises(LimitExceeded):
        take(tenancy, 60.0, host=11 * MIB)
    take(tenancy, host=8 * MIB)
    with pytest.raises(InvalidArgument, match="8 MiB stay while its engine runs"):
        order_limit(ledger, "one", 4 * MIB, 100, now=True)
    order_limit(ledger, "one", 4 * MIB, 10_000)
    tenancy.stop_watching()
    tenancy.stop_watching()
    tenancy.close()


def test_a_cache_is_added_to_the_tenant_that_is_there(directory: Path) -> None:
    tenancy = Tenancy.join(settings(directory, "one", limit=16 * MIB, page=64 * 1024), ["host"], engine="test")
    take(tenancy, host=10 * MIB)
    shape = RankGeometry("host", 1, 64 * 1024)
    cache = Cache.within(tenancy, num_blocks=1024, ranks=[shape], layout="one span")
    row = look(directory).tenant("one")
    assert (row.layout, row.page_bytes, row.engine) == ("one span", 64 * 1024, "test")
    assert row.leased == 64 * 1024
    cache.close()
    row = look(directory).tenant("one")
    assert (row.alive, row.static_bytes) == (True, 10 * MIB)
    tenancy.close()
    assert look(directory).held == 0


def test_a_cache_without_room_leaves_the_tenant_as_it_was(directory: Path) -> None:
    tenancy = Tenancy.join(settings(directory, "one", limit=16 * MIB, page=64 * 1024), ["host"])
    take(tenancy, host=16 * MIB)
    shape = RankGeometry("host", 1, 64 * 1024)
    with pytest.raises(InvalidArgument, match=r"two are needed, the budget is 0 bytes; raise --limit"):
        Cache.within(tenancy, num_blocks=1024, ranks=[shape])
    assert look(directory).tenant("one").static_bytes == 16 * MIB
    tenancy.close()


def test_status_shows_who_sleeps(directory: Path, cli: Callable[..., Outcome]) -> None:
    tenancy = Tenancy.join(settings(directory, "one"), ["host"], engine="test 1")
    tenancy.tenants["host"].describe(engine="test 1, asleep: weights")
    assert look(directory).tenant("one").asleep
    assert f"asleep (pid {os.getpid()})" in " ".join(cli("status", "--dir", directory).out.split())
    tenancy.tenants["host"].describe(engine="test 1")
    assert not look(directory).tenant("one").asleep
    tenancy.close()


def test_a_floor_covers_static_bytes_too(directory: Path) -> None:
    """A floor is of all that is held: with weights on it, the cache keeps the rest of it and no more."""
    one = settings(directory, "one", floor=16 * MIB, page=64 * 1024, idle_release="0s")
    tenancy = Tenancy.join(one, ["host"])
    take(tenancy, host=12 * MIB)
    cache = Cache.within(tenancy, num_blocks=1024, ranks=[RankGeometry("host", 1, 64 * 1024)])
    from elastickv.memory import RankMemory

    memory = RankMemory.attach(cache.rank_spec(0))
    cache.wait_ready(30)
    ids, _ = cache.pool.alloc(160) or ([], 0)
    cache.pool.release(ids)
    cache.pool.maintain(True)
    memory.fence(cache.pool.ticket())
    until(lambda: (cache.pool.poll(), tenancy.tenants["host"].leased)[1] <= 4 * MIB)
    assert tenancy.tenants["host"].leased == 4 * MIB
    memory.close()
    cache.close()
    tenancy.close()

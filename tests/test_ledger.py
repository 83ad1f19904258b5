"""The ledger from Python: values, errors, waits, and processes that die."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastickv import _core
from elastickv.config import Settings
from elastickv.errors import (
    AccessDenied,
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    LedgerCorrupt,
    NotFound,
)
from elastickv.ledger import DeviceView, Limit, open_ledger, order_limit, order_trim, read_device

MIB = 1 << 20
CAPACITY = 64 * MIB

HOLDER = """
import sys
from elastickv import _core
tenant = _core.Ledger.open(sys.argv[1], "host").join(sys.argv[2])
print(tenant.lease(int(sys.argv[3])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def ledger(directory: Path) -> _core.Ledger:
    return _core.Ledger.open(str(directory), "host", CAPACITY)


@contextmanager
def holder(directory: Path, name: str, size: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has leased `size` bytes; killed at the end if it still runs."""
    command = [sys.executable, "-c", HOLDER, str(directory), name, str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "True\n"
            yield process
        finally:
            process.kill()


def test_the_view_is_frozen_and_complete(ledger: _core.Ledger) -> None:
    tenant = ledger.join(
        "chat", floor=MIB, limit=32 * MIB, weight=3, priority=-1, engine="test 1", layout="one span", page_bytes=4096
    )
    assert tenant.lease(4 * MIB)
    assert tenant.lease_static(2 * MIB)
    tenant.publish(virtual_bytes=100 * MIB, used=MIB, cached=2 * MIB, mapped_free=MIB, misses=5, evicted_idle=6)
    tenant.add_mapped(3 * MIB)
    ledger.set_unmanaged(8 * MIB)
    view = read_device(ledger)
    row = view.tenant("chat")
    assert (view.device, view.capacity, view.unmanaged) == ("host", CAPACITY, 8 * MIB)
    assert (view.held, view.free) == (6 * MIB, 50 * MIB)
    assert (row.held, row.leased, row.static_bytes, row.mapped) == (6 * MIB, 4 * MIB, 2 * MIB, 3 * MIB)
    assert (row.floor, row.weight, row.priority, row.page_bytes) == (MIB, 3, -1, 4096)
    assert (row.engine, row.layout, row.pid, row.alive) == ("test 1", "one span", os.getpid(), True)
    assert row.wanted == row.applied
    assert row.wanted.bytes == 32 * MIB
    assert (row.usage.used, row.usage.cached, row.counters.misses) == (MIB, 2 * MIB, 5)
    assert abs(row.since_unix_ns / 1e9 - time.time()) < 60
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.leased = 0  # type: ignore[misc]
    with pytest.raises(NotFound, match=r"^no tenant named 'x' on device 'host'; there are: chat$"):
        view.tenant("x")
    tenant.close()
    assert not DeviceView.from_dict(ledger.view()).tenant("chat").alive


def test_a_refused_lease_is_false_and_rings(ledger: _core.Ledger) -> None:
    one, two = ledger.join("one"), ledger.join("two")
    assert one.lease(CAPACITY)
    assert two.lease(MIB) is False
    assert not one.pressed()
    seen = one.bell_word()
    assert two.lease(MIB, True) is False
    assert one.pressed()
    assert one.wait_bell(seen, 0) != seen
    assert read_device(ledger).tenant("two").demand == MIB
    one.publish(mapped_free=2 * MIB)
    rest = {"cached": 0, "over_limit": 0, "as_freed": 0, "trim": 0, "now": False, "along": 0}
    assert one.ask() == {"mapped_free": MIB, **rest}
    freed = two.freed_word()
    one.give(MIB)
    one.answered()
    assert two.wait_freed(freed, 0) != freed
    assert two.lease(MIB, True)
    assert (one.leased, two.leased, two.headroom()) == (CAPACITY - MIB, MIB, 0)


def test_waiting_releases_the_gil(ledger: _core.Ledger) -> None:
    one, two = ledger.join("one"), ledger.join("two")
    assert one.lease(CAPACITY)
    seen = one.bell_word()
    woken: list[float] = []

    def sleep() -> None:
        one.wait_bell(seen, 5_000_000)
        woken.append(time.monotonic())

    thread = threading.Thread(target=sleep)
    thread.start()
    time.sleep(0.05)
    assert woken == []
    rung = time.monotonic()
    assert two.lease(MIB, True) is False
    thread.join(5)
    assert woken[0] - rung < 0.5


def test_limits_are_ordered_waited_for_and_kept(ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat", floor=2 * MIB)
    assert tenant.limit_wanted == (None, 0)
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"did not acknowledge revision \d+ of its limit within 50 ms") as late:
        order_limit(ledger, "chat", 8 * MIB, timeout_ms=50)
    assert 0.05 <= time.monotonic() - begin < 2
    assert "it holds revision 0 (no limit)" in str(late.value)
    assert tenant.lease(9 * MIB) is False
    assert tenant.pressed()
    wanted = tenant.limit_wanted
    tenant.acknowledge_limit(*wanted)
    assert not tenant.pressed()
    ledger.wait_limit("chat", wanted[1], 0)
    answer = threading.Timer(0.05, lambda: tenant.acknowledge_limit(*tenant.limit_wanted))
    answer.start()
    limit = order_limit(ledger, "chat", None, timeout_ms=2000)
    answer.join()
    assert limit == Limit(None, tenant.limit_held[1])
    with pytest.raises(InvalidArgument, match="a limit of 1 MiB is under its floor of 2 MiB"):
        ledger.order_limit("chat", MIB)
    tenant.close()
    with pytest.raises(NotFound, match="does not run, so nobody can acknowledge its limit; the limit is kept"):
        order_limit(ledger, "chat", 4 * MIB, timeout_ms=50)
    again = ledger.join("chat")
    assert again.limit_held[0] == 4 * MIB
    again.close()
    last = ledger.join("chat", limit=None, set_limit=True)
    assert last.limit_held[0] is None
    with pytest.raises(AlreadyExists):
        ledger.forget("chat")


def test_a_trim_is_answered_once(ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat", floor=2 * MIB)
    assert tenant.lease(8 * MIB)
    tenant.publish(mapped_free=MIB, cached=3 * MIB, used=4 * MIB)
    bell = tenant.bell_word()
    with pytest.raises(DeadlineExceeded, match=r"'chat' did not answer a trim within 50 ms; it stays ordered"):
        order_trim(ledger, "chat", 64 * MIB, timeout_ms=50)
    assert tenant.bell_word() != bell
    assert tenant.pressed()
    assert tenant.ask()["trim"] == 4 * MIB  # what is used is not asked for
    assert read_device(ledger).tenant("chat").trim_wanted == 64 * MIB
    answer = threading.Timer(0.05, lambda: tenant.acknowledge_trim(3 * MIB, tenant.trim_wanted[1]))
    answer.start()
    assert order_trim(ledger, "chat", 5 * MIB, timeout_ms=10_000) == 3 * MIB
    answer.join()
    assert not tenant.pressed()
    assert tenant.ask()["trim"] == 0
    assert read_device(ledger).tenant("chat").trim_wanted == 0
    with pytest.raises(InvalidArgument, match="a trim of no bytes"):
        ledger.order_trim("chat", 0)
    with pytest.raises(NotFound, match="no tenant named 'x'"):
        ledger.order_trim("x", 1)
    lost = ledger.order_trim("chat", MIB)
    tenant.close()
    with pytest.raises(NotFound, match="'chat' does not run, so it has nothing to give back"):
        ledger.order_trim("chat", MIB)
    again = ledger.join("chat")
    assert not again.pressed()
    with pytest.raises(NotFound, match="'chat' has ended since, and revision"):
        ledger.wait_trim("chat", lost, 0)
    with pytest.raises(InvalidArgument, match="was never ordered"):
        ledger.wait_trim("chat", lost + 1000, 0)


def test_what_is_measured_is_in_the_view_and_goes_with_the_life(ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat")
    for micros in (1, 10, 11, 999_999, 2_000_000):
        tenant.observe("map", micros * 1000)
    tenant.observe("lease_wait", 1)
    tenant.publish(evicted_need=1, evicted_neighbour=2, evicted_limit=3, evicted_idle=4, evicted_budget=5)
    assert tenant.lease_static(4 * MIB)
    tenant.publish_static_used(MIB)
    member = ledger.attach(tenant.slot, tenant.incarnation)
    member.publish_static_used(2 * MIB)
    row = read_device(ledger).tenant("chat")
    measured = zip((*row.histograms.map.bounds, "more"), row.histograms.map.counts, strict=True)
    assert {bound: count for bound, count in measured if count} == {10: 2, 20: 1, 10**6: 1, "more": 1}
    assert (row.histograms.map.count, row.histograms.map.sum) == (5, 3_000_021)
    assert (row.histograms.lease_wait.count, row.histograms.unmap.count) == (1, 0)
    assert row.counters.evicted == 15
    assert (row.counters.evicted_neighbour, row.counters.evicted_budget) == (2, 5)
    assert (row.static_bytes, row.static_used) == (4 * MIB, 3 * MIB)
    member.close()
    assert read_device(ledger).tenant("chat").static_used == MIB
    with pytest.raises(InvalidArgument, match="'reads' is not measured"):
        tenant.observe("reads", 1)
    tenant.close()
    again = ledger.join("chat")
    row = read_device(ledger).tenant("chat")
    assert (row.histograms.map.count, row.histograms.map.sum, row.counters.evicted, row.static_used) == (0, 0, 0, 0)
    again.close()


def test_a_limit_to_be_reached_now_says_so(ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat")
    assert tenant.lease(8 * MIB)
    with pytest.raises(DeadlineExceeded, match=r"it still has 8 MiB, running requests included"):
        order_limit(ledger, "chat", 4 * MIB, timeout_ms=20, now=True)
    assert read_device(ledger).tenant("chat").limit_now
    ask = tenant.ask()
    assert (ask["over_limit"], ask["now"]) == (4 * MIB, True)
    ledger.order_limit("chat", 4 * MIB)
    assert tenant.ask()["now"] is False
    assert not read_device(ledger).tenant("chat").limit_now


def test_ctrl_c_ends_the_wait_for_a_limit(ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat")
    revision = ledger.order_limit("chat", MIB)
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    # A shell starts what runs in its background with the signal ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ledger.wait_limit("chat", revision, 20_000)
        assert time.monotonic() - begin < 5
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    tenant.close()


def test_errors_have_their_classes(ledger: _core.Ledger, directory: Path, tmp_path: Path) -> None:
    tenant = ledger.join("chat")
    with pytest.raises(AlreadyExists, match=rf"'chat' runs on device 'host' \(started by process {os.getpid()}\)"):
        ledger.join("chat")
    with pytest.raises(AlreadyExists, match="is shared at a capacity of 64 MiB by the tenants that run now"):
        _core.Ledger.open(str(directory), "host", 2 * CAPACITY)
    with pytest.raises(InvalidArgument, match="is no tenant name"):
        ledger.join("a/b")
    with pytest.raises(NotFound, match="there is no ledger of device 'other'"):
        _core.Ledger.open(str(directory), "other")
    with pytest.raises(NotFound, match="is gone; start its engine again"):
        ledger.attach(tenant.slot, tenant.incarnation + 1)
    with pytest.raises(TypeError):
        tenant.lease(-1)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    with pytest.raises(
        AccessDenied, match=f"has mode 0755, so others can reach it; make it private: chmod 700 '{open_to_all}'"
    ):
        _core.Ledger.open(str(open_to_all), "host", CAPACITY)
    tenant.close()
    with pytest.raises(AccessDenied, match="this tenant has left the ledger"):
        tenant.lease(1)
    Path(ledger.path).write_bytes(b"x" * 4096)
    with pytest.raises(LedgerCorrupt, match="its magic number is"):
        _core.Ledger.open(str(directory), "host")


def test_the_settings_directory_is_used(directory: Path) -> None:
    settings = Settings.load(arguments={"directory": str(directory)})
    with pytest.raises(NotFound):
        open_ledger(settings, "host")
    assert read_device(open_ledger(settings, "host", CAPACITY)).capacity == CAPACITY
    assert read_device(open_ledger(settings, "host")).tenants == ()


def test_the_leases_of_a_killed_process_come_back(ledger: _core.Ledger, directory: Path) -> None:
    tenant = ledger.join("survivor")
    with holder(directory, "victim", CAPACITY) as process:
        assert tenant.lease(MIB) is False
        assert read_device(ledger).tenant("victim").pid == process.pid
        process.kill()
        begin = time.monotonic()
        while not tenant.lease(CAPACITY, True):
            assert time.monotonic() - begin < 1
            tenant.wait_freed(tenant.freed_word(), 10_000)
    row = read_device(ledger).tenant("victim")
    assert (row.alive, row.held, row.demand) == (False, 0, 0)


def test_a_process_killed_with_the_lock_stops_nobody(ledger: _core.Ledger, directory: Path) -> None:
    code = 'from elastickv import _core; _core.set_fault("ledger.lease.granted", "kill")\n' + HOLDER
    result = subprocess.run(
        [sys.executable, "-c", code, str(directory), "victim", str(CAPACITY)], check=False, timeout=60
    )
    assert result.returncode == -signal.SIGKILL
    begin = time.monotonic()
    assert ledger.join("survivor").lease(CAPACITY)
    assert time.monotonic() - begin < 1


def _child(tenant: _core.Tenant, answers: multiprocessing.SimpleQueue[str]) -> None:
    try:
        tenant.lease(1)
    except AccessDenied as error:
        answers.put(str(error))
    tenant.close()


def test_a_forked_child_is_no_member(ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat")
    assert tenant.lease(MIB)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_child, args=(tenant, answers))
    child.start()
    assert answers.get() == "this tenant belongs to the parent process; a forked child must attach itself"
    child.join(10)
    assert read_device(ledger).tenant("chat").leased == MIB


def test_unknown_faults_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="'explode' is no fault: kill, stop, delay or fail"):
        _core.set_fault("ledger.lease.locked", "explode")
    with pytest.raises(InvalidArgument, match=r"no fault point 'ledger\.lease\.lost'; docs/faults\.md lists them"):
        _core.set_fault("ledger.lease.lost", "kill")
    with pytest.raises(InvalidArgument, match=r"at fault point 'ledger\.lease\.locked' cannot fail"):
        _core.set_fault("ledger.lease.locked", "fail")
    _core.set_fault("ledger.lease.locked", "delay", 0, 10)
    _core.clear_faults()


def test_bytes_that_do_not_come_are_not_counted_on(ledger: _core.Ledger) -> None:
    """As of a neighbour whose device hangs: what it unmaps never goes. After two seconds another is asked instead."""
    hung, idle, needy = ledger.join("hung"), ledger.join("idle"), ledger.join("needy")
    assert hung.lease(32 * MIB)
    assert idle.lease(32 * MIB)
    hung.publish(mapped_free=16 * MIB, leaving=16 * MIB)
    idle.publish(cached=32 * MIB)
    begin, asked = time.monotonic(), 0
    while not asked and time.monotonic() < begin + 5:
        assert not needy.lease(16 * MIB, True)
        asked = idle.ask()["cached"]
        time.sleep(0.02)
    assert asked == 16 * MIB
    assert 2 <= time.monotonic() - begin < 3
    assert hung.ask()["mapped_free"] == 0
    # It was only slow: some of it has come, and so will the rest.
    hung.give(8 * MIB)
    hung.publish(mapped_free=16 * MIB, leaving=8 * MIB)
    assert not needy.lease(16 * MIB, True)
    assert idle.ask()["cached"] == 0


def test_an_ask_is_answered_though_nobody_needs_it_any_more(ledger: _core.Ledger) -> None:
    asked, needy = ledger.join("asked"), ledger.join("needy")
    assert asked.lease(CAPACITY)
    asked.publish(mapped_free=CAPACITY)
    assert not asked.pressed()
    assert not needy.lease(MIB, True)
    needy.withdraw_demand()  # it was served by somebody else
    assert asked.pressed()
    asked.answered()
    assert not asked.pressed()
    assert [read_device(ledger).tenant("asked").counters.late] == [0]


def test_nobody_joins_where_nobody_could_see_who_lives(ledger: _core.Ledger, directory: Path) -> None:
    tenant = ledger.join("chat")
    (directory / "host.alive").unlink()
    with pytest.raises(LedgerCorrupt, match="is not the file that"):
        _core.Ledger.open(str(directory), "host")  # which makes another one
    for join in (lambda: ledger.join("late"), lambda: ledger.attach(tenant.slot, tenant.incarnation)):
        with pytest.raises(LedgerCorrupt, match=r"'host\.alive' beside '.*' was removed or replaced"):
            join()
    assert tenant.lease(MIB)


BURIED = """
import os, sys
from elastickv import _core
from elastickv.errors import AccessDenied
ledger = _core.Ledger.open(sys.argv[1], "host")
tenant = ledger.join("buried")
assert tenant.lease(1 << 20)
locks = [int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
locks = [fd for fd in locks if os.readlink(f"/proc/self/fd/{fd}").endswith("host.alive")]
os.dup2(os.open("/dev/null", os.O_RDONLY), max(locks))  # as who closes what it does not know
assert [one["name"] for one in ledger.view()["tenants"] if one["alive"]] == []
other = ledger.join("buried")  # its place is taken
assert (other.slot, other.lease(2 << 20)) == (tenant.slot, True)
try:
    tenant.lease(1)
except AccessDenied as error:
    print(error, flush=True)
tenant.give(1 << 20)
tenant.publish(used=5)
tenant.close()
print([(one["name"], one["leased"], one["usage"]["used"]) for one in ledger.view()["tenants"] if one["alive"]])
sys.stdout.flush()
os._exit(0)
"""


def test_a_tenant_that_was_buried_alive_changes_nothing_of_who_came_after_it(directory: Path) -> None:
    _core.Ledger.open(str(directory), "host", CAPACITY)
    done = subprocess.run(
        [sys.executable, "-c", BURIED, str(directory)], check=True, timeout=60, capture_output=True, text=True
    )
    said, left = done.stdout.splitlines()
    assert said.startswith("this tenant was removed from the ledger while it lived")
    assert left == f"[('buried', {2 * MIB}, 0)]"

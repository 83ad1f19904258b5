"""The monitor's checks: each finds what it is for, and nothing where all is well."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chaos import checks, kernel
from chaos.choices import MIB, Options, stream, tenant_spec
from chaos.monitor import Watcher
from elastickv.ledger import Counters, DeviceView, TenantView, Usage

CAPACITY = 64 * MIB


def row(name: str = "one", **values: object) -> TenantView:
    """A living tenant with 8 MiB, all of it mapped."""
    plain = dict.fromkeys(TenantView.__dataclass_fields__, 0)
    given = {"alive": True, "leased": 8 * MIB, "mapped": 8 * MIB, "pid": 7, "limit_wanted": None, "limit_held": None}
    return TenantView(**{**plain, "usage": Usage(), "counters": Counters(), "name": name, **given, **values})  # type: ignore[arg-type]


def device(*tenants: TenantView) -> DeviceView:
    return DeviceView(device="host", capacity=CAPACITY, unmanaged=0, revision=1, tenants=tenants)


def test_a_sound_ledger_raises_nothing() -> None:
    assert checks.ledger_holds(device(row(), row("two", floor=8 * MIB))) == []
    assert checks.books_agree("one", 8 * MIB, device(row())) == []
    assert checks.limit_holds("one", device(row(limit_wanted=4 * MIB))) == []  # all of it is in use
    assert checks.capacity_holds("x", CAPACITY, CAPACITY) == checks.recovered("x", 0.9) == []
    assert checks.pages_are_leased("x", 5, 5) == []


@pytest.mark.parametrize(
    ("tenants", "text"),
    [
        ((row(leased=60 * MIB), row("two")), "leases: 71303168 bytes of 67108864"),
        ((row(floor=60 * MIB), row("two", floor=8 * MIB)), "floors: "),
        ((row(alive=False, mapped=0),), "one is dead and holds 8388608 bytes"),
        ((row(limit_held_rev=3, limit_wanted_rev=2),), "one holds revision 3 of a limit that was never ordered"),
    ],
)
def test_an_unsound_ledger_is_reported(tenants: tuple[TenantView, ...], text: str) -> None:
    assert any(found.startswith(text) for found in checks.ledger_holds(device(*tenants)))


def test_books_that_disagree_are_reported() -> None:
    assert checks.books_agree("one", 9 * MIB, device(row())) == [
        "one: kernel 9437184, mapped 8388608, leased 8388608 bytes"
    ]
    assert checks.books_agree("two", 0, device(row())) == ["two lives and has 0 living rows"]
    assert checks.pages_are_leased("one", 2, 1) != []
    assert checks.recovered("one", 1.2) == ["one held its leases 1.20 s after its end"]
    over = row(limit_wanted=4 * MIB, usage=Usage(cached=MIB))
    assert checks.limit_holds("one", device(over)) != []


def test_files_that_do_not_belong_are_reported() -> None:
    known = [".lock", "host.ledger", "host.alive", "control.sock", "control.lock"]
    assert checks.files_are_known([*known, ".host.ledger.new.12"]) == []
    assert checks.files_are_known([*known, "host.pages"]) == ["unknown file 'host.pages'"]
    assert checks.files_are_known([".host.ledger.new.1", ".host.ledger.new.2"]) == ["2 half-made ledgers"]


def samples(**change: float) -> list[tuple[float, dict[str, int]]]:
    """100 looks in 500 s; `change` is what a figure gains in all."""
    start = {"fds": 20, "threads": 4, "anon": 50 * MIB}
    return [
        (5.0 * i, {what: int(value + change.get(what, 0) * i / 100) for what, value in start.items()})
        for i in range(100)
    ]


def test_growth_is_seen_and_noise_is_not() -> None:
    assert checks.grows("x", samples()) == []
    assert checks.grows("x", samples(anon=MIB)) == []
    assert checks.grows("x", samples(anon=20 * MIB))[0].startswith("x: memory rose by ")
    assert checks.grows("x", samples(fds=40))[0].startswith("x: fds grew from ")
    assert checks.grows("x", samples(threads=10))[0].startswith("x: threads grew from ")
    shaken = [(t, values | {"fds": 20 + i % 5}) for i, (t, values) in enumerate(samples())]
    assert checks.grows("x", shaken) == []


def test_the_kernel_says_who_stands_still() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            with kernel.standing_still([process.pid]):
                assert kernel.state(process.pid) == "T"
            until = time.monotonic() + 10
            while kernel.state(process.pid) == "T":
                assert time.monotonic() < until
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGSTOP)
            with kernel.standing_still([process.pid], already=[process.pid]):
                pass
            until = time.monotonic() + 10
            while kernel.state(process.pid) != "T":
                assert time.monotonic() < until
                time.sleep(0.001)
        finally:
            process.kill()
    assert kernel.state(process.pid) == "X"


def test_the_monitor_drops_who_has_ended(tmp_path: Path) -> None:
    """A process id may be another process's by the next look, with memory that is none of ours."""
    _, pipe = multiprocessing.Pipe()
    watcher = Watcher(tmp_path, CAPACITY, pipe)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        watcher.hear("born", ["one", process.pid])
        assert watcher._living() == [process.pid]
    assert watcher._living() == []
    assert watcher.watched == {}


def test_the_same_seed_makes_the_same_choices(tmp_path: Path) -> None:
    options = Options(seed=5, directory=tmp_path, seconds=1)
    assert tenant_spec(options, "one", 3) == tenant_spec(options, "one", 3)
    assert stream(5, "step", 9).random() == stream(5, "step", 9).random() != stream(6, "step", 9).random()
    floors = sum(tenant_spec(options, f"tenant{i}", 0).floor for i in range(options.tenants))
    assert floors <= options.capacity

"""Limits: set while a tenant is idle, busy, starting, dead and restarted; below its floor, below its use, above the
capacity. In each case the exit code tells the truth."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import elastickv
from elastickv import _core
from elastickv.errors import DeadlineExceeded, InvalidArgument, NotFound
from elastickv.ledger import TenantView, read_device
from elastickv.limits import set_limit
from support import Outcome

Cli = Callable[..., Outcome]
MIB = 1 << 20
PAGE = 64 * 1024
CAPACITY = 64 * MIB
ACKNOWLEDGED, REFUSED, UNKNOWN, LATE, KEPT = 0, 2, 3, 7, 14
ALIVE_S = 2.0
"""Generous for a machine under load; benchmarks/sharing/limits.py has the real figure."""


def row(directory: Path, name: str = "chat") -> TenantView:
    return read_device(_core.Ledger.open(str(directory), "host")).tenant(name)


@contextmanager
def cache(directory: Path, **options: Any) -> Iterator[Any]:
    """A cache of 512 blocks of one page each, in this process."""
    told = options.pop("on_preempt", None)
    with elastickv.open_device("host", capacity=CAPACITY, directory=str(directory)) as device:
        yield device.join("chat", **options).cache(num_blocks=512, block_bytes=PAGE, on_preempt=told)


def test_idle(cli: Cli, directory: Path) -> None:
    with cache(directory) as blocks:
        blocks.free(blocks.alloc(100), cached=True)
        begin = time.monotonic()
        outcome = cli("limit", "chat", "2MiB", "--dir", directory)
        assert time.monotonic() - begin < ALIVE_S
        assert outcome.code == ACKNOWLEDGED
        assert (row(directory).wanted, row(directory).limit_held) == (row(directory).applied, 2 * MIB)
        assert shrinks(directory, 2 * MIB)


def test_busy(cli: Cli, directory: Path) -> None:
    stop = threading.Event()
    with cache(directory) as blocks:

        def work() -> None:
            while not stop.is_set():
                blocks.free(blocks.alloc(20) or [], cached=True)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for size in ("8MiB", "2MiB", "none"):
                begin = time.monotonic()
                assert cli("limit", "chat", size, "--dir", directory).code == ACKNOWLEDGED
                assert time.monotonic() - begin < ALIVE_S
        finally:
            stop.set()
            thread.join(20)
        blocks.check_integrity()


def test_below_use(cli: Cli, directory: Path) -> None:
    with cache(directory) as blocks:
        ids = blocks.alloc(100)
        outcome = cli("limit", "chat", "1MiB", "--dir", directory)
        assert outcome.code == ACKNOWLEDGED
        assert outcome.out.startswith("chat goes by limit 1 MiB and holds 6.31 MiB, 5.31 MiB above it; it shrinks to ")
        assert "5.3 MiB above its limit" in cli("top", "--count", 1, "--dir", directory).out
        assert blocks.alloc(1) is None
        blocks.free(ids)
        assert shrinks(directory, MIB)


def test_below_use_now_without_anybody_who_preempts(cli: Cli, directory: Path) -> None:
    with cache(directory) as blocks:
        ids = blocks.alloc(100)
        outcome = cli("limit", "chat", "1MiB", "--now", "--timeout", "200ms", "--dir", directory)
        assert (outcome.code, outcome.out) == (LATE, "")
        assert "holds 6.31 MiB (6.31 MiB of it in use), 5.31 MiB above the limit; the order stands" in outcome.err
        told = cli("limit", "chat", "1MiB", "--now", "--timeout", "0", "--dir", directory, "--json")
        assert told.code == LATE
        order = json.loads(told.out)
        assert (order["state"], order["acknowledged"], order["now"]) == ("pending", False, True)
        assert (order["wanted"]["bytes"], order["applied"]["bytes"], order["above"]) == (MIB, None, 85 * PAGE)
        assert "limit 1 MiB not yet applied" in " ".join(cli("status", "--dir", directory).out.split())
        assert blocks.alloc(1) is None  # in force even so
        blocks.free(ids)
        assert cli("limit", "chat", "1MiB", "--now", "--dir", directory).code == ACKNOWLEDGED
        assert row(directory).held <= MIB


def test_below_use_now_with_somebody_who_preempts(cli: Cli, directory: Path) -> None:
    running: list[list[int]] = []
    asked: list[int] = []

    def preempt(blocks: int) -> None:
        asked.append(blocks)
        held.free(running.pop())

    with cache(directory, on_preempt=preempt) as held:
        running += [held.alloc(10) for _ in range(10)]
        outcome = cli("limit", "chat", "3MiB", "--now", "--dir", directory)
        assert outcome.code == ACKNOWLEDGED
        assert row(directory).held <= 3 * MIB
        assert outcome.out.startswith("chat goes by limit 3 MiB and holds ")
        assert 0 < len(running) <= 4  # the oldest go on
        assert asked[0] > asked[-1] > 0


def test_below_the_floor(cli: Cli, directory: Path) -> None:
    with cache(directory, floor="1MiB"):
        outcome = cli("limit", "chat", "512KiB", "--dir", directory)
        assert outcome.code == REFUSED
        assert "a limit of 512 KiB is under its floor of 1 MiB" in outcome.err
        assert row(directory).wanted.revision == 0


def test_now_below_what_the_engine_keeps(cli: Cli, directory: Path) -> None:
    """It could never be acknowledged, so it is refused at once; without --now it holds for whatever comes next."""
    with cache(directory) as blocks:
        now = row(directory)
        weights = _core.Ledger.open(str(directory), "host").attach(now.slot, now.incarnation)
        assert weights.lease_static(2 * MIB)
        ids = blocks.alloc(100)
        kept = 2 * MIB + PAGE  # and the page of block 0
        outcome = cli("limit", "chat", str(kept - 1), "--now", "--timeout", "60", "--dir", directory)
        assert outcome.code == REFUSED
        assert "(weights and the like 2 MiB, first block of the cache 64 KiB); give at least that" in outcome.err
        assert row(directory).wanted.revision == 0
        assert row(directory).least == kept
        outcome = cli("limit", "chat", str(kept - 1), "--dir", directory)
        assert outcome.code == ACKNOWLEDGED
        assert " that it keeps while it runs, as its running requests end" in outcome.out
        blocks.free(ids)
        assert shrinks(directory, kept)
        assert cli("limit", "chat", str(kept), "--now", "--dir", directory).code == ACKNOWLEDGED


def test_above_the_capacity(cli: Cli, directory: Path) -> None:
    with cache(directory):
        outcome = cli("limit", "chat", "1TiB", "--dir", directory)
        assert outcome.code == ACKNOWLEDGED
        assert outcome.out.endswith("; the device has 64 MiB, so the limit stops nothing\n")


STARTING = """
import sys
from elastickv.config import Settings
from elastickv.memory import Cache, RankGeometry, RankMemory, Steward
settings = Settings.load(arguments={"directory": sys.argv[1], "device": "host", "capacity": 64 << 20, "name": "chat"})
cache = Cache.create(settings, num_blocks=512, ranks=[RankGeometry("host", 1, 65536)])
print("joined", flush=True)
sys.stdin.readline()  # the engine loads its weights
memory = RankMemory.attach(cache.rank_spec(0))
cache.wait_ready(20)
steward = Steward(cache.pool, lambda: cache.pool.maintain(True), "chat")
steward.start()
print("ready", flush=True)
sys.stdin.readline()
granted = cache.pool.alloc(32)
print("refused" if granted is None else "granted", flush=True)
steward.stop()
memory.close()
cache.close()
"""


def test_starting(cli: Cli, directory: Path) -> None:
    command = [sys.executable, "-c", STARTING, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "joined\n"
            early = cli("limit", "chat", "1MiB", "--timeout", "100ms", "--dir", directory)
            assert early.code == LATE  # nobody is there yet to acknowledge
            outcomes: list[Outcome] = []
            waiting = threading.Thread(target=lambda: outcomes.append(wait_for_limit(directory)))
            waiting.start()
            process.stdin.write("go on\n")
            assert process.stdout.readline() == "ready\n"
            waiting.join(30)
            assert outcomes[0].code == ACKNOWLEDGED
            process.stdin.write("allocate\n")
            assert process.stdout.readline() == "refused\n"
        finally:
            process.stdin.close()
            process.wait(20)


def wait_for_limit(directory: Path) -> Outcome:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "elastickv.cli", "limit", "chat", "1MiB", "--timeout", "20", "--dir"]
    result = subprocess.run([*command, str(directory)], capture_output=True, text=True, timeout=60, check=False)
    return Outcome(result.returncode, result.stdout, result.stderr)


def test_dead_and_restarted(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat") as process:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        outcome = cli("limit", "chat", "1MiB", "--dir", directory)
        assert outcome == Outcome(KEPT, "chat is not running; limit 1 MiB is kept for its next start\n", "")
        assert json.loads(cli("limit", "chat", "1MiB", "--dir", directory, "--json").out)["state"] == "kept"
    with cache(directory) as blocks:
        assert row(directory).applied.bytes == MIB  # from before the first page
        assert blocks.alloc(32) is None
        assert cli("limit", "chat", "none", "--dir", directory).code == ACKNOWLEDGED
        assert blocks.alloc(32) is not None


def test_dies_while_the_order_is_open(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat") as process:
        process.send_signal(signal.SIGSTOP)
        killer = threading.Timer(0.3, process.kill)
        killer.start()
        outcome = cli("limit", "chat", "1MiB", "--timeout", "20", "--dir", directory)
        killer.join()
    assert outcome == Outcome(KEPT, "chat is not running; limit 1 MiB is kept for its next start\n", "")


def test_stopped(cli: Cli, directory: Path, tenant: Any) -> None:
    with tenant("chat") as process:
        process.send_signal(signal.SIGSTOP)
        try:
            outcome = cli("limit", "chat", "8MiB", "--timeout", "200ms", "--dir", directory)
        finally:
            process.send_signal(signal.SIGCONT)
        assert outcome.code == LATE
        assert cli("limit", "chat", "8MiB", "--timeout", "20", "--dir", directory).code == ACKNOWLEDGED


def test_nobody(cli: Cli, directory: Path) -> None:
    with cache(directory):
        assert cli("limit", "nobody", "1MiB", "--dir", directory).code == UNKNOWN


def test_by_python(directory: Path) -> None:
    with cache(directory, floor="1MiB") as blocks:
        order = set_limit("chat", "4MiB", directory=str(directory))
        assert (order.state, order.wanted, order.above) == ("acknowledged", order.applied, 0)
        ids = blocks.alloc(60)
        with pytest.raises(DeadlineExceeded, match="above the limit") as late:
            elastickv.set_limit("chat", 2 * MIB, now=True, timeout=0.1, directory=str(directory))
        assert late.value.attributes["above"] == row(directory).held - 2 * MIB
        with pytest.raises(InvalidArgument, match="under its floor"):
            set_limit("chat", 0, directory=str(directory))
        with pytest.raises(InvalidArgument, match="a limit of -1 bytes"):
            set_limit("chat", -1, directory=str(directory))
        with pytest.raises(NotFound):
            set_limit("nobody", None, directory=str(directory))
        assert set_limit("chat", None, directory=str(directory)).wanted.bytes is None
        blocks.free(ids)
    assert set_limit("chat", "8MiB", directory=str(directory)).state == "kept"


def test_a_made_up_name_goes_with_its_tenant(cli: Cli, directory: Path) -> None:
    with elastickv.open_device("host", capacity=CAPACITY, directory=str(directory)) as device:
        ledger = _core.Ledger.open(str(directory), "host")
        made_up = ledger.join("engine-1", lasting=False)
        named = ledger.join("chat")
        assert ledger.order_limit("engine-1", MIB) > 0
        with pytest.raises(DeadlineExceeded):
            ledger.wait_limit("engine-1", 1, 0)
        made_up.close()
        named.close()
        assert [(tenant.name, tenant.alive) for tenant in device.view().tenants] == [("chat", False)]
        assert "chat" in cli("status", "--dir", directory).out
        assert "not running, limit kept" not in cli("status", "--dir", directory).out


MADE_UP = """
import os, sys
from elastickv.config import Settings
from elastickv.memory import Cache, RankGeometry
settings = Settings.load(arguments={"directory": sys.argv[1], "device": "host", "capacity": 64 << 20})
cache = Cache.create(settings, num_blocks=64, ranks=[RankGeometry("host", 1, 65536)])
print(settings.tenant_name, flush=True)
sys.stdin.readline()
"""


def test_engines_without_a_name_do_not_pile_up(directory: Path) -> None:
    for _ in range(2):
        command = [sys.executable, "-c", MADE_UP, str(directory)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            name = process.stdout.readline().strip()
            assert [tenant.name for tenant in view(directory).tenants] == [name] == [f"engine-{process.pid}"]
            process.kill()
        assert view(directory).tenants == ()


def test_a_made_up_name_that_dies_while_an_order_is_open(cli: Cli, directory: Path) -> None:
    ledger = _core.Ledger.open(str(directory), "host", CAPACITY)
    tenant = ledger.join("engine-1", lasting=False)
    leaving = threading.Timer(0.2, tenant.close)
    leaving.start()
    outcome = cli("limit", "engine-1", "1MiB", "--timeout", "20", "--dir", directory)
    leaving.join()
    assert outcome.code == UNKNOWN
    assert "engine-1 ended before it acknowledged, and its name, which was made up for it" in outcome.err


def test_forget(cli: Cli, directory: Path) -> None:
    with cache(directory):
        assert cli("forget", "chat", "--dir", directory).code == 4
    assert cli("limit", "chat", "8MiB", "--dir", directory).code == KEPT
    assert cli("forget", "chat", "--dir", directory) == Outcome(0, "chat is forgotten\n", "")
    assert cli("forget", "chat", "--dir", directory).code == UNKNOWN
    with cache(directory):
        assert row(directory).wanted.bytes is None


def test_trim(cli: Cli, directory: Path) -> None:
    with cache(directory, floor="1MiB") as blocks:
        ids = blocks.alloc(60)
        blocks.free(blocks.alloc(100), cached=True)
        outcome = cli("trim", "chat", "2MiB", "--dir", directory, "--json")
        assert outcome.code == 0
        assert json.loads(outcome.out)["given"] >= 2 * MIB
        outcome = cli("trim", "chat", "32MiB", "--dir", directory)
        assert " of 32 MiB: the rest is in use, or under its floor\n" in outcome.out
        assert blocks.stats()["used"] >= len(ids)
        assert cli("trim", "chat", "0", "--dir", directory).code == REFUSED
        assert cli("trim", "nobody", "1MiB", "--dir", directory).code == UNKNOWN
    assert cli("trim", "chat", "1MiB", "--dir", directory).code == UNKNOWN


def view(directory: Path) -> Any:
    return read_device(_core.Ledger.open(str(directory), "host"))


def shrinks(directory: Path, size: int) -> bool:
    """Whether the tenant comes to hold no more than that."""
    until = time.monotonic() + 20
    while row(directory).held > size:
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True

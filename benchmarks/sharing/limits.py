"""How long until a tenant that runs has acknowledged a limit, from the order on.

    python benchmarks/sharing/limits.py [--orders 200] [--page-size 2MiB] [--name limits]

The tenant is a process of its own: once idle, once busy (it allocates and frees all the time). Orders lower and raise
its limit in turn. "now": the order is under what its requests use, so that it has to preempt some and is acknowledged
once it holds no more: 288 MiB less, once it uses most of its limit again. Each is ordered through the ledger itself, as
`elastickv limit` does, and over the control socket, whose server is a third process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import common

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import elastickv
from benchmarks.common import options
from benchmarks.common.result import Result, Row, Target
from elastickv import _core
from elastickv.control import Client
from elastickv.ledger import read_device
from elastickv.limits import LimitOrder, place_order, wait_for_order

FULL = {"orders": 200, "page_size": "2MiB", "name": "limits"}
SMALL = {"orders": 10}
ABOUT = {"orders": "of each kind", "page_size": "as on a GPU; a block is a page here", "name": "of the result file"}
CAPACITY = common.GIB
HIGH, LOW = 384 * common.MIB, 96 * common.MIB
REQUESTS = 24
"""What the busy tenant runs at once where its limit lets it: HIGH, together."""
COMES_BACK_S = 5.0
"""By then the busy tenant uses most of its limit again, or its machine is slow and less is measured."""
ACKNOWLEDGED = Target("with", "most", 200.0)
"""Milliseconds that the project promises for a tenant that is alive."""

Order = Callable[[int, bool], LimitOrder]


def idle_tenant(directory: str, page: int) -> None:
    with elastickv.open_device("host", capacity=CAPACITY, directory=directory) as device:
        cache = device.join("tenant", page=page).cache(num_blocks=CAPACITY // page, block_bytes=page)
        cache.free(cache.alloc(HIGH // page - 8) or [], cached=True)
        common.answer("ready")
        sys.stdin.read()


def busy_tenant(directory: str, page: int) -> None:
    """Requests come and go in one thread; those that are asked to go for a limit go in the cache's own."""
    running: list[list[int]] = []
    lock = threading.Lock()

    def preempt(blocks: int) -> None:
        with lock:
            while running and blocks > 0:
                ids = running.pop()
                cache.free(ids)
                blocks -= len(ids)

    with elastickv.open_device("host", capacity=CAPACITY, directory=directory) as device:
        member = device.join("tenant", page=page)
        cache = member.cache(num_blocks=CAPACITY // page, block_bytes=page, on_preempt=preempt)
        stop = threading.Event()
        threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
        common.answer("ready")
        while not stop.is_set():
            ids = cache.alloc(HIGH // page // REQUESTS)
            with lock:
                running += [ids] if ids else []
                done = running.pop(0) if ids is None or len(running) >= REQUESTS else None
            if done:
                cache.free(done, cached=True)
            if ids is None:
                time.sleep(0.001)  # a step of an engine that is full


@contextmanager
def control_server(directory: str) -> Iterator[Client]:
    command = [sys.executable, "-m", "elastickv.cli", "control", "--dir", directory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError(f"the control server ended with {process.wait(20)}")
            with Client(directory) as client:
                yield client
        finally:
            process.terminate()
            process.wait(20)


def comes_back(ledger: _core.Ledger) -> None:
    until = time.monotonic() + COMES_BACK_S
    while read_device(ledger).tenant("tenant").usage.used < 0.9 * HIGH and time.monotonic() < until:
        time.sleep(0.002)


def milliseconds(ledger: _core.Ledger, order: Order, count: int, *, now: bool) -> list[float]:
    """Lowers and raises the limit in turn; of `now` orders only the lowering is measured."""
    times = []
    for number in range(count):
        if now:
            order(HIGH, False)
            comes_back(ledger)
        begin = time.perf_counter()
        done = order(LOW if now or number % 2 else HIGH, now)
        times.append((time.perf_counter() - begin) * 1000)
        if done.state != "acknowledged" or (now and done.above):
            raise RuntimeError(f"order {number} was not acknowledged: {done}")
    return times


def record(result: Result, what: str, times: list[float]) -> None:
    spread = common.spread(times)
    for name, target in (("p50", None), ("p99", ACKNOWLEDGED), ("max", None)):
        result.rows.append(Row(f"{what}: {name}", "ms", spread[name], target=target))
    result.samples[what] = [round(one, 3) for one in times]


def measure(kind: str, orders: int, page: int, result: Result) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        directory = str(Path(folder) / "ledgers")
        with common.neighbour(__file__, kind, directory, str(page)) as tenant, control_server(directory) as client:
            tenant.say("")
            ledger = _core.Ledger.open(directory, "host")

            def by_ledger(size: int, now: bool) -> LimitOrder:
                ledger = _core.Ledger.open(directory, "host")  # as a command does
                return wait_for_order(ledger, "tenant", place_order(ledger, "tenant", size, now), 30)

            def by_socket(size: int, now: bool) -> LimitOrder:
                return client.set_limit("tenant", size, now=now, wait=30)

            for way, order in (("ledger", by_ledger), ("control socket", by_socket)):
                record(result, f"{kind}, by {way}", milliseconds(ledger, order, orders, now=False))
                if kind == "busy":
                    record(result, f"busy, now, by {way}", milliseconds(ledger, order, orders, now=True))


def main() -> int:
    if len(sys.argv) == 4 and sys.argv[1] in ("idle", "busy"):
        {"idle": idle_tenant, "busy": busy_tenant}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
        return 0
    chosen = options.parse(__doc__, FULL, SMALL, ABOUT)
    settings = {"orders": chosen.orders, "page": chosen.page_size, "huge pages in memory files": common.huge_pages()}
    result = Result(f"sharing/{chosen.name}", "", chosen.small, "host", settings)
    for kind in ("idle", "busy"):
        measure(kind, chosen.orders, chosen.page_size, result)
    result.write(chosen.output or common.RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

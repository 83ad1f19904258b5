"""A process that comes past every fault point in a few hundred milliseconds: the one that a test kills there."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import elastickv
from chaos.choices import MIB, PAGE
from elastickv import _core
from elastickv.errors import ElasticKVError, NotFound
from elastickv.memory import BlockCache

CAPACITY = 16 * MIB
BLOCKS = 256
WAIT_S = 10.0


def leave_a_dead_owner(directory: str) -> None:
    """A child that joins, leases, and dies with the ledger's mutex in its hands."""
    child = os.fork()
    if child == 0:
        tenant = _core.Ledger.open(directory, "host", capacity=CAPACITY).join("ghost")
        _core.set_fault("ledger.lease.granted", "kill")
        tenant.lease(MIB)
        os._exit(1)
    os.waitpid(child, 0)


def wait_until(what: str, holds: object) -> None:
    """Polls; a victim that gets stuck says where."""
    until = time.monotonic() + WAIT_S
    while not holds():  # type: ignore[operator]
        if time.monotonic() >= until:
            raise TimeoutError(f"the victim waited {WAIT_S:.0f} s: {what}")
        time.sleep(0.002)


def work(cache: BlockCache, ledger: _core.Ledger) -> None:
    """Grows, runs out, caches, reuses, is limited and trimmed, and gives back by the idle clock."""
    ids = cache.alloc(64)
    if ids is None:
        raise TimeoutError("the victim got no memory")
    cache.alloc(2 * CAPACITY // PAGE - 2)  # more than there is: refused, and the demand stands for a while
    cache.free(ids[:32], cached=True)
    cache.reuse(ids[0])
    ledger.wait_limit("victim", ledger.order_limit("victim", 44 * PAGE), 5000)
    wait_until("the limit's evictions", lambda: cache.stats()["cached_blocks"] < 31)
    ledger.wait_limit("victim", ledger.order_limit("victim", None), 5000)
    cache.free(ids[32:])
    ledger.wait_trim("victim", ledger.order_trim("victim", 4 * PAGE), 5000)
    wait_until("idle release", lambda: cache.stats()["mapped_free"] == 0)


def recall(ledger: _core.Ledger) -> None:
    """Gives pages back and takes them again before their fence, which this tenant never sends."""
    tenant = ledger.join("undecided")
    table = _core.PageTable.create(8, 1, tenant.incarnation)
    pool = _core.Pool.make(table, [(tenant, PAGE)], 8, PAGE, PAGE, 1, stock_pages=0, idle_release_us=0)
    member = ledger.attach(tenant.slot, tenant.incarnation)
    rank = _core.Rank.attach(_core.open_driver("host", page_bytes=PAGE), table, member, 0, 1, 8 * PAGE, PAGE)
    pool.wait_ready(int(WAIT_S * 1000))

    def recalled() -> bool:
        taken = pool.alloc(4)
        if taken is not None:
            pool.release(taken[0])
            pool.maintain(True)
        return bool(pool.stats()["recalled_extents"])

    wait_until("pages to be taken back", recalled)
    pool.close()
    rank.close()


def main(directory: str, point: str, pipe: Connection) -> None:
    """Dies at its point; whatever it says before means that it did not."""
    try:
        leave_a_dead_owner(directory)
        _core.set_fault(point, "kill")
        fresh = Path(directory).parent / f"fresh-{point}"
        _core.Ledger.open(str(fresh), "host", capacity=CAPACITY)
        ledger = _core.Ledger.open(directory, "host", capacity=CAPACITY)
        with suppress(NotFound):
            ledger.forget("victim")  # and the limit that one before it died under
        with (
            elastickv.open_device("host", capacity=CAPACITY, directory=directory) as device,
            device.join("victim", idle_release=0.02).cache(num_blocks=BLOCKS, block_bytes=PAGE) as cache,
        ):
            work(cache, ledger)
        recall(ledger)
        pipe.send(f"came to its end; {point} was passed {_core.fault_passes(point)} times")
    except (ElasticKVError, TimeoutError) as error:
        pipe.send(f"{type(error).__name__}: {error}")

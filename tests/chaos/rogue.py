"""A planted fault: a tenant that leases one byte for each page that it maps. A run with it must fail."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

from chaos.choices import PAGE
from elastickv import _core


def main(directory: str, capacity: int, pipe: Connection) -> None:
    """Maps a little more than the whole device, and sits on it until the conductor is gone."""
    ledger = _core.Ledger.open(directory, "host", capacity=capacity)
    tenant = ledger.join("rogue")
    pages = capacity // PAGE + 8
    table = _core.PageTable.create(pages, 1, tenant.incarnation)
    pool = _core.Pool.make(table, [(tenant, 1)], pages, PAGE, PAGE, 64)
    member = ledger.attach(tenant.slot, tenant.incarnation)
    driver = _core.open_driver("host", page_bytes=PAGE)
    rank = _core.Rank.attach(driver, table, member, 0, 1, pages * PAGE, PAGE)
    pool.wait_ready(10_000)
    taken = pool.alloc(pages - 1)
    pipe.send(("mapped", rank.mapped_bytes, taken is not None))
    while not pipe.poll(0.1):
        time.sleep(0.1)

"""A forked child is no member of its parent's tenants: whatever it does, its parent keeps what it has."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import elastickv
from elastickv.errors import AccessDenied
from elastickv.memory import BlockCache

MIB = 1024 * 1024
BLOCK = 64 * 1024


def in_a_child(what: Callable[[], None]) -> None:
    """Runs it in a forked child, which must end in peace within 20 s."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that threads do not come along is what this is about
        child = os.fork()
    if child == 0:
        code = 1
        try:
            what()
            code = 0
        finally:
            os._exit(code)  # nothing of pytest may run twice
    until = time.monotonic() + 20
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hung")


def pretend(cache: BlockCache, ids: list[int]) -> None:
    """What a child might do that thinks it is the tenant."""
    assert cache.alloc(1) is None
    with pytest.raises(AccessDenied, match="this pool belongs to the parent process; a forked child must make its own"):
        cache.free(ids)
    for call in (cache.check_integrity, lambda: cache.reuse(1)):
        with pytest.raises(AccessDenied):
            call()
    assert cache.stats()["used_blocks"] == 0
    assert cache._cache.pool.give_all() == []
    cache.close()


def test_a_forked_child_changes_nothing_of_its_parents_cache(tmp_path: Path) -> None:
    with (
        elastickv.open_device("host", capacity=16 * MIB, directory=str(tmp_path / "d")) as device,
        device.join("one", idle_release=0.1).cache(num_blocks=128, block_bytes=BLOCK) as cache,
    ):
        ids = cache.alloc(32)
        assert ids is not None
        array = np.from_dlpack(cache)  # type: ignore[arg-type]
        array[BLOCK : 33 * BLOCK] = 7
        mapped = cache.mapped_bytes
        ticket = cache._cache.pool.ticket()
        in_a_child(lambda: pretend(cache, ids))
        assert cache._cache.pool.ticket() == ticket  # in memory that the child shares
        assert cache.mapped_bytes >= mapped  # a stock may have been mapped meanwhile
        assert (array[BLOCK : 33 * BLOCK] == 7).all()
        more = cache.alloc(8)
        assert more is not None
        array[more[0] * BLOCK] = 1
        cache.check_integrity()
        in_a_child(device.close)
        cache.free(ids + more)
        cache.check_integrity()
        assert [tenant.name for tenant in device.view().living] == ["one"]

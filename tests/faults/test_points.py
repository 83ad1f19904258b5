"""Killed at every fault point there is: each can be reached, and nobody else notices."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

import elastickv
from chaos import checks, life, victim
from chaos.choices import PAGE
from chaos.surroundings import attempt
from elastickv import _core
from elastickv.memory import BlockCache

POINTS = [name for name, _, _ in _core.fault_points()]
RECOVERY_S = 5.0
"""Generous: the machine may be busy. What the chaos run measures is far below a second."""


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockCache]:
    """A tenant that lives through all of it, and takes all that there is after each death."""
    directory = str(tmp_path_factory.mktemp("points") / "ledgers")
    with (
        elastickv.open_device("host", capacity=victim.CAPACITY, directory=directory) as device,
        device.join("survivor", idle_release=0.02, stock=0).cache(num_blocks=512, block_bytes=PAGE) as cache,
    ):
        yield cache


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(point: str, survivor: BlockCache) -> None:
    directory = survivor.settings.directory
    process, pipe = life.start(victim.main, str(directory), point)
    process.join(30)
    assert (process.exitcode, life.last_words(pipe)) == (-signal.SIGKILL, None)

    everything = victim.CAPACITY // PAGE - 1  # the survivor's own first page is the rest
    until = time.monotonic() + RECOVERY_S
    while (taken := survivor.alloc(everything)) is None:
        assert time.monotonic() < until, "the dead one's leases did not come back"
    survivor.free(taken)
    until = time.monotonic() + RECOVERY_S
    while survivor.stats()["leased"] > PAGE:
        assert time.monotonic() < until, "idle release"
        time.sleep(0.002)
    survivor.check_integrity()
    assert checks.files_are_known(path.name for path in directory.iterdir()) == []
    # What it left half made elsewhere is in nobody's way either.
    fresh = directory.parent / f"fresh-{point}"
    if fresh.exists():
        assert attempt(fresh) is None
        assert sorted(path.name for path in fresh.iterdir()) == [".lock", "host.alive", "host.ledger"]

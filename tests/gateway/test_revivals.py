"""A replica is started again while other things happen to its model."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from elastickv.errors import ElasticKVError, Unavailable
from elastickv.gateway.model import ServedModel
from elastickv.gateway.spec import ModelSpec
from elastickv.gateway.states import State
from gateway.fleets import PROGRAM, command, deadline, fleet_of, program, tell, told, until

SLOW = ("--slow-start", "1.5")
AFTER_S = 4.0
"""By then a revival that went on would have brought its engine up."""


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


def engines(name: str) -> list[int]:
    """Processes of stand-ins for this model, whoever started them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended
        if words[1:2] == [os.fsencode(PROGRAM)] and os.fsencode(name) in words:
            found.append(int(entry.name))
    return found


def kill(model: ServedModel, number: int) -> None:
    process = model.replicas[number].process
    assert process is not None
    os.kill(process.engine, signal.SIGKILL)


def ready(model: ServedModel) -> list[bool]:
    return [replica.ready for replica in model.replicas]


def test_when_the_last_replica_is_lost_too_each_is_started_once(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("both", *SLOW, replicas=2)) as fleet:
            model = fleet.model("both")
            await model.ready_replicas(deadline())
            await until(lambda: all(ready(model)), "both replicas")
            kill(model, 1)
            await until(lambda: not ready(model)[1] and len(engines("both")) == 2, "the second one's new process")
            kill(model, 0)
            await until(lambda: not ready(model)[0], "the loss")
            await until(lambda: all(ready(model)), "their return")
            await asyncio.sleep(AFTER_S)
            own = sorted(replica.process.engine for replica in model.replicas if replica.process is not None)
            assert sorted(engines("both")) == own
            assert len(own) == 2
        assert engines("both") == []

    run(go)


def test_a_replica_does_not_come_up_in_a_model_that_went_to_sleep(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("nap", *SLOW, replicas=2)) as fleet:
            model = fleet.model("nap")
            await until(lambda: all(ready(model)), "both replicas")
            kill(model, 1)
            await until(lambda: not ready(model)[1] and len(engines("nap")) == 2, "the second one's new process")
            await fleet.sleep("nap")
            await asyncio.sleep(AFTER_S)
            assert model.state is State.ASLEEP
            assert ready(model) == [False, False]
            assert (await told(model.replicas[0].url))["asleep"] is True
            assert len(engines("nap")) == 1
            await model.ready_replicas(deadline())
            await until(lambda: all(ready(model)), "both replicas again")

    run(go)


def test_a_replica_that_dies_while_another_starts_is_noticed(directory: Path) -> None:
    line = shlex.join(command())
    slow = ("sh", "-c", f'case "$ELASTICKV_NAME" in *.2) sleep 2;; esac; exec {line}')

    async def go() -> None:
        async with fleet_of(directory, ModelSpec("uneven", command=slow, replicas=2)) as fleet:
            model = fleet.model("uneven")
            await until(lambda: ready(model)[0], "the first replica")
            kill(model, 0)
            await until(lambda: model.state is State.READY, "the start's end")
            await until(lambda: not ready(model)[0], "the loss")
            await until(lambda: all(ready(model)), "its return")

    run(go)


def test_broken_connections_are_not_counted_as_losses(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("alarm")) as fleet:
            model = fleet.model("alarm")
            (replica,) = await model.ready_replicas(deadline())
            for _ in range(6):
                model.unreachable(replica, "a stale connection")
                await until(lambda: model.replicas[0].ready and not model.running(), "a look at it")
            kill(model, 0)
            await until(lambda: not model.replicas[0].ready, "the loss")
            await model.ready_replicas(deadline())

    run(go)


def test_what_a_start_did_not_expect_is_not_tried_without_a_pause(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, ModelSpec("odd", command=("sh", "a\0b"), start=False)) as fleet:
            model = fleet.model("odd")
            with pytest.raises(ElasticKVError):
                await model.ready_replicas(deadline())
            starts = len(model.view().moves)
            with pytest.raises(Unavailable, match="has failed and is tried again in"):
                await model.ready_replicas(deadline())
            assert len(model.view().moves) == starts == 2  # starting, failed

    run(go)


def test_an_engine_that_cannot_sleep_is_not_asked_all_the_time(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("awake", sleep="idle", sleep_after=1.0)) as fleet:
            model = fleet.model("awake")
            (replica,) = await model.ready_replicas(deadline())
            await tell(replica.url, sleep_fails=True)
            await until(lambda: "did not go to sleep" in model.view().reason, "a first try")
            await asyncio.sleep(2.5)
            tries = [move for move in model.view().moves if move.to is State.DRAINING]
            assert 1 <= len(tries) <= 4
            assert await model.ready_replicas(deadline()) == [replica]

    run(go)

"""Models of stand-in engines: they start, fail, sleep, wake, end, come and go."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastickv.engines import adapter
from elastickv.errors import AlreadyExists, ConfigError, DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from elastickv.gateway.asleep import held_rows
from elastickv.gateway.fleet import EngineFleet
from elastickv.gateway.model import ServedModel
from elastickv.gateway.spec import GatewaySpec, ModelSpec
from elastickv.gateway.states import State
from elastickv.ledger import TenantView, open_ledger, read_device
from gateway.fleets import QUICK, command, deadline, fleet_of, program, settings_for, tell, told, until

MIB = 1024 * 1024


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


def row(directory: Path, name: str) -> TenantView:
    return read_device(open_ledger(settings_for(directory), "host")).tenant(name)


def path_of(model: ServedModel) -> list[str]:
    """The states it went through."""
    return [move.to.value for move in model.view().moves]


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pid_of(model: ServedModel) -> int:
    process = model.replicas[0].process
    assert process is not None
    return process.engine


def test_a_request_starts_a_model_and_another_one_is_left_alone(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a"), program("b", start=False)) as fleet:
            a, b = fleet.model("a"), fleet.model("b")
            (replica,) = await a.ready_replicas(deadline())
            assert (a.state, b.state) == (State.READY, State.STOPPED)
            assert path_of(a) == ["starting", "ready"]
            assert (await told(replica.url))["asleep"] is False
            (other,) = await b.ready_replicas(deadline())
            assert other.url != replica.url
            assert [view.name for view in fleet.models()] == ["a", "b"]
            pids = [pid_of(a), pid_of(b)]
        assert not any(lives(pid) for pid in pids)
        assert a.state is State.STOPPED

    run(go)


def test_an_engine_is_started_as_run_would_and_knows_no_key_of_the_gateway(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        spec = program("a", floor=4 * MIB, limit=32 * MIB, weight=3, env=(("LIKE_THIS", "yes"),))
        async with fleet_of(directory, spec) as fleet:
            (replica,) = await fleet.model("a").ready_replicas(deadline())
            environment = (await told(replica.url))["environment"]
            assert environment["ELASTICKV"] == "1"
            assert environment["ELASTICKV_NAME"] == replica.tenant == "a"
            assert environment["LIKE_THIS"] == "yes"
            assert environment["VLLM_SERVER_DEV_MODE"] == "1"
            assert float(environment["ELASTICKV_START_WAIT"]) < spec.wake_deadline
            assert "ELASTICKV_ADMIN_KEY" not in environment
            tenant = row(directory, "a")
            assert (tenant.floor, tenant.limit_wanted, tenant.weight) == (4 * MIB, 32 * MIB, 3)

    run(go)


def test_a_start_that_fails_is_tried_again_and_then_left_with_its_last_lines(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a", "--fail")) as fleet:
            model = fleet.model("a")
            with pytest.raises(Unavailable, match="failed and is tried again in") as refused:
                await model.ready_replicas(deadline())
            assert 0 < float(refused.value.attributes["retry_after_s"]) <= QUICK.retry  # type: ignore[arg-type]
            view = model.view()
            assert view.state is State.FAILED
            assert "exit code 3" in view.reason
            assert "cannot find the weights" in view.reason
            log = Path(view.replicas[0].log)
            before = log.stat().st_mtime_ns
            with pytest.raises(Unavailable):  # at once, and without another start
                await model.ready_replicas(deadline())
            assert log.stat().st_mtime_ns == before
            assert path_of(model) == ["starting", "failed"]

    run(go)


def test_an_operator_may_have_a_failed_model_tried_again(directory: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()

    async def go() -> None:
        async with fleet_of(directory, program("a", "--fail-while", str(broken))) as fleet:
            model = fleet.model("a")
            await until(lambda: model.state is State.FAILED, "the failure")
            with pytest.raises(Unavailable, match="cannot find the weights"):
                await fleet.wake("a")
            broken.unlink()
            await fleet.wake("a")
            assert model.state is State.READY

    run(go)


def test_an_engine_that_never_gets_ready_is_ended_at_its_deadline(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a", "--never-ready", start_deadline=1.0)) as fleet:
            model = fleet.model("a")
            await until(lambda: model.replicas[0].process is not None, "a process")
            pid = pid_of(model)
            await until(lambda: model.state is State.FAILED, "the failure")
            assert "to be ready" in model.view().reason
            assert not lives(pid)

    run(go)


def test_a_command_that_is_not_there_says_so(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, ModelSpec("a", command=("no-such-program", "{port}"))) as fleet:
            model = fleet.model("a")
            await until(lambda: model.state is State.FAILED, "the failure")
            assert "no-such-program" in model.view().reason

    run(go)


def test_sleep_gives_memory_back_and_a_request_wakes_it(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a", "--static", "40MiB")) as fleet:
            model = fleet.model("a")
            await model.ready_replicas(deadline())
            assert row(directory, "a").static_bytes == 40 * MIB
            await fleet.sleep("a")
            assert row(directory, "a").held == 0
            assert model.view().reason == "it was asked to; gave back 40 MiB and holds 0 bytes"
            await fleet.sleep("a")  # it does
            (replica,) = await model.ready_replicas(deadline())
            assert (await told(replica.url))["asleep"] is False
            assert row(directory, "a").static_bytes == 40 * MIB
            assert path_of(model) == ["starting", "ready", "draining", "asleep", "waking", "ready"]

    run(go)


def test_sleep_waits_for_requests_and_admits_none_meanwhile(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            model = fleet.model("a")
            (replica,) = await model.ready_replicas(deadline())
            ticket = model.enter(replica, 10)
            assert (replica.outstanding, replica.outstanding_tokens, model.outstanding) == (1, 10, 1)
            sleeping = asyncio.create_task(fleet.sleep("a"))
            await until(lambda: model.state is State.DRAINING, "draining")
            with pytest.raises(Unavailable, match="draining"):
                model.enter(replica, 1)
            assert (await told(replica.url))["asleep"] is False
            ticket.leave()
            ticket.leave()
            await sleeping
            assert model.state is State.ASLEEP
            assert (replica.outstanding, replica.outstanding_tokens) == (0, 0)

    run(go)


def test_a_drain_that_takes_too_long_leaves_the_model_ready(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a", drain_deadline=0.2)) as fleet:
            model = fleet.model("a")
            (replica,) = await model.ready_replicas(deadline())
            ticket = model.enter(replica, 10)
            with pytest.raises(Unavailable, match=r"1 requests of model a still ran after 0 s"):
                await fleet.sleep("a")
            assert model.state is State.READY
            model.enter(replica, 1).leave()
            ticket.leave()

    run(go)


@pytest.mark.parametrize("cause", ["sleep_fails", "none"])
def test_an_engine_that_does_not_go_to_sleep_serves_on(directory: Path, cause: str) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            model = fleet.model("a")
            (replica,) = await model.ready_replicas(deadline())
            if cause == "none":
                model.can_sleep = False
                with pytest.raises(InvalidArgument, match="cannot sleep"):
                    await fleet.sleep("a")
            else:
                await tell(replica.url, sleep_fails=True)
                with pytest.raises(Unavailable, match="told to fail"):
                    await fleet.sleep("a")
                assert "did not go to sleep" in model.view().reason
            assert model.state is State.READY
            assert await model.ready_replicas(deadline()) == [replica]

    run(go)


def test_waking_without_memory_rolls_back_with_a_clear_answer(directory: Path) -> None:
    async def go() -> None:
        busy = program("b", "--static", "40MiB", sleep="never", start=False)
        async with fleet_of(directory, program("a", "--static", "40MiB", "--wait", "0.2"), busy) as fleet:
            a, b = fleet.model("a"), fleet.model("b")
            await a.ready_replicas(deadline())
            await fleet.sleep("a")
            await b.ready_replicas(deadline())
            with pytest.raises(Unavailable, match="no memory to wake it now") as refused:
                await a.ready_replicas(deadline())
            assert float(refused.value.attributes["retry_after_s"]) >= 0.5  # type: ignore[arg-type]
            assert (a.state, b.state) == (State.ASLEEP, State.READY)
            assert "40 MiB of host for weights" in a.view().reason
            assert row(directory, "a").held == 0
            with pytest.raises(Unavailable, match="no memory to wake it now"):
                await fleet.wake("a")
            await fleet.sleep("b")
            await fleet.wake("a")
            assert (a.state, b.state) == (State.READY, State.ASLEEP)

    run(go)


def test_an_engine_that_does_not_say_whether_it_sleeps_is_remembered(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = adapter("vllm")
    monkeypatch.setattr(vllm, "server", replace(vllm.server, asleep=""))

    async def go() -> None:
        async with fleet_of(directory, program("a"), grace=60.0) as fleet:
            model = fleet.model("a")
            (replica,) = await model.ready_replicas(deadline())
            pid = pid_of(model)
            await fleet.sleep("a")
            await tell(replica.url, wake_fails=True)
            with pytest.raises(Unavailable, match="no memory to wake it now"):
                await fleet.wake("a")
            assert model.state is State.ASLEEP
            await tell(replica.url, wake_fails=False)
            await fleet.wake("a")
            assert (model.state, pid_of(model)) == (State.READY, pid)

    run(go)


def test_a_model_that_waits_for_memory_has_an_idle_one_put_to_sleep(directory: Path) -> None:
    async def go() -> None:
        models = (program("a", "--static", "40MiB"), program("b", "--static", "40MiB", start=False))
        async with fleet_of(directory, *models) as fleet:
            a, b = fleet.model("a"), fleet.model("b")
            await a.ready_replicas(deadline())
            await b.ready_replicas(deadline())
            assert (a.state, b.state) == (State.ASLEEP, State.READY)
            assert "b waits for memory of host" in a.view().reason

    run(go)


def test_idle_models_sleep_and_end_by_their_policy(directory: Path) -> None:
    async def go() -> None:
        models = (program("a", sleep="idle", sleep_after=0.3, stop_after=1.5), program("b", sleep="never"))
        async with fleet_of(directory, *models) as fleet:
            a, b = fleet.model("a"), fleet.model("b")
            await b.ready_replicas(deadline())
            (replica,) = await a.ready_replicas(deadline())
            ticket = a.enter(replica, 1)
            await asyncio.sleep(1.0)
            assert a.state is State.READY  # it works
            ticket.leave()
            await until(lambda: a.state is State.STOPPED, "its end")
            assert path_of(a) == ["starting", "ready", "draining", "asleep", "stopped"]
            assert b.state is State.READY
            await a.ready_replicas(deadline())

    run(go)


def test_a_killed_engine_is_started_again_and_the_next_request_waits_for_it(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "elastickv.gateway")

    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            model = fleet.model("a")
            (replica,) = await model.ready_replicas(deadline())
            pid, url = pid_of(model), replica.url
            os.kill(pid, signal.SIGKILL)
            model.unreachable(replica, "connection reset")
            (again,) = await model.ready_replicas(deadline())
            assert again.url != url
            assert pid_of(model) != pid
            assert path_of(model) == ["starting", "ready", "failed", "starting", "ready"]
            assert "ready -> failed" in caplog.text

    run(go)


def test_an_engine_that_dies_again_and_again_is_left(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            model = fleet.model("a")
            for _ in range(4):
                await model.ready_replicas(deadline())
                os.kill(pid_of(model), signal.SIGKILL)
                await until(lambda: not model.replicas[0].ready, "the loss")
            await until(lambda: model.state is State.FAILED and not model.running(), "the failure")
            with pytest.raises(Unavailable, match="has failed and is tried again"):
                await model.ready_replicas(deadline())

    run(go)


def test_a_false_alarm_ends_nothing(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            model = fleet.model("a")
            (replica,) = await model.ready_replicas(deadline())
            pid = pid_of(model)
            model.unreachable(replica, "a stale connection")
            assert await model.ready_replicas(deadline()) == [replica]
            assert pid_of(model) == pid

    run(go)


def test_an_engine_that_hangs_is_ended_and_started_again(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            model = fleet.model("a")
            (replica,) = await model.ready_replicas(deadline())
            pid = pid_of(model)
            await tell(replica.url, health=503)
            await until(lambda: not lives(pid), "its end")
            await model.ready_replicas(deadline())
            assert pid_of(model) != pid

    run(go)


def test_of_two_replicas_one_serves_while_the_other_is_started_again(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a", replicas=2)) as fleet:
            model = fleet.model("a")
            _, second = await model.ready_replicas(deadline())
            assert model.tenants == ("a.1", "a.2")
            os.kill(pid_of(model), signal.SIGKILL)
            await until(lambda: not model.replicas[0].ready, "the loss")
            assert await model.ready_replicas(deadline()) == [second]
            assert model.state is State.READY
            await until(lambda: model.replicas[0].ready, "its return")
            await fleet.sleep("a")
            assert all([(await told(r.url))["asleep"] for r in model.replicas])
            assert len(await model.ready_replicas(deadline())) == 2

    run(go)


def test_an_engine_that_dies_asleep_is_started_by_the_next_request(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            model = fleet.model("a")
            await model.ready_replicas(deadline())
            await fleet.sleep("a")
            os.kill(pid_of(model), signal.SIGKILL)
            await until(lambda: model.state is State.STOPPED, "its end")
            await model.ready_replicas(deadline())

    run(go)


def test_models_come_and_go_while_others_serve(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            await fleet.model("a").ready_replicas(deadline())
            kept = pid_of(fleet.model("a"))
            await fleet.add(program("b"))
            b = fleet.model("b")
            (replica,) = await b.ready_replicas(deadline())
            with pytest.raises(AlreadyExists, match="there is a model 'b' already"):
                await fleet.add(program("b"))
            with pytest.raises(NotFound, match="there are: a, b"):
                fleet.model("c")
            ticket = b.enter(replica, 1)
            pid = pid_of(b)
            removing = asyncio.create_task(fleet.remove("b"))
            await until(lambda: b.state is State.DRAINING, "draining")
            with pytest.raises(Unavailable, match="being removed"):
                await b.ready_replicas(deadline())
            ticket.leave()
            await removing
            assert not lives(pid)
            assert b.view().state is State.STOPPED
            assert [view.name for view in fleet.models()] == ["a"]
            assert pid_of(fleet.model("a")) == kept

    run(go)


def test_a_start_can_be_stopped(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a", "--never-ready")) as fleet:
            model = fleet.model("a")
            await until(lambda: model.replicas[0].process is not None, "a process")
            pid = pid_of(model)
            began = time.monotonic()
            await fleet.remove("a")
            assert time.monotonic() - began < 40  # and not the deadline of a start
            assert not lives(pid)

    run(go)


def test_a_wait_has_a_deadline_that_says_what_for(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a", "--never-ready")) as fleet:
            with pytest.raises(DeadlineExceeded, match=r"waited 0\.\d s for model a, which is starting"):
                await fleet.model("a").ready_replicas(time.monotonic() + 0.3)

    run(go)


def test_a_server_elsewhere_is_used_and_not_touched(directory: Path, tmp_path: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            (replica,) = await fleet.model("a").ready_replicas(deadline())
            async with fleet_of(tmp_path / "other", ModelSpec("far", address=(replica.url,))) as other:
                far = other.model("far")
                (used,) = await far.ready_replicas(deadline())
                assert (used.url, used.tenant) == (replica.url, "")
                with pytest.raises(InvalidArgument, match="cannot sleep"):
                    await other.sleep("far")
            assert (await told(replica.url))["asleep"] is False

    run(go)


def test_what_cannot_be_is_refused_before_anything_starts(directory: Path) -> None:
    settings = settings_for(directory)

    def fleet(*models: ModelSpec) -> EngineFleet:
        return EngineFleet(GatewaySpec(models), settings)

    with pytest.raises(ConfigError, match=r"floor 2 MiB is more than limit 1 MiB"):
        fleet(program("a", floor=2 * MIB, limit=MIB))
    with pytest.raises(NotFound, match="no adapter for the engine 'vlm'"):
        fleet(ModelSpec("a", "x", engine="vlm"))
    with pytest.raises(ConfigError, match="nothing at /no/such"):
        fleet(ModelSpec("a", "/no/such"))
    with pytest.raises(AlreadyExists, match=r"another model's engine is named 'a\.1'"):
        fleet(ModelSpec("a", command=command(), replicas=2), ModelSpec("a.1", command=command()))
    assert not list((directory / "gateway/logs").iterdir())


def test_what_did_not_go_back_is_told(directory: Path) -> None:
    async def go() -> None:
        async with fleet_of(directory, program("a", "--static", "8MiB")) as fleet:
            await fleet.model("a").ready_replicas(deadline())
            view = read_device(open_ledger(settings_for(directory), "host"))
            (awake,) = held_rows({"host": view}, ["a", "b"])
            assert not awake.clean
            await fleet.sleep("a")
            view = read_device(open_ledger(settings_for(directory), "host"))
            (asleep,) = held_rows({"host": view}, ["a", "b"])
            assert asleep.clean

    run(go)

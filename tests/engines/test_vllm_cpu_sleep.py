"""A managed vLLM on the CPU that sleeps: its weights leave memory, and come back byte for byte or not at all."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from elastickv._core import Ledger
from elastickv.demo.engines import Engine as Server
from elastickv.ledger import TenantView, read_device
from engines.harness import CORES, Engine, Job, start
from engines.oracle import differences, make_tiny_llama, tiny_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MIB = 1 << 20
PROMPTS = tiny_prompts(8)
HIDDEN = 1024
WEIGHTS = 100 * MIB
"""Less than the model of that width has."""


def one(directory: Path) -> TenantView:
    return read_device(Ledger.open(str(directory), "host")).tenant("one")


def anonymous(engine: Engine) -> int:
    """Bytes that the kernel counts as the engine's own, no file's."""
    lines = Path(f"/proc/{engine.pids[0]}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def weight_files(engine: Engine) -> list[Path]:
    """The open files of the engine that have no name and are as large as weights are."""
    descriptors = Path(f"/proc/{engine.pids[0]}/fd").iterdir()
    found = []
    for path in descriptors:
        try:
            status = path.stat()
        except FileNotFoundError:  # closed meanwhile
            continue
        if status.st_nlink == 0 and status.st_size > MIB and str(path.readlink()).startswith(("/tmp/", "/var/tmp/")):
            found.append(path)
    return found


def damage(path: Path) -> None:
    """One byte in the middle of a matrix: a number becomes as large as a number can be."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2 // 4096 * 4096 + 3)
        file.write(b"\x7e")


def slept(engine: Engine) -> str | None:
    return engine.call("sleep", 1)[1]


def woken(engine: Engine) -> bool:
    result, error = engine.call("wake_up")
    assert error is None
    return bool(result)


@pytest.fixture
def engine(tmp_path: Path, directory: Path) -> Iterator[Engine]:
    """In one process, so that all of its memory is one process's."""
    environment = {
        "VLLM_PLUGINS": "elastickv",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "ELASTICKV": "1",
        "ELASTICKV_DIR": str(directory),
        "ELASTICKV_CAPACITY": "256MiB",
        "ELASTICKV_NAME": "one",
        "ELASTICKV_STATIC": "checkpoint",
        "ELASTICKV_START_WAIT": "1s",
    }
    options: dict[str, Any] = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 64 << 20}
    options["enable_sleep_mode"] = True
    model = make_tiny_llama(tmp_path / "model", hidden=HIDDEN)
    with start(Job(model, [PROMPTS] * 4, 32, options, environment, CORES[0])) as made:
        yield made


def test_memory_goes_and_comes_back_byte_for_byte(engine: Engine, directory: Path) -> None:
    engine.go()
    answers = engine.wait_round().tokens
    held, before = anonymous(engine), one(directory)
    assert before.static_bytes == before.static_used > WEIGHTS
    (first,) = re.findall(r"elastickv has leased ([0-9.]+) MiB static", engine.log())
    assert abs(float(first) * MIB - before.static_bytes) < 0.02 * before.static_bytes, "before anything was loaded"
    assert len(weight_files(engine)) == 1, "of what is packed; the rest is written when it is needed"

    assert slept(engine) is None
    after = one(directory)
    assert (after.static_bytes, after.static_used) == (0, 0)
    assert after.leased < before.leased
    assert held - anonymous(engine) > 0.9 * before.static_bytes, "the kernel has it, not the C library"
    on_disk = sum(path.stat().st_blocks * 512 for path in weight_files(engine))
    assert on_disk >= before.static_bytes, "and it lies on the disk instead"

    assert woken(engine)
    assert one(directory).static_bytes == one(directory).static_used == before.static_bytes
    assert len(weight_files(engine)) == 1
    engine.go()
    assert differences(answers, engine.wait_round().tokens) == []

    pid, limits = engine.pids[0], resource.prlimit(engine.pids[0], resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (MIB, limits[1]))  # as a full disk: no file grows beyond
    error = slept(engine)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert error is not None
    assert "elastickv: the engine stays awake: taking room for" in error
    assert "File too large; free some room, or name another directory with ELASTICKV_SLEEP_DIR" in error
    assert one(directory).static_bytes == before.static_bytes
    assert "asleep" not in one(directory).engine
    engine.go()
    assert differences(answers, engine.wait_round().tokens) == [], "it serves on"

    assert "InvalidArgument: sleep level 2 throws the weights away" in str(engine.call("sleep", 2)[1])
    assert slept(engine) is None
    (packed,) = (path for path in weight_files(engine) if path.stat().st_size > WEIGHTS * 0.9)
    damage(packed)
    assert woken(engine)
    engine.go()
    assert differences(answers, engine.wait_round().tokens) != [], "a test that could not fail would show nothing"


@pytest.fixture
def server(tmp_path: Path, directory: Path) -> Iterator[Server]:
    environment = {"VLLM_SERVER_DEV_MODE": "1", "ELASTICKV_STATIC": "checkpoint"}
    options = ["--device", "host", "--capacity", "64MiB", "--dir", str(directory)]
    arguments = [
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"),
        *("--block-size", "32", "--skip-tokenizer-init", "--enable-scale-out", "--enable-sleep-mode"),
    ]
    made = Server("one", make_tiny_llama(tmp_path / "model"), tmp_path / "log", options, arguments, environment)
    try:
        made.start()
        made.wait_ready(time.monotonic() + 240)
        yield made
    finally:
        made.stop()


def test_a_server_sleeps_over_http(server: Server, directory: Path) -> None:
    once = httpx.Limits(max_keepalive_connections=0)  # vLLM closes the connection of a call that fails
    with httpx.Client(base_url=server.url, timeout=120, limits=once) as client:

        def generate() -> Any:
            sampling = {"max_tokens": 16, "temperature": 0}
            body = {"model": "one", "token_ids": list(range(5, 105)), "sampling_params": sampling}
            answer = client.post("/inference/v1/generate", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["token_ids"]

        def sleeping() -> bool:
            return bool(client.get("/is_sleeping").json()["is_sleeping"])

        answer, before = generate(), one(directory)
        assert client.post("/sleep", params={"level": 2}).status_code == 500
        assert not sleeping()
        assert client.post("/sleep", params={"level": 1}).json() == {"status": "sleeping", "level": 1}
        assert sleeping()
        assert (one(directory).static_bytes, one(directory).static_used) == (0, 0)
        assert one(directory).engine.endswith(", asleep: kv_cache, weights")
        assert client.post("/wake_up").json()["status"] == "awake"
        assert not sleeping()
        assert one(directory).static_bytes == before.static_bytes > 0
        assert generate() == answer
        assert client.post("/sleep").status_code == 200
    process = server.process
    server.stop()
    assert process is not None
    assert process.returncode == 0, "asleep, it ends in order all the same"

"""A managed SGLang on the CPU that releases its memory: cache and weights go, and come back whole or not at all."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

import elastickv
from engines.harness import Engine, start
from engines.oracle import differences, make_tiny_llama, tiny_prompts
from engines.subjects import BLOCK, SGLANG, look

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

MIB = 1 << 20
BLOCKS = 4096
PROMPTS = tiny_prompts(8)
WEIGHTS = 100 * MIB
"""Less than a model of that width has."""


def scheduler(engine: Engine) -> int:
    (pid,) = (pid for pid in engine.pids if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(SGLANG.scheduler))
    return pid


def anonymous(pid: int) -> int:
    """Bytes that the kernel counts as the process's own, no file's."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def released(engine: Engine, *tags: str) -> str | None:
    return engine.call("release_memory_occupation", *([list(tags)] if tags else []))[1]


def resumed(engine: Engine, *tags: str) -> str | None:
    return engine.call("resume_memory_occupation", *([list(tags)] if tags else []))[1]


def answers(engine: Engine) -> list[list[int]]:
    engine.go()
    return engine.wait_round().tokens


def test_memory_goes_at_once_and_comes_back_after_its_lease(tmp_path: Path, directory: Path) -> None:
    settings = {"ELASTICKV_STATIC": "checkpoint", "ELASTICKV_START_WAIT": "1s"}
    environment = SGLANG.managed(directory, blocks=BLOCKS, **settings)
    model = make_tiny_llama(tmp_path / "model", hidden=1024)
    saver: dict[str, Any] = {"enable_memory_saver": True}
    with start(SGLANG.job(model, [PROMPTS] * 4, environment, engine=saver, max_tokens=32)) as engine:
        expected = answers(engine)
        pid, one = scheduler(engine), lambda: look(directory).tenant("one")
        awake, in_memory = one(), anonymous(pid)
        assert awake.static_bytes == awake.static_used > WEIGHTS
        assert awake.leased > SGLANG.always

        assert released(engine) is None
        asleep = one()
        assert (asleep.leased, asleep.mapped) == (SGLANG.always, SGLANG.always)
        assert (asleep.static_bytes, asleep.static_used) == (0, 0)
        assert asleep.asleep
        assert asleep.engine.endswith(", asleep: cuda_graph, kv_cache, weights")
        assert in_memory - anonymous(pid) > 0.9 * awake.static_bytes, "the kernel has it, not the C library"
        assert released(engine) is None, "once more changes nothing"

        _a_neighbour_is_in_the_way(engine, directory)
        assert resumed(engine, "weights") is None
        assert one().static_bytes == one().static_used == awake.static_bytes
        assert one().engine.endswith(", asleep: cuda_graph, kv_cache")
        assert resumed(engine) is None
        assert resumed(engine) is None, "once more changes nothing"
        assert not one().asleep
        assert differences(expected, answers(engine)) == []

        _the_disk_is_full(engine, pid)
        assert one().static_bytes == awake.static_bytes
        assert not one().asleep
        assert differences(expected, answers(engine)) == [], "it serves on"

        assert released(engine, "kv_cache") is None
        assert (one().leased, one().static_bytes) == (SGLANG.always, awake.static_bytes), "the weights stay"
        assert released(engine, "weights") is None
        _damage_the_weights(pid)
        assert resumed(engine) is None
        assert differences(expected, answers(engine)) != [], "a test that could not fail would show nothing"


def _a_neighbour_is_in_the_way(engine: Engine, directory: Path) -> None:
    with elastickv.open_device("host", directory=str(directory)) as device:
        neighbour = device.join("neighbour", page=BLOCK).cache(num_blocks=BLOCKS, block_bytes=BLOCK)
        ids = neighbour.alloc(BLOCKS - 2)
        assert ids is not None
        error = resumed(engine)
        assert error is not None
        assert "Unavailable: elastickv: the engine stays asleep: waited 1 s for " in error
        assert "of host for weights, graphs and activations: of 256 MiB, " in error
        assert "'neighbour' holds " in error
        row = look(directory).tenant("one")
        assert (row.static_bytes, row.leased, row.asleep) == (0, SGLANG.always, True)
        neighbour.free(ids)


def _the_disk_is_full(engine: Engine, pid: int) -> None:
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (MIB, limits[1]))  # as a full disk: no file grows beyond
    error = released(engine)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert error is not None
    assert "elastickv: the engine stays awake: taking room for" in error
    assert "free some room, or name another directory with ELASTICKV_SLEEP_DIR" in error


def _damage_the_weights(pid: int) -> None:
    for path in Path(f"/proc/{pid}/fd").iterdir():
        status = path.stat()
        if (
            status.st_nlink == 0
            and status.st_size > WEIGHTS
            and str(path.readlink()).startswith(("/tmp/", "/var/tmp/"))
        ):
            with path.open("r+b") as file:
                file.seek(status.st_size // 2)
                file.write(b"\x7e" * MIB)
            return
    raise AssertionError("no file with weights is open")

"""What a vLLM engine has on a real GPU besides its cache: leased before it loads, true once it serves, given back when
it sleeps. Sleep mode needs vLLM's own allocator, which needs a GPU."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import elastickv
from elastickv.config import Settings
from elastickv.ledger import DeviceView, TenantView, order_limit, read_device
from elastickv.memory import gpu as nvml
from elastickv.memory import open_device_ledger
from engines.harness import Engine, Job, Result, run, start
from engines.oracle import differences, make_tiny_llama, tiny_prompts
from gpu import serving
from gpu.serving import GPU, MIB

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_on_gpu")]

GIB = 1024 * MIB
ENGINE = {**serving.ENGINE, "kv_cache_memory_bytes": None}
PROMPTS = tiny_prompts(64)
PAGE = 2 * MIB
SLACK = 512 * MIB
"""Between what the device says is used and what is known of: the driver's own part changes with its clients."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a GiB of weights, so that they show beside a context."""
    return make_tiny_llama(tmp_path_factory.mktemp("model"), layers=8, heads=16, kv_heads=4, head_size=128, hidden=2048)


def job(model: Path, directory: Path | None, name: str = "one", rounds: int = 1, **more: Any) -> Job:
    managed = {
        "VLLM_PLUGINS": "elastickv",
        "ELASTICKV": "1",
        "ELASTICKV_DIR": str(directory),
        "ELASTICKV_NAME": name,
        "ELASTICKV_START_WAIT": "60s",
    }
    settings = more.pop("settings", {})
    order = more.pop("order", None)
    return Job(
        model,
        [PROMPTS] * rounds,
        max_tokens=128,
        engine={**ENGINE, **more},
        environment={**GPU, "VLLM_LOGGING_LEVEL": "INFO", **(managed if directory else {}), **settings},
        order=order,
    )


@pytest.fixture(scope="module")
def plain(model: Path) -> Result:
    return run(job(model, None, kv_cache_memory_bytes=GIB))


def device() -> str:
    return nvml.visible_devices({"CUDA_VISIBLE_DEVICES": "0"})[0]


def look(directory: Path) -> DeviceView:
    settings = Settings.load(arguments={"directory": str(directory), "device": device()}, environ={})
    return read_device(open_device_ledger(device(), settings))


def one(directory: Path) -> TenantView:
    return look(directory).tenant("one")


def used() -> int:
    return nvml.device_memory(device())[1]


def test_the_ledger_says_what_the_device_says(model: Path, plain: Result, tmp_path: Path) -> None:
    before = used()
    with start(job(model, tmp_path / "d")) as engine:
        engine.wait_ready()
        view = look(tmp_path / "d")
        total = nvml.device_memory(device())[0]
        assert total - 512 * MIB - PAGE < view.capacity <= total - 512 * MIB
        row = view.tenant("one")
        print(f"static {row.static_bytes / MIB:.0f} MiB, has {row.static_used / MIB:.0f} MiB, ", end="")
        print(f"device {(used() - before) / MIB:.0f} MiB, mapped {row.mapped / MIB:.0f} MiB")
        assert row.static_used <= row.static_bytes < row.static_used + 4 * GIB
        assert abs(used() - before - row.static_used - row.mapped) < SLACK
        result = engine.finish()
    assert differences(plain.tokens, result.tokens) == []
    assert look(tmp_path / "d").held == 0


def test_two_start_at_one_moment_in_what_both_need(model: Path, plain: Result, tmp_path: Path) -> None:
    with ExitStack() as stack:
        more = {"ELASTICKV_CAPACITY": str(8 * GIB)}
        jobs = [job(model, tmp_path / "d", name, settings=more) for name in ("left", "right")]
        engines = [stack.enter_context(start(each)) for each in jobs]
        for engine in engines:
            engine.wait_ready()
        view = look(tmp_path / "d")
        assert view.held <= view.capacity
        assert all(tenant.static_bytes >= tenant.static_used > 0 for tenant in view.living)
        for engine in engines:
            engine.go()
        results = [engine.finish() for engine in engines]
    for result in results:
        assert differences(plain.tokens, result.tokens) == []


def good(engine: Engine, name: str, *args: Any) -> Any:
    result, error = engine.call(name, *args)
    assert error is None
    return result


def test_sleep_and_waking(model: Path, plain: Result, tmp_path: Path) -> None:
    directory = tmp_path / "d"
    settings = {"ELASTICKV_CAPACITY": str(10 * GIB), "ELASTICKV_START_WAIT": "5s"}
    with start(job(model, directory, rounds=2, settings=settings, enable_sleep_mode=True)) as engine:
        engine.go()
        first = engine.wait_round()
        awake, busy = one(directory), used()
        good(engine, "sleep", 1)
        asleep = one(directory)
        print(f"static {awake.static_bytes / MIB:.0f} -> {asleep.static_bytes / MIB:.0f} MiB, ", end="")
        print(f"device {busy / MIB:.0f} -> {used() / MIB:.0f} MiB")
        assert asleep.mapped == asleep.leased <= asleep.page_bytes
        assert asleep.static_bytes < awake.static_bytes - 256 * MIB
        assert used() < busy - 256 * MIB
        assert "asleep" in asleep.engine
        _fill_and_wake(engine, directory)
        second = engine.finish()
    assert differences(plain.tokens, first.tokens) == []
    assert differences(plain.tokens, second.rounds[1].tokens) == []


def _fill_and_wake(engine: Engine, directory: Path) -> None:
    """A neighbour takes everything: waking fails and can be repeated, tag by tag."""
    with elastickv.open_device(device(), directory=str(directory)) as there:
        block = 16 * MIB
        cache = there.join("neighbour").cache(num_blocks=1024, block_bytes=block)
        ids = cache.alloc(max(1, look(directory).free // block - 2))
        assert ids is not None
        _, error = engine.call("wake_up")
        assert error is not None
        assert "the engine stays asleep" in error
        assert "'neighbour' holds" in error
        cache.free(ids)
        assert good(engine, "wake_up", ["weights"]) is False
        assert good(engine, "wake_up", ["kv_cache"]) is True
    assert "asleep" not in one(directory).engine


def test_level_2_forgets_the_weights(model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "d"
    with start(job(model, directory, enable_sleep_mode=True)) as engine:
        engine.wait_ready()
        awake = one(directory)
        good(engine, "sleep", 2)
        assert one(directory).static_bytes < awake.static_bytes - 256 * MIB
        order_limit(open_device_ledger(device(), _settings(directory)), "one", awake.held, 10_000)
        assert good(engine, "wake_up") is True
        assert one(directory).static_bytes <= awake.static_bytes


def _settings(directory: Path) -> Settings:
    return Settings.load(arguments={"directory": str(directory), "device": device()}, environ={})


def test_a_limit_that_holds_now_preempts_while_all_are_in_flight(model: Path, plain: Result, tmp_path: Path) -> None:
    """Asynchronous scheduling: every running request has a step on its way when it is preempted."""
    directory = tmp_path / "d"
    with start(job(model, directory)) as engine:
        engine.wait_ready()
        static = one(directory).static_bytes
    limit = static + 64 * MIB
    order = {"step": 40, "directory": str(directory), "device": device(), "name": "one", "limit": limit, "now": True}
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "ELASTICKV_LIMIT": "none"}
    result = run(job(model, directory, settings=more, order=order))
    held = [size for size, *_ in result.rounds[0].held]
    print([size // MIB for size in held[:12]])
    assert held[0] > limit
    assert min(held[1:20]) <= limit
    assert differences(plain.tokens, result.tokens) == []

"""vLLM on a real GPU: FlashAttention, CUDA graphs and asynchronous scheduling, managed and plain, token by token.

Batch-invariant kernels make an answer depend on the prompt alone, so that any difference is a fault of the cache. There
are no scratch pages: an access to an address without memory ends the engine, and with it the test.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from elastickv.ledger import read_device
from engines.harness import Job, Result, run, start
from engines.oracle import differences, make_tiny_llama, tiny_prompts
from gpu.serving import ENGINE, GPU, MIB, ledger_of, managed, say

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("vllm_on_gpu")]

PROMPTS = tiny_prompts(64)
LIMIT = 96 * MIB
"""The 64 requests would like about 240 MiB."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 KiB of cache a block of 16 tokens; 32 KiB of it a layer's."""
    return make_tiny_llama(tmp_path_factory.mktemp("model"), layers=8, heads=8, kv_heads=4, head_size=128, hidden=512)


def job(model: Path, environment: dict[str, str] | None = None, rounds: int = 2, **engine: Any) -> Job:
    return Job(
        model,
        [PROMPTS] * rounds,
        max_tokens=128,
        engine={**ENGINE, **engine},
        environment={**GPU, "VLLM_LOGGING_LEVEL": "INFO", **(environment or {})},
    )


@pytest.fixture(scope="module")
def plain(model: Path) -> Result:
    result = run(job(model, kv_cache_memory_bytes=1024 * MIB))
    say("plain", result)
    assert result.preemptions == 0
    return result


def test_plain_answers_do_not_depend_on_the_round(plain: Result) -> None:
    """The oracle itself: the second round finds prefixes in the cache."""
    assert plain.prefix_hits > 0
    assert sum(len(set(line)) for line in plain.tokens) / len(plain.tokens) > 16
    assert differences(plain.rounds[0].tokens, plain.rounds[1].tokens) == []


def test_managed_with_ample_memory(model: Path, plain: Result, tmp_path: Path) -> None:
    result = run(job(model, managed(tmp_path / "d", "ample")))
    say("managed, ample", result)
    assert "block-outermost" in result.log
    assert differences(plain.tokens, result.tokens) == []
    assert result.preemptions == 0
    assert result.prefix_hits == plain.prefix_hits


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-prefix-caching"])
def test_managed_under_a_limit(model: Path, plain: Result, tmp_path: Path, caching: bool) -> None:
    environment = managed(tmp_path / "d", "squeezed", ELASTICKV_LIMIT=str(LIMIT))
    result = run(job(model, environment, enable_prefix_caching=caching))
    say("managed, squeezed", result)
    assert result.preemptions > 0
    assert differences(plain.tokens, result.tokens) == []


def test_two_engines_in_the_memory_of_one(model: Path, plain: Result, tmp_path: Path) -> None:
    """Both at once in less than what one would like, in processes of their own; then nothing is left of them."""
    directory, capacity = tmp_path / "d", 200 * MIB
    more = {"ELASTICKV_CAPACITY": str(capacity), "ELASTICKV_IDLE_RELEASE": "0.5", "ELASTICKV_CACHE_RELEASE": "1"}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(start(job(model, managed(directory, name, **more)))) for name in ("left", "right")
        }
        for engine in engines.values():
            engine.wait_ready()
        for engine in engines.values():
            engine.go()
        ledger = ledger_of(directory)
        for engine in engines.values():
            engine.wait_round()
        misses = sum(tenant.counters.misses for tenant in read_device(ledger).tenants)
        results = {name: engine.finish() for name, engine in engines.items()}
    for name, result in results.items():
        say(name, result)
        assert differences(plain.tokens, result.tokens) == []
    assert misses > 0
    view = read_device(ledger)
    assert view.living == ()
    assert sum(tenant.leased for tenant in view.tenants) == 0


def test_the_block_size_is_raised_where_parts_would_be_small(tmp_path: Path) -> None:
    """2 heads of 64 in bf16: 8 KiB a layer in 16 tokens, 16 KiB in 32."""
    model = make_tiny_llama(tmp_path / "model", layers=2, heads=4, kv_heads=2, head_size=64, hidden=256)
    engine = {key: value for key, value in ENGINE.items() if key != "block_size"}
    one = Job(
        model,
        [PROMPTS[:8]],
        max_tokens=8,
        engine={**engine, "block_size": None, "enforce_eager": True},
        environment={**GPU, "VLLM_LOGGING_LEVEL": "INFO", **managed(tmp_path / "d", "small")},
    )
    result = run(one)
    say("small", result)
    assert "raises the block size from 16 to 32 tokens" in result.log

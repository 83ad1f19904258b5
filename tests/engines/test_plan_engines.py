"""What `elastickv plan` says, against what vLLM engines then take: weights, blocks, tokens. Five kinds of models.

One engine each, on a host device of 24 MiB, whole: it loads, answers a short and a long request, then as many as fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from elastickv._core import Ledger
from elastickv.ledger import read_device
from elastickv.planning import CacheShape, Serving, cache_shape, read_architecture
from engines import tiny_models
from engines.harness import CORES, Job, start
from engines.oracle import make_tiny_llama, tiny_prompts
from support import Outcome

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MIB = 1 << 20
CAPACITY: Final = 24 * MIB
PAGE: Final = 64 * 1024
LENGTH, STEP, ANSWER = 1024, 128, 16
SHORT, LONG = 496, 944
WITHIN = 0.03

MODELS: Final = {
    "grouped-heads": make_tiny_llama,
    "latent": tiny_models.deepseek,
    "window-and-full": tiny_models.gemma3,
    "states": tiny_models.lfm2,
    "experts": tiny_models.qwen3_moe,
}

BLOCK: Final = {"latent": 16}
"""Tokens; 32 for the others. vLLM's kernel for latent attention on a CPU takes 16 only."""

BACKEND: Final = {"latent": {"attention_backend": "CPU_MLA"}}
"""Where the processor has AMX, vLLM takes another kernel by itself, which takes no float32."""

Cli = Callable[..., Outcome]


def near(what: float, planned: float) -> bool:
    return abs(what - planned) <= WITHIN * planned


def prompts(count: int, length: int) -> list[list[int]]:
    return tiny_prompts(count, shared=0, least=length, most=length, seed=count + length)


@pytest.mark.parametrize("kind", MODELS)
def test_an_engine_takes_what_was_planned(kind: str, cli: Cli, tmp_path: Path, directory: Path) -> None:
    model = MODELS[kind](tmp_path / "model")
    tokens = BLOCK.get(kind, 32)
    outcome = cli(
        *("plan", model, "--device", f"host:{CAPACITY}", "--dtype", "float32", "--block-size", tokens, "--json"),
        *("--max-model-len", LENGTH, "--max-num-batched-tokens", STEP, "--dir", directory),
    )
    assert outcome.code == 0, outcome.err
    (planned,) = json.loads(outcome.out)["models"]
    room = CAPACITY - planned["static"]
    fit = room // planned["page_cost"] * PAGE // (planned["block_bytes"] // planned["spans"])
    rounds = [prompts(1, SHORT), prompts(1, LONG), prompts(min(64, 2 * fit // planned["request_blocks"] + 2), LONG)]
    with start(job(model, rounds, directory, tokens, **BACKEND.get(kind, {}))) as engine:
        engine.wait_ready()
        tenant = read_device(Ledger.open(str(directory), "host")).tenant("one")
        assert near(tenant.static_bytes, planned["weights"])
        assert engine.blocks == pytest.approx(CAPACITY / planned["block_bytes"], rel=WITHIN)
        assert tenant.page_bytes == planned["page_cost"]
        result = engine.finish()
    spans = planned["spans"]
    assert f"layer-outermost in {spans} spans" in result.log
    used = [max(blocks for blocks, _ in part.probed) for part in result.rounds]
    shape = shape_of(model, tokens)
    assert shape.block_bytes == planned["block_bytes"]
    assert near(used[0], shape.peak_of(SHORT + ANSWER - 1))
    assert near(used[1], shape.peak_of(LONG + ANSWER - 1))
    if kind != "window-and-full":  # there the two prompts end in steps of different length
        grown = (used[1] - used[0]) * planned["block_bytes"] / (LONG - SHORT)
        assert near(grown, planned["token_bytes"])
    full = max(sum(counts) for counts in result.rounds[2].probed)
    assert near(full, fit - 1)  # block 0 is neither used nor cached


def shape_of(model: Path, tokens: int) -> CacheShape:
    serving = Serving(
        on_gpu=False,
        width=4,
        kv_width=4,
        block_tokens=tokens,
        block_outermost=False,
        in_flight=STEP,
        hold_windows=False,
    )
    return cache_shape(read_architecture(model), serving)


def job(model: Path, rounds: list[list[list[int]]], directory: Path, tokens: int, **more: str) -> Job:
    engine = {
        **more,
        "skip_tokenizer_init": True,
        "max_num_seqs": 64,
        "max_model_len": LENGTH,
        "block_size": tokens,
        "max_num_batched_tokens": STEP,
        "num_gpu_blocks_override": None,
        "kv_cache_memory_bytes": None,
    }
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "elastickv",
        "VLLM_LOGGING_LEVEL": "INFO",
        "ELASTICKV": "1",
        "ELASTICKV_DIR": str(directory),
        "ELASTICKV_DEVICE": "host",
        "ELASTICKV_NAME": "one",
        "ELASTICKV_CAPACITY": str(CAPACITY),
        "ELASTICKV_PAGE": str(PAGE),
        "ELASTICKV_STATIC": "checkpoint",
    }
    return Job(
        model, rounds, max_tokens=ANSWER, engine=engine, environment=environment, core=CORES[0], probe="pool_blocks"
    )

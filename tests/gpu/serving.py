"""What the tests of vLLM on a GPU share: how its engines are started, and what is said of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from elastickv.config import Settings
from elastickv.memory import open_device_ledger
from engines.harness import Result

MIB = 1024 * 1024
GPU = {"CUDA_VISIBLE_DEVICES": "0", "VLLM_BATCH_INVARIANT": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "async_scheduling": True,
    "block_size": 16,
    "max_num_seqs": 64,
    "num_gpu_blocks_override": None,
    "gpu_memory_utilization": 0.1,
    "skip_tokenizer_init": True,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
    },
}


def managed(directory: Path, name: str, **more: str) -> dict[str, str]:
    """Limits and capacities here are of the cache alone, so the weights are not leased."""
    settings = {"VLLM_PLUGINS": "elastickv", "ELASTICKV": "1", "ELASTICKV_DIR": str(directory), "ELASTICKV_NAME": name}
    return {**settings, "ELASTICKV_STATIC": "none", **more}


def say(name: str, result: Result) -> None:
    rates = ", ".join(f"{one.tokens_per_second:.0f}" for one in result.rounds)
    print(f"\n{name}: start {result.start_seconds:.1f} s, {rates} tokens/s, {result.blocks} blocks")
    print(f"  preemptions {result.preemptions}, prefix hits {result.prefix_hits}")
    for line in result.log.splitlines():
        if re.search(r"elastickv|attention backend|AttentionBackend|[Aa]synchronous scheduling|V2|layout", line):
            print("  " + line[:300])


def ledger_of(directory: Path) -> Any:
    (file,) = directory.glob("*.ledger")
    settings = Settings.load(arguments={"directory": str(directory), "device": file.stem}, environ={})
    return open_device_ledger(file.stem, settings)

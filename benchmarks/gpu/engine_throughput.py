"""Tokens per second at saturation, managed over plain vLLM with the same bytes of KV cache; what an idle engine holds.

    python benchmarks/gpu/engine_throughput.py

Both engines run on one GPU and take turns on the same prompts while the other one waits: plain, managed, plain, ... The
result is the median of the ratios of neighbouring rounds. The model has random weights in the shape of Llama-3.1-8B.
After the last round the ledger is read for 5 s.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import GIB, MIB, device_id, options, scratch, spread, write

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from elastickv.config import Settings
from elastickv.ledger import DeviceView, read_device
from elastickv.memory import open_device_ledger
from engines.harness import Engine, Job, start

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IDLE_S = 1.0


def main() -> int:
    chosen = options(__doc__, add)
    with scratch() as place:
        model = Path(place, "model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
        rounds, idle, results = measure(model, Path(place, "d"), chosen)
    ratios = [b / a for a, b in zip(rounds["plain"][1:], rounds["managed"][1:], strict=True)]
    figures: dict[str, Any] = {
        "tokens per second": rounds,
        "ratio": spread(ratios),
        "idle": idle,
        "start seconds": {name: result.start_seconds for name, result in results.items()},
        "preemptions": {name: result.preemptions for name, result in results.items()},
        "settings": {key: value for key, value in vars(chosen).items() if key != "output"},
        "start line": [line for line in results["managed"].log.splitlines() if "elastickv manages" in line],
    }
    print(json.dumps(figures, indent=1))
    targets = {
        "plain / managed, tokens per second": (1 / statistics.median(ratios), 1 / 0.99),
        "KV held 2 s after the last request, MiB": (idle["held MiB"], 8.0),
    }
    return write("engine_throughput", figures, targets, chosen.output)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt (512)")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer (128)")
    parser.add_argument("--seqs", type=int, default=192, help="requests that run at once (192)")
    parser.add_argument("--kv-gib", type=int, default=18, help="GiB of KV cache of each engine (18)")
    parser.add_argument("--prefix-caching", action="store_true")


def measure(model: Path, directory: Path, chosen: argparse.Namespace) -> tuple[dict[str, list[float]], Any, Any]:
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 128000) for _ in range(chosen.prompt)] for _ in range(chosen.requests)]
    names = ("plain", "managed")
    rounds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for name in names:
            engines[name] = stack.enter_context(start(job(name, model, directory, prompts, chosen)))
            engines[name].wait_ready(400)
        for number in range(chosen.repeats + 1):
            for name in names:
                engines[name].go()
                rounds[name].append(engines[name].wait_round().tokens_per_second)
                ended = time.monotonic()
                print(f"round {number} {name}: {rounds[name][-1]:.0f} tokens/s", flush=True)
        idle = footprint(directory, ended)
        results = {name: engine.finish() for name, engine in engines.items()}
    return rounds, idle, results


def job(name: str, model: Path, directory: Path, prompts: list[Any], chosen: argparse.Namespace) -> Job:
    engine = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "enforce_eager": False,
        "async_scheduling": True,
        "block_size": 16,
        "max_model_len": max(1024, 2 * chosen.prompt),
        "max_num_seqs": chosen.seqs,
        "max_num_batched_tokens": 8192,
        "num_gpu_blocks_override": None,
        "kv_cache_memory_bytes": chosen.kv_gib * GIB,
        "gpu_memory_utilization": 0.3,
        "enable_prefix_caching": chosen.prefix_caching,
        "skip_tokenizer_init": True,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    }
    environment = {"CUDA_VISIBLE_DEVICES": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    if name == "managed":
        environment |= {
            "VLLM_PLUGINS": "elastickv",
            "ELASTICKV": "1",
            "ELASTICKV_NAME": name,
            "ELASTICKV_DIR": str(directory),
            "ELASTICKV_CAPACITY": str(chosen.kv_gib * GIB),
            "ELASTICKV_IDLE_RELEASE": str(IDLE_S),
            "ELASTICKV_CACHE_RELEASE": str(IDLE_S),
        }
    return Job(
        model, [prompts] * (chosen.repeats + 1), max_tokens=chosen.answer, engine=engine, environment=environment
    )


def footprint(directory: Path, ended: float) -> dict[str, Any]:
    """What the managed engine holds 2 s after its last request, and when it held one page only."""
    device = device_id()
    settings = Settings.load(arguments={"directory": str(directory), "device": device}, environ={})
    ledger = open_device_ledger(device, settings)

    def held() -> float:
        view: DeviceView = read_device(ledger)
        return view.tenant("managed").leased / MIB

    found: dict[str, Any] = {"at once MiB": held()}
    least = None
    while time.monotonic() < ended + 5.0:
        now = held()
        if least is None and now <= 8:
            least = time.monotonic() - ended
        if "held MiB" not in found and time.monotonic() >= ended + 2.0:
            found["held MiB"] = now
        time.sleep(0.01)
    found["seconds until 8 MiB"] = least
    return found


if __name__ == "__main__":
    sys.exit(main())

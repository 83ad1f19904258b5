"""The models that benchmarks serve: shapes with random weights, made in a folder of the run's own, or a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.result import ROOT

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""The shape of Llama-3.1-8B: 128 KiB of bf16 cache a token."""

LLAMA_1B: dict[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
"""The shape of Llama-3.2-1B: 32 KiB of bf16 cache a token, 2.5 GB of weights."""

SHAPES = {"llama-8b": LLAMA_8B, "llama-1b": LLAMA_1B}
NAMES = (*SHAPES, "tiny", "smollm2")


class Model(NamedTuple):
    """`vocabulary`: token ids of prompts lie under it. `dummy`: weights are made up by the engine."""

    folder: Path
    vocabulary: int
    dummy: bool


def prepare(name: str, place: Path) -> Model:
    """One of NAMES, made under `place` where it has to be made, or a folder with a config.json."""
    if name == "tiny":
        return _tiny(place / "tiny")
    if name == "smollm2":
        from elastickv.demo.model import ensure_model

        folder = ensure_model(print)
    elif name in SHAPES:
        folder = place / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    else:
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise SystemExit(f"error: --model {name}: give one of {', '.join(NAMES)}, or a folder with a config.json")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Model(folder, int(config["vocab_size"]), name in SHAPES)


def _tiny(folder: Path) -> Model:
    """The tests' random Llama, whose answers depend on every byte of its cache."""
    sys.path.insert(0, str(ROOT / "tests"))
    from engines.oracle import TINY_VOCABULARY, make_tiny_llama

    return Model(make_tiny_llama(folder), TINY_VOCABULARY, False)

"""What an engine should have answered: a small random model, comparison of greedy tokens, and a judge for ties.

Greedy tokens of two correct runs may differ where the two best tokens lie closer together than float32 rounding
(batches of different shapes add in different orders). `judge` decides such a case by arithmetic in float64.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

TINY_VOCABULARY: Final = 256
NOISE: Final = 5e-4
"""Two logits closer than this in float64 are a tie in float32: about ten times the largest error that was measured
(5.5e-5, SmolLM2 in vLLM's float32 against transformers' float64, over 704 tokens)."""


@dataclass(frozen=True)
class Difference:
    """The first place where two answers to one request part.

    `lead`: logit of `expected` minus logit of `got` in float64, given the tokens before. `behind`: how far the better
    of the two is from the best logit of all; both are about 0 in a tie.
    """

    request: int
    position: int
    expected: int
    got: int
    lead: float = float("nan")
    behind: float = float("nan")

    @property
    def is_tie(self) -> bool:
        return abs(self.lead) < NOISE and self.behind < NOISE


def make_tiny_llama(
    path: Path,
    *,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 32,
    hidden: int = 128,
    seed: int = 0,
) -> Path:
    """A random Llama in the folder `path`, without tokenizer: its prompts are token ids under TINY_VOCABULARY.

    The matrices are larger than those of an untrained model, so that attention is sharp and every answer depends on
    what the cache holds. With ordinary random weights the model repeats two tokens whatever the cache holds, and
    a test against it cannot fail.
    """
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    inner = hidden * 2

    def matrix(rows: int, columns: int, gain: float) -> Any:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": rng.standard_normal((TINY_VOCABULARY, hidden)).astype(np.float32),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": matrix(TINY_VOCABULARY, hidden, 4.0),
    }
    shapes = {
        "self_attn.q_proj": (heads * head_size, hidden, 1.6),
        "self_attn.k_proj": (kv_heads * head_size, hidden, 1.6),
        "self_attn.v_proj": (kv_heads * head_size, hidden, 2.0),
        "self_attn.o_proj": (hidden, heads * head_size, 2.0),
        "mlp.gate_proj": (inner, hidden, 1.0),
        "mlp.up_proj": (inner, hidden, 1.0),
        "mlp.down_proj": (hidden, inner, 1.0),
    }
    for layer in range(layers):
        for name, (rows, columns, gain) in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns, gain)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(hidden, np.float32)
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": TINY_VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path


def tiny_prompts(count: int, *, shared: int = 96, least: int = 8, most: int = 120, seed: int = 0) -> list[list[int]]:
    """`count` prompts of random token ids; every second one begins with the same `shared` tokens."""
    rng = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(2, TINY_VOCABULARY) for _ in range(length)]

    prefix = tokens(shared)
    return [(prefix if i % 2 else []) + tokens(rng.randint(least, most)) for i in range(count)]


def differences(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> list[Difference]:
    """Where the answers part, request by request; an answer that is shorter parts where it ends (token -1)."""
    if len(expected) != len(got):
        raise ValueError(f"{len(expected)} answers were expected, {len(got)} came")
    found = []
    for request, (left, right) in enumerate(zip(expected, got, strict=True)):
        if list(left) == list(right):
            continue
        length = max(len(left), len(right))
        pairs = [(_at(left, i), _at(right, i)) for i in range(length)]
        position = next(i for i, (a, b) in enumerate(pairs) if a != b)
        found.append(Difference(request, position, *pairs[position]))
    return found


def judge(
    model: Path, prompts: Sequence[Sequence[int]], expected: Sequence[Sequence[int]], found: Sequence[Difference]
) -> list[Difference]:
    """The differences with their logits: one float64 forward pass over the prompt and the tokens both agree on."""
    if not found:
        return []
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    judged = []
    for one in found:
        tokens = [*prompts[one.request], *expected[one.request][: one.position]]
        with torch.no_grad():
            logits = network(torch.tensor([tokens])).logits[0, -1]
        if one.expected < 0 or one.got < 0:
            judged.append(one)
            continue
        pair = logits[one.expected], logits[one.got]
        judged.append(
            Difference(
                one.request,
                one.position,
                one.expected,
                one.got,
                float(pair[0] - pair[1]),
                float(logits.max() - max(pair)),
            )
        )
    return judged


def _at(tokens: Sequence[int], i: int) -> int:
    return tokens[i] if i < len(tokens) else -1

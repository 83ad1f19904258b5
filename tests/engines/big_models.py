"""Random weights in the shape of a model of real size, made on the GPU; only tests that need one make them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.models import LLAMA_8B


def make_llama_8b(folder: Path, seed: int = 0) -> Path:
    """16 GB of bf16 weights in `folder`, one file a layer; enlarged as oracle.make_tiny_llama's are, for its reason.

    Needs PyTorch with a GPU, and room in the folder (with memory to spare, one in a file system in memory is fastest).
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float) -> Any:
        values = torch.randn((rows, columns), device="cuda", dtype=torch.bfloat16, generator=generator)
        return values.mul_(gain / columns**0.5).cpu()

    hidden, inner, vocabulary = (LLAMA_8B[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads, size = (LLAMA_8B[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    # What a layer adds is made smaller, so that 32 add up to what the 4 of the tiny model do: with more, the answers
    # end in short loops (6 different tokens of 96, with these gains 15; hidden size 512 and 32 layers, on a CPU).
    deep = (4 / LLAMA_8B["num_hidden_layers"]) ** 0.5
    shapes = {
        "self_attn.q_proj": (heads * size, hidden, 1.6),
        "self_attn.k_proj": (kv_heads * size, hidden, 1.6),
        "self_attn.v_proj": (kv_heads * size, hidden, 2.0),
        "self_attn.o_proj": (hidden, heads * size, 2.0 * deep),
        "mlp.gate_proj": (inner, hidden, 1.0),
        "mlp.up_proj": (inner, hidden, 1.0),
        "mlp.down_proj": (hidden, inner, deep),
    }
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    ends = {
        "model.embed_tokens.weight": matrix(vocabulary, hidden, hidden**0.5),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(vocabulary, hidden, 4.0),
    }
    parts = {"ends": ends}
    where: dict[str, str] = {}
    for layer in range(LLAMA_8B["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        part = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        part |= {f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        parts[f"layer-{layer:02d}"] = part
        for name, tensors in parts.items():
            save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, f"{name}.safetensors")
        parts = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    return folder

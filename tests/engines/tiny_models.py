"""Tiny random models of five kinds, as Hugging Face folders without tokenizer; prompts are ids under TINY_VOCABULARY.

The weights are larger than those of an untrained model, so that what the cache holds decides the answers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from engines.oracle import TINY_VOCABULARY

COMMON: Final[dict[str, Any]] = {
    "vocab_size": TINY_VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "dtype": "float32",
}


def _save(config: Any, path: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    return path


def gemma3(path: Path) -> Path:
    """Sliding window and full attention, 2:1, a window of 64."""
    from transformers import Gemma3TextConfig

    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    heads = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return _save(Gemma3TextConfig(**COMMON, **heads, sliding_window=64, layer_types=layers), path)


def lfm2(path: Path) -> Path:
    """Convolution states and full attention."""
    from transformers import Lfm2Config

    return _save(
        Lfm2Config(
            **COMMON,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention", "conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            block_dim=128,
            block_multiple_of=256,
            block_ffn_dim_multiplier=1.0,
            conv_dim=128,
            conv_dim_out=128,
        ),
        path,
    )


def deepseek(path: Path) -> Path:
    """Latent attention, and experts in all layers but the first."""
    from transformers import DeepseekV3Config

    return _save(
        DeepseekV3Config(
            **COMMON,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=64,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            moe_intermediate_size=64,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            first_k_dense_replace=1,
        ),
        path,
    )


_YARN: Final[dict[str, Any]] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 1024,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""SGLang 0.5.23 rotates latent rows on a CPU only in DeepSeek's own way."""


def dense_mla(path: Path) -> Path:
    """Latent attention alone: no experts, and rows of 64 numbers."""
    from transformers import DeepseekV2Config

    return _save(
        DeepseekV2Config(
            **COMMON,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=48,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            first_k_dense_replace=4,
            moe_layer_freq=1,
            rope_parameters=_YARN,
            n_routed_experts=1,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
        ),
        path,
    )


def qwen3_moe(path: Path) -> Path:
    """Experts in every layer."""
    from transformers import Qwen3MoeConfig

    return _save(
        Qwen3MoeConfig(
            **COMMON,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            moe_intermediate_size=64,
            num_experts=8,
            num_experts_per_tok=2,
        ),
        path,
    )


MAKERS: Final[dict[str, Callable[[Path], Path]]] = {
    "gemma3": gemma3,
    "lfm2": lfm2,
    "deepseek": deepseek,
    "qwen3_moe": qwen3_moe,
}

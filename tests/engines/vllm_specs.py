"""vLLM's own reading of a configuration, and its own planner, without a GPU and without a model.

What a layer needs is made as vLLM's layers make it (Attention.get_kv_cache_spec and its kin), from what vLLM's
converters and model classes read in the configuration. Only the platform is stood in for: which backend a GPU would
choose, and that it is one.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from transformers import AutoConfig
from vllm.config import CacheConfig
from vllm.platforms.interface import Platform
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from elastickv.engines.vllm import blocksize
from elastickv.planning.checkpoint import stage_layers

MODELS: Final = {
    "Qwen3NextForCausalLM": "qwen3_next",
    "GraniteMoeHybridForCausalLM": "granitemoehybrid",
    "Lfm2ForCausalLM": "lfm2",
}
"""Classes with state layers, and their modules in vllm.model_executor.models."""


class Reading:
    """One configuration as vLLM reads it, served on `tp` ranks with a 16-bit or 8-bit cache."""

    def __init__(self, file: Path, place: Path, *, tp: int, fp8: bool) -> None:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place / "config.json")
        self.config = AutoConfig.from_pretrained(place)
        self.text = self.config.get_text_config()
        convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(self.config.model_type, ModelArchConfigConvertorBase)
        self.shape = convertor(self.config, self.text).convert()
        self.tp = tp
        self.fp8 = fp8
        self.dtype = torch.bfloat16
        self.words = list(getattr(self.text, "layer_types", None) or ["full_attention"] * self.text.num_hidden_layers)
        self.cache = CacheConfig(cache_dtype="fp8" if fp8 else "auto", enable_prefix_caching=True)
        self.cache.mamba_cache_mode = "align"

    @property
    def heads(self) -> int:
        return 1 if self.shape.is_deepseek_mla else max(1, self.shape.total_num_kv_heads // self.tp)

    @property
    def is_hybrid(self) -> bool:
        return any(word in ("linear_attention", "conv", "mamba") for word in self.words)

    def vllm_config(self, max_model_len: int = 4096) -> Any:
        """As much of a VllmConfig as the planner and the model classes read."""
        model = SimpleNamespace(
            max_model_len=max_model_len,
            original_max_model_len=max_model_len,
            use_mla=self.shape.is_deepseek_mla,
            is_hybrid=self.is_hybrid,
            dtype=self.dtype,
            hf_config=self.config,
            hf_text_config=self.text,
            architecture=self.config.architectures[0],
            get_num_kv_heads=lambda parallel: self.heads,
            get_head_size=lambda: self.shape.head_size,
        )
        return SimpleNamespace(
            cache_config=self.cache,
            model_config=model,
            parallel_config=SimpleNamespace(
                tensor_parallel_size=self.tp, decode_context_parallel_size=1, pipeline_parallel_size=1
            ),
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
            attention_config=SimpleNamespace(hisparse_config=None, backend=None),
            kv_transfer_config=None,
            speculative_config=None,
            num_prefill_lookahead_tokens=0,
            num_speculative_tokens=0,
            max_in_flight_tokens=16384,
        )

    def choose_block(self, monkeypatch: Any) -> int:
        """Tokens of a block on a GPU of the Hopper kind with elastickv, by vLLM's functions and elastickv's hook."""
        config = self.vllm_config()
        if self.shape.is_deepseek_mla:
            backend = _latent_backend(monkeypatch, self.fp8)
            self.cache.block_size = backend.get_preferred_block_size(CacheConfig.DEFAULT_BLOCK_SIZE)
            return int(self.cache.block_size)
        if self.is_hybrid:
            self._align(config, monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(blocksize.current_platform, "is_cuda", lambda: True)
            blocksize.raise_block_size(config)
        return int(self.cache.block_size)

    def _align(self, config: Any, monkeypatch: Any) -> None:
        """vLLM's own matching of attention's blocks and states, with the backend that it chooses on Hopper."""
        from vllm.model_executor.models import ModelRegistry

        model = self._model_class()
        with monkeypatch.context() as patch:
            patch.setattr(ModelRegistry, "resolve_model_cls", lambda *args, **kwargs: (model, None))
            patch.setattr(Platform, "_find_non_ssm_backends", classmethod(lambda cls, config: [FlashAttentionBackend]))
            patch.setattr(FlashAttentionBackend, "get_supported_kernel_block_sizes", classmethod(_sizes_of_hopper))
            patch.setattr("vllm.config.vllm.set_current_vllm_config", contextlib.nullcontext)
            Platform._align_hybrid_block_size(config, FlashAttentionBackend)

    def _model_class(self) -> Any:
        name = self.config.architectures[0]
        return getattr(importlib.import_module(f"vllm.model_executor.models.{MODELS[name]}"), name)

    def specs(self) -> dict[str, Any]:
        """What each layer needs, by name."""
        return {f"model.layers.{i}.attn": self._spec(word) for i, word in enumerate(self.words)}

    def _spec(self, word: str) -> Any:
        block, config = self.cache.block_size, self.vllm_config()
        common = {
            "block_size": block,
            "num_kv_heads": self.heads,
            "head_size": self.shape.head_size,
            "dtype": torch.uint8 if self.fp8 else self.dtype,
            "kv_quant_mode": KVQuantMode.FP8_PER_TENSOR if self.fp8 else KVQuantMode.NONE,
        }
        if self.shape.is_deepseek_mla:
            return MLAAttentionSpec(**common, max_tp_shards=1, cache_dtype_str=self.cache.cache_dtype)
        if word == "sliding_attention":
            return SlidingWindowSpec(**common, sliding_window=self.text.sliding_window)
        if word == "chunked_attention":
            return ChunkedLocalAttentionSpec(**common, attention_chunk_size=self.text.attention_chunk_size)
        if word in ("full_attention", "attention"):
            return FullAttentionSpec(**common)
        model = self._model_class()
        return MambaSpec(
            shapes=tuple(model.get_mamba_state_shape_from_config(config)),
            dtypes=tuple(model.get_mamba_state_dtype_from_config(config)),
            block_size=self.cache.mamba_block_size,
            page_size_padded=self.cache.mamba_page_size_padded,
            mamba_cache_mode=self.cache.mamba_cache_mode,
        )

    def plan(self, layout: str, *, blocks: int, pp: int = 1) -> list[Any]:
        """vLLM's plan of each pipeline stage in that layout."""
        self.cache.kv_cache_layout = layout
        self.cache.num_gpu_blocks_override = blocks
        specs = self.specs()
        stages = [
            {name: specs[name] for i, name in enumerate(specs) if i in layers}
            for layers in stage_layers(len(specs), pp)
        ]
        planned: list[Any] = kv_cache_utils.get_kv_cache_configs(self.vllm_config(), stages, [1] * pp)
        for config in planned:
            config.kv_cache_layout = layout
        return planned


def _latent_backend(monkeypatch: Any, fp8: bool) -> Any:
    """vLLM's first choice on Hopper that takes such a cache. Its modules import kernels that a CPU build lacks."""
    with monkeypatch.context() as patch:
        patch.setattr(fa_utils, "flash_attn_varlen_func", None, raising=False)
        patch.setattr(fa_utils, "get_scheduler_metadata", None, raising=False)
        module = "flashmla" if fp8 else "flashattn_mla"
        return getattr(
            importlib.import_module(f"vllm.v1.attention.backends.mla.{module}"),
            "FlashMLABackend" if fp8 else "FlashAttnMLABackend",
        )


def _sizes_of_hopper(cls: type, kv_cache_spec: Any = None) -> list[Any]:
    from vllm.v1.attention.backend import MultipleOf

    return [MultipleOf(16)]

"""Tokens a block: more than vLLM's default where a layer's part of a block would be too small to be read at full speed.

How many, says elastickv.planning.blocks.
"""

from __future__ import annotations

from typing import Any, Final

from vllm import envs
from vllm.distributed.kv_transfer.kv_connector.utils import get_kv_connector_cache_layout
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_layout import KVCacheLayout

from elastickv.planning.blocks import tokens_for

__all__ = ["raise_block_size"]

_logger = init_logger("vllm.elastickv")

_OLD_NAMES: Final = {"NHD": "LBNHC", "HND": "LBHNC"}
"""What VLLM_KV_CACHE_LAYOUT may say too."""


def raise_block_size(config: Any) -> None:
    """Sets the block size of `config` (VllmConfig), before the workers get their copy; a size of the user's own stays.

    Only on a GPU, and only where the layout may be block-outermost: elsewhere a layer's parts lie side by side. vLLM
    matches the sizes of models with states itself, and those of latent attention are its kernels'.
    """
    cache, model = config.cache_config, config.model_config
    if cache.user_specified_block_size or model is None or not current_platform.is_cuda():
        return
    if model.use_mla or model.is_hybrid or cache.kv_cache_dtype_skip_layers or _layers_outermost(config):
        return
    width = 1 if str(cache.cache_dtype).startswith("fp8") else model.dtype.itemsize
    per_token = 2 * model.get_num_kv_heads(config.parallel_config) * model.get_head_size() * width
    tokens = tokens_for(per_token, cache.block_size)
    if tokens == cache.block_size:
        return
    _logger.info("elastickv raises the block size from %d to %d tokens", cache.block_size, tokens)
    cache.block_size = tokens
    cache.user_specified_block_size = True  # else vLLM would put its own choice in its place


def _layers_outermost(config: Any) -> bool:
    """Whether the user, a connector or the chosen attention backend rules block-outermost layouts out."""
    asked = envs.VLLM_KV_CACHE_LAYOUT or get_kv_connector_cache_layout(config)
    if asked is not None:
        return not KVCacheLayout[_OLD_NAMES.get(asked, asked)].is_block_outermost
    backend = config.attention_config.backend
    layouts = backend.get_class().supported_kv_cache_layouts() if backend is not None else None
    return layouts is not None and not any(layout.is_block_outermost for layout in layouts)

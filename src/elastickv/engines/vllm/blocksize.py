"""Tokens a block: more than vLLM's default where a layer's part of a block would be too small to be read at full speed.

How many, says elastickv.planning.blocks.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from elastickv.planning.blocks import tokens_for

__all__ = ["raise_block_size"]

_logger = init_logger("vllm.elastickv")


def raise_block_size(config: Any) -> None:
    """Sets the block size of `config` (VllmConfig), before the workers get their copy; a size of the user's own stays.

    Only for models of one kind of attention on a GPU: vLLM matches the sizes of hybrid models itself.
    """
    cache, model = config.cache_config, config.model_config
    if cache.user_specified_block_size or model is None or not current_platform.is_cuda():
        return
    if model.use_mla or model.is_hybrid or cache.kv_cache_dtype_skip_layers:
        return
    width = 1 if str(cache.cache_dtype).startswith("fp8") else model.dtype.itemsize
    per_token = 2 * model.get_num_kv_heads(config.parallel_config) * model.get_head_size() * width
    tokens = tokens_for(per_token, cache.block_size)
    if tokens == cache.block_size:
        return
    _logger.info("elastickv raises the block size from %d to %d tokens", cache.block_size, tokens)
    cache.block_size = tokens
    cache.user_specified_block_size = True  # else vLLM would put its own choice in its place

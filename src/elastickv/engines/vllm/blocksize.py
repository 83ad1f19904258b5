"""Tokens a block: more than vLLM's default where a layer's part of a block would be too small to be read at full speed.

In a block-outermost layout the parts of one layer lie a block apart. Reading such parts costs nothing on an H100 while
they have 16 KiB, and a fifth of the bandwidth at 8 KiB.
"""

from __future__ import annotations

from typing import Any, Final

from vllm.logger import init_logger
from vllm.platforms import current_platform

__all__ = ["LEAST_PART", "raise_block_size", "tokens_for"]

_logger = init_logger("vllm.elastickv")

LEAST_PART: Final = 16 * 1024
"""Bytes of one layer's part of a block."""

_MOST_TOKENS: Final = 64
"""Prefixes are shared by whole blocks, so a block must not grow without bound."""


def tokens_for(token_bytes: int, tokens: int) -> int:
    """The block size, at least `tokens`, for a model with `token_bytes` bytes a token in one layer of one rank."""
    while token_bytes * tokens < LEAST_PART and tokens < _MOST_TOKENS:
        tokens *= 2
    return tokens


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

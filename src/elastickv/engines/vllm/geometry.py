"""How a rank's cache lies in memory, read from the KVCacheConfig that vLLM planned."""

from __future__ import annotations

from typing import Any

from elastickv.errors import EngineRefused
from elastickv.memory import RankGeometry

__all__ = ["describe", "read"]


def read(config: Any, device: str) -> RankGeometry:
    """The shape of one rank. Refuses layouts in which a block is not one piece in each of equal stripes."""
    tensors = [tensor for tensor in config.kv_cache_tensors if not getattr(tensor, "host_resident", False)]
    if not tensors:
        raise EngineRefused(
            "elastickv cannot manage this engine: a rank of it has no KV cache; use fewer pipeline stages, "
            "or unset ELASTICKV to serve without it"
        )
    size, blocks = tensors[0].size, config.num_blocks
    if all(tensor.layer_stride * len(tensor.layers) <= tensor.block_stride for tensor in tensors):
        return RankGeometry(device, 1, size // blocks)
    strides = {tensor.block_stride for tensor in tensors}
    stripe = blocks * min(strides)
    uneven = len(strides) != 1 or any(
        tensor.offset % stripe or (len(tensor.layers) > 1 and tensor.layer_stride % stripe) for tensor in tensors
    )
    if uneven or size % stripe:
        raise EngineRefused(
            f"elastickv cannot manage the KV cache layout {config.kv_cache_layout}: a block is not one piece in each "
            "of equal stripes; set VLLM_KV_CACHE_LAYOUT=BLNHC"
        )
    return RankGeometry(device, size // stripe, min(strides))


def describe(ranks: list[RankGeometry], layout: str | None) -> str:
    """For people: "LBHNC, layer-outermost in 30 spans"; ranks that differ are listed."""
    spans = sorted({rank.spans for rank in ranks})
    if spans == [1]:
        return f"{layout}, block-outermost"
    counts = " and ".join(str(count) for count in spans)
    return f"{layout}, layer-outermost in {counts} spans"

"""How many blocks the virtual cache gets, and what vLLM must be told so that it does no arithmetic with free memory.

Two sizes matter. The *budget* is what the cache may ever hold: the smaller of the tenant's limit and the device's
capacity, less what the tenant leases besides (weights, graphs); one request of max_model_len tokens must fit in it. The
*virtual* size is how far the addresses reach: the capacity, unless the user says otherwise, so that a limit can be
raised while the engine runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from elastickv.engines.vllm import geometry
from elastickv.errors import EngineRefused
from elastickv.memory import PoolGeometry, RankGeometry
from elastickv.units import format_size

__all__ = ["Device", "Plan", "Wish", "plan", "silence_vllm"]

_PROBE_BLOCKS: Final = 1 << 20
_SMALL: Final = 16 * 1024 * 1024
_LOW_FRACTION: Final = 0.01

Planner = Callable[[Any, list[dict[str, Any]], list[int]], list[Any]]


class Device(NamedTuple):
    """What is known of a device before the cache is made; bytes, limit None: no limit. static: leased besides.

    others: what other tenants hold that no request can get from them (floors, static bytes), and unmanaged memory.
    """

    name: str
    page_bytes: int
    capacity: int
    limit: int | None
    static: int = 0
    others: int = 0

    @property
    def budget(self) -> int:
        """The most bytes that the cache may ever hold here."""
        return max(0, (self.capacity if self.limit is None else min(self.limit, self.capacity)) - self.static)


class Wish(NamedTuple):
    """What the user asked for: bytes of a device, bytes of one rank, or blocks; None: not given."""

    virtual: int | None
    rank_bytes: int | None
    blocks: int | None


class Plan(NamedTuple):
    """vLLM's configuration of each rank, and the ranks' shapes in memory."""

    configs: list[Any]
    ranks: list[RankGeometry]
    warning: str = ""
    """What would not fit while the others are as they are now."""


def silence_vllm(config: Any, virtual: int | None) -> Wish:
    """Sets the sizes in `config` (VllmConfig) so that no worker looks at free memory; returns what stood there.

    Called before the workers are started: they get a copy of the configuration.
    """
    cache = config.cache_config
    wish = Wish(virtual, cache.kv_cache_memory_bytes, cache.num_gpu_blocks_override)
    # A given size skips the arithmetic. The CPU worker compares it with the free memory, so it must be small; the
    # plan replaces it in any case. The fraction is what the GPU worker compares with the free memory.
    cache.kv_cache_memory_bytes = _SMALL
    cache.gpu_memory_utilization = min(cache.gpu_memory_utilization, _LOW_FRACTION)
    return wish


class _Costs:
    """What blocks cost on each device, in whole pages, as the pool will count them."""

    def __init__(self, ranks: Sequence[RankGeometry], devices: Mapping[str, Device]) -> None:
        self.devices = devices
        pages = {device.page_bytes for device in devices.values()}
        if len(pages) != 1:
            raise EngineRefused(f"elastickv cannot manage ranks on devices with pages of {sorted(pages)} bytes")
        self.page = pages.pop()
        # Any number of blocks that every span accepts; only the costs per page are read from it.
        self._shape = PoolGeometry.of(self.page * 2, self.page, ranks)

    @property
    def step(self) -> int:
        """The number of blocks must be a multiple of this, so that spans begin on page borders."""
        if all(rank.spans == 1 for rank in self._shape.ranks):
            return 1
        return self.page // math.gcd(self.page, self._shape.block_bytes)

    def of(self, device: str, blocks: int) -> int:
        """Bytes that the lowest `blocks` blocks take on the device."""
        return math.ceil(blocks * self._shape.block_bytes / self.page) * self._shape.page_cost(device)

    def blocks_within(self, room: Mapping[str, int]) -> int:
        """The most blocks whose memory fits in `room` (bytes by device) on every device."""
        return min(
            room[name] // self._shape.page_cost(name) * self.page // self._shape.block_bytes for name in self.devices
        )

    def too_small(self, blocks: int) -> str:
        """Where `blocks` blocks do not fit, and what of it is too small."""
        for name, device in self.devices.items():
            need = self.of(name, blocks)
            if need > device.budget:
                limited = device.limit is not None and device.limit < device.capacity
                what = "this tenant's limit" if limited else f"the capacity of {name}"
                if device.static:
                    whole = format_size(device.budget + device.static)
                    left = f"{whole} leaves {format_size(device.budget)} beside its weights and graphs"
                    return f"{format_size(need)}, and {what} of {left}"
                return f"{format_size(need)}, and {what} is {format_size(device.budget)}"
        return f"{blocks} blocks"


def plan(
    planner: Planner,
    config: Any,
    specs: list[dict[str, Any]],
    ranks: Sequence[Device],
    wish: Wish,
    concurrency: Callable[[Any, Any], float],
) -> Plan:
    """Plans the cache. `planner` is vLLM's get_kv_cache_configs, `ranks` the device of each rank.

    Shortens max_model_len to what fits in the budget if the user left its choice to vLLM (-1). Refuses if a block, or
    a request of max_model_len tokens, does not fit in the budget.
    """
    if not any(specs):
        raise EngineRefused(
            "elastickv cannot manage this engine: its model has no KV cache; unset ELASTICKV to serve without it"
        )
    probed = _probe(planner, config, specs)
    shapes = [geometry.read(one, rank.name) for one, rank in zip(probed, ranks, strict=True)]
    per_request = _blocks_of_request(config, probed, concurrency)
    costs = _Costs(shapes, {device.name: device for device in ranks})
    affordable = costs.blocks_within({name: device.budget for name, device in costs.devices.items()})
    if affordable < 2:  # block 0 is vLLM's null block and serves no request
        raise EngineRefused(_block_too_large(shapes, costs))
    if config.model_config.original_max_model_len == -1:
        _fit_length(planner, config, specs, affordable)
        _shorten(config, probed, concurrency, affordable)
    elif per_request + 1 > affordable:
        raise EngineRefused(_request_too_large(config, costs, per_request, affordable))
    blocks = _virtual_blocks(shapes, costs, wish)
    config.cache_config.num_gpu_blocks_override = blocks
    needs = _blocks_of_request(config, probed, concurrency)
    return Plan(planner(config, specs, [1] * len(specs)), shapes, _crowded(config, costs, needs + 1))


def _probe(planner: Planner, config: Any, specs: list[dict[str, Any]]) -> list[Any]:
    """A plan with more room than anybody needs."""
    model, cache = config.model_config, config.cache_config
    chosen = model.original_max_model_len
    cache.num_gpu_blocks_override = _PROBE_BLOCKS
    model.original_max_model_len = model.max_model_len  # so that the probe does not shorten it
    try:
        return planner(config, specs, [1] * len(specs))
    finally:
        model.original_max_model_len = chosen
        cache.num_gpu_blocks_override = None


def _blocks_of_request(config: Any, probed: list[Any], concurrency: Callable[[Any, Any], float]) -> int:
    """The blocks of one request of max_model_len tokens as it is now."""
    needs: list[int] = [math.ceil(one.num_blocks / concurrency(config, one) - 1e-6) for one in probed]
    return max(needs)


def _shorten(config: Any, probed: list[Any], concurrency: Callable[[Any, Any], float], affordable: int) -> None:
    """Where a request needs more than vLLM's planner knows (held windows), the longest that fits all the same."""
    model = config.model_config
    low, high = 1, model.max_model_len
    while low < high:
        model.max_model_len = (low + high + 1) // 2
        fits = _blocks_of_request(config, probed, concurrency) + 1 <= affordable
        low, high = (model.max_model_len, high) if fits else (low, model.max_model_len - 1)
    model.max_model_len = low


def _fit_length(planner: Planner, config: Any, specs: list[dict[str, Any]], affordable: int) -> None:
    """Lets vLLM shorten max_model_len to what `affordable` blocks hold."""
    config.cache_config.num_gpu_blocks_override = affordable
    try:
        planner(config, specs, [1] * len(specs))
    except ValueError as error:
        raise EngineRefused(
            f"elastickv cannot fit one token in {affordable} blocks of memory: {error}; raise the limit or the capacity"
        ) from error


def _virtual_blocks(shapes: Sequence[RankGeometry], costs: _Costs, wish: Wish) -> int:
    """The number of blocks of the virtual range, rounded down so that spans begin on page borders, at least 2."""
    if wish.virtual is None and wish.blocks is not None:
        wanted = wish.blocks
    elif wish.virtual is None and wish.rank_bytes is not None:
        wanted = min(wish.rank_bytes // (shape.block_bytes * shape.spans) for shape in shapes)
    else:
        wanted = costs.blocks_within({n: wish.virtual or device.capacity for n, device in costs.devices.items()})
    step = costs.step
    return max(wanted // step * step, math.ceil(2 / step) * step)


def _crowded(config: Any, costs: _Costs, blocks: int) -> str:
    """Floors and weights of others may leave too little for the longest request; that changes when they end."""
    for name, device in costs.devices.items():
        left = min(device.budget, max(0, device.capacity - device.others - device.static))
        if costs.of(name, blocks) > left:
            return (
                f"one request of max_model_len {config.model_config.max_model_len} tokens takes "
                f"{format_size(costs.of(name, blocks))} of {name}, and floors and weights of others leave "
                f"{format_size(left)} now: such a request waits until they end"
            )
    return ""


def _block_too_large(shapes: Sequence[RankGeometry], costs: _Costs) -> str:
    one = max(shape.block_bytes * shape.spans for shape in shapes)
    return (
        f"elastickv cannot manage this engine: a block of its KV cache is {format_size(one)}; vLLM's null block and "
        f"one more take {costs.too_small(2)}; raise it, or lower --block-size"
    )


def _request_too_large(config: Any, costs: _Costs, blocks: int, affordable: int) -> str:
    return (
        f"elastickv cannot manage this engine: one request of max_model_len {config.model_config.max_model_len} tokens "
        f"takes {blocks} blocks and vLLM's null block, {costs.too_small(blocks + 1)}, which holds {affordable}; "
        "raise it, or lower --max-model-len (-1 lets it be chosen)"
    )

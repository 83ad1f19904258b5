"""Blocks behind the window of a running request: given back at once, or held until the request ends.

vLLM's block manager gives up the blocks that a sliding window, or a chunk, has left behind, and puts the null block in
their place in its own list. The worker's table keeps the old ids, and GPU kernels load tiles that straddle the edge of
the window and mask them afterwards: they read blocks that were given up. Where that is so the blocks are held: used,
until the request is freed or preempted. vLLM 0.33 with its V2 runner clears the worker's entries itself, for plain
sliding windows without context parallelism; there they go at once. Kernels on the CPU do not read them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
    iter_layer_specs,
)

__all__ = ["Hold", "Rule", "concurrency", "hold"]

_CLEARED_FROM: Final = (0, 33)

Concurrency = Callable[[Any, Any], float]


class Rule:
    """Which groups of layers of one engine have their blocks held."""

    def __init__(self, config: Any, version: str, *, on_cpu: bool, always: bool) -> None:
        """`config` is the VllmConfig. `always`: also where no kernel is known to read them."""
        self._none = on_cpu and not always
        self._cleared = not always and _clears_windows(config, version)

    def groups(self, groups: Sequence[Any]) -> frozenset[int]:
        """The numbers of the groups (KVCacheGroupSpec) whose blocks are held."""
        if self._none:
            return frozenset()
        return frozenset(
            number
            for number, group in enumerate(groups)
            if any(self._holds(spec) for spec in iter_layer_specs(group.kv_cache_spec))
        )

    def _holds(self, spec: Any) -> bool:
        if isinstance(spec, ChunkedLocalAttentionSpec | RSWASpec):
            return True
        return isinstance(spec, SlidingWindowSpec) and not (self._cleared and type(spec) is SlidingWindowSpec)

    def describe(self, groups: Sequence[Any]) -> str | None:
        """For the log; None for a model without windows."""
        windows = [
            number
            for number, group in enumerate(groups)
            if any(
                isinstance(spec, SlidingWindowSpec | ChunkedLocalAttentionSpec | RSWASpec)
                for spec in iter_layer_specs(group.kv_cache_spec)
            )
        ]
        if not windows:
            return None
        held = self.groups(groups)
        if not held:
            return "blocks behind a window are given back at once"
        part = "" if len(held) == len(windows) else f" in {len(held)} of {len(windows)} groups"
        return f"blocks behind a window are held until the request ends{part}"


def _clears_windows(config: Any, version: str) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < _CLEARED_FROM or not config.use_v2_model_runner:
        return False
    parallel = config.parallel_config
    sizes = (getattr(parallel, f"{phase}_context_parallel_size", 1) for phase in ("decode", "prefill"))
    return all(size == 1 for size in sizes)


def concurrency(original: Concurrency, rule: Rule) -> Concurrency:
    """vLLM's get_max_concurrency_for_kv_cache_config, with held groups counted at the full length of a request."""

    def counted(config: Any, planned: Any) -> float:
        held = rule.groups(planned.kv_cache_groups)
        if not held:
            return original(config, planned)
        length = config.model_config.max_model_len
        blocks = 0
        for number, group in enumerate(planned.kv_cache_groups):
            spec = group.kv_cache_spec
            if number in held:
                blocks += cdiv(length, spec.block_size)
            else:
                blocks += cdiv(spec.max_memory_usage_bytes(config), spec.page_size_bytes)
        return float(planned.num_blocks / blocks)

    return counted


class Hold:
    """One group's held blocks, by request. Used by the engine's thread, as the manager it belongs to."""

    def __init__(self, manager: Any) -> None:
        self._pool = manager.block_pool
        self._kept: dict[str, list[Any]] = {}
        self._request = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def free_blocks(self, ordered_blocks: Iterable[Any]) -> None:
        """Stands in the pool's place while a manager gives up blocks behind a window."""
        self._kept.setdefault(self._request, []).extend(ordered_blocks)

    def keep_for(self, request_id: str) -> None:
        """Whose blocks the next ones are."""
        self._request = request_id

    def release(self, request_id: str) -> list[Any]:
        """The request's held blocks, which are no longer held here."""
        return self._kept.pop(request_id, [])

    @property
    def count(self) -> int:
        """How many blocks are held now."""
        return sum(map(len, self._kept.values()))


def hold(coordinator: Any, groups: Iterable[int]) -> list[Hold]:
    """Has the managers of these groups (of a KVCacheCoordinator) keep what they give up until the request is freed."""
    return [_hold(coordinator.single_type_managers[number]) for number in sorted(groups)]


def _hold(manager: Any) -> Hold:
    pool, held = manager.block_pool, Hold(manager)
    remove, pop = manager.remove_skipped_blocks, manager.pop_blocks_for_free

    def remove_skipped_blocks(request_id: str, *args: Any, **kwargs: Any) -> None:
        held.keep_for(request_id)
        manager.block_pool = held
        try:
            remove(request_id, *args, **kwargs)
        finally:
            manager.block_pool = pool

    def pop_blocks_for_free(request_id: str) -> list[Any]:
        # The list is freed from its end: what lies behind the window is the first to be evicted, as without holding.
        blocks: list[Any] = pop(request_id)
        return [*blocks, *reversed(held.release(request_id))]

    manager.remove_skipped_blocks = remove_skipped_blocks
    manager.pop_blocks_for_free = pop_blocks_for_free
    # vLLM admits a request at the number of blocks at which its window settles; held ones come on top of that.
    manager.max_admission_blocks_per_request = None
    return held

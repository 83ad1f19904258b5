"""SGLang 0.5.16: neither its allocator nor its platform is asked for anything, so what asks is hooked itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from elastickv.engines.seams import Seam
from elastickv.engines.sglang import hooks, seams
from elastickv.engines.sglang.release import Hook, Release

__all__ = ["RELEASE"]

_SCHEDULER: Final = "sglang.srt.managers.scheduler"
_RUNNER: Final = "sglang.srt.model_executor.model_runner"
_CONFIGURATOR: Final = "sglang.srt.mem_cache.kv_cache_configurator"
_REGISTRY: Final = "sglang.srt.mem_cache.registry"
_COMMON: Final = "sglang.srt.mem_cache.common"
_BATCH: Final = "sglang.srt.managers.schedule_batch"
_POLICY: Final = "sglang.srt.managers.schedule_policy"
_TREE: Final = "sglang.srt.mem_cache.radix_cache"
_CHUNKS: Final = "sglang.srt.mem_cache.chunk_cache"

# --- start


def _process_group(result: Any, runner: Any) -> None:
    """On the ledger before anything is loaded; ranks know of each other only from here on."""
    from elastickv.engines.sglang import session

    session.current().begin()


def _mha_pool(original: Callable[..., Any], configurator: Any, *, mha_pool_class: type, **plan: Any) -> Any:
    from elastickv.engines.sglang import pools

    stock = sys.modules[_CONFIGURATOR].MHATokenToKVPool
    made = pools.pool_class("mha") if mha_pool_class is stock else mha_pool_class
    return original(configurator, mha_pool_class=made, **plan)


def _mla_pool(original: Callable[..., Any], configurator: Any, **plan: Any) -> Any:
    """SGLang names the class where it makes the pool. While it does, that name is the elastic one's."""
    from elastickv.engines.sglang import pools

    module: Any = sys.modules[_CONFIGURATOR]
    stock = module.MLATokenToKVPool
    module.MLATokenToKVPool = pools.pool_class("mla")
    try:
        return original(configurator, **plan)
    finally:
        module.MLATokenToKVPool = stock


def _tree(result: Any, ctx: Any) -> Any:
    from elastickv.engines.sglang import tree

    return tree.adopt(result, _parked)


def _parked() -> int:
    """Tokens of a request that waits for memory between two chunks.

    SGLang adds up those of the requests in its batches, and this one is in none: in SGLang alone the next chunk never
    waits. Without a prefix cache they are not in the tree either.
    """
    from elastickv.engines.sglang import session

    scheduler = session.current().scheduler
    request = scheduler.chunked_req
    if request is None or request.kv is None:
        return 0
    batches = [batch for batch in (scheduler.last_batch, scheduler.running_batch) if batch is not None]
    if any(one is request for batch in batches for one in batch.reqs):
        return 0
    page = scheduler.page_size
    return int(-(-request.kv.kv_allocated_len // page) * page - request.cache_protected_len)


# --- capacity: what later releases ask the allocator


def _evict(original: Callable[..., Any], tree_cache: Any, num_tokens: int) -> None:
    """Before SGLang allocates. Its own way drops prefixes first, and as many tokens as are asked for."""
    if tree_cache is not None:
        tree_cache.token_to_kv_pool_allocator.evict_to_free_tokens(tree_cache, num_tokens)


def _decode_fits(original: Callable[..., Any], batch: Any, selected_indices: list[int] | None = None) -> bool:
    tokens = batch.new_tokens_required_next_decode(selected_indices)
    fits: bool = batch.token_to_kv_pool_allocator.check_decode_capacity(num_tokens=tokens, tree_cache=batch.tree_cache)
    return fits


def _open_again(scheduler: Any, running_batch: Any) -> None:
    """A request that found no memory closes admission until a running one leaves. Where none runs, none would."""
    if running_batch.is_empty():
        running_batch.batch_is_full = False


def _admit(original: Callable[..., Any], adder: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """What a request needs at once has memory when it is admitted (admission.py)."""
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult

    allocator, tree = adder.token_to_kv_pool_allocator, adder.tree_cache
    tokens = _left(request)
    answer = max(0, request.sampling_params.max_new_tokens - len(request.output_ids))
    total = tokens + min(answer, CLIP_MAX_NEW_TOKENS) + adder.page_size
    if adder.rem_chunk_tokens is not None:
        tokens = min(tokens, adder.rem_chunk_tokens)
    with adder._lock_node(request.last_node):  # its own prefix cannot make room for it
        if total >= adder.rem_total_tokens:
            allocator.demand(tree, promised=adder.rem_total_token_offset, tokens=total)
        # Without a prefix cache SGLang lets one in whose answer's end is known (ignore_eos) by a count of its own.
        # Where SGLang refuses, nothing is mapped or dropped for it.
        may = total < adder.rem_total_tokens or (request.sampling_params.ignore_eos and getattr(tree, "disable", True))
        if may and not allocator.admits(tree, promised=_promised(adder), tokens=tokens):
            return AddReqResult.NO_TOKEN
    return original(adder, request, *args, **kwargs)


def _continue(original: Callable[..., Any], adder: Any, request: Any) -> Any:
    """The next chunk of a request that has begun, as far as there is memory. It waits where there is none.

    Until its last chunk nobody else begins: SGLang knows of one that has begun, and takes it for a part of every batch.
    """
    wanted = min(_left(request), adder.rem_chunk_tokens)
    room = adder.token_to_kv_pool_allocator.room(adder.tree_cache, promised=_promised(adder), tokens=wanted)
    if room < wanted:
        adder.rem_chunk_tokens = room
    unfinished = request if room == 0 else original(adder, request)
    if unfinished is not None:
        adder.rem_chunk_tokens = 0
    return unfinished


def _promised(adder: Any) -> int:
    """Tokens that this pass has given away. Mixed with a prefill, a running request counts as a token, and may take a
    page."""
    from elastickv.engines.sglang import session

    decoding = len(adder.running_batch.reqs) if session.current().scheduler.is_mixed_chunk else 0
    return int(adder.cur_rem_token_offset + decoding * (adder.page_size - 1))


def _left(request: Any) -> int:
    """Tokens of a request that are to be computed before it answers."""
    return len(request.full_untruncated_fill_ids) - len(request.prefix_indices)


# --- what it runs on


def _backends() -> set[str]:
    from sglang.srt.runtime_context import get_server_args

    return {str(name) for name in get_server_args().get_attention_backends()}


def _device() -> str:
    from sglang.srt.runtime_context import get_server_args

    return str(get_server_args().device)


def _idle(scheduler: Any) -> bool:
    return bool(scheduler.is_fully_idle())


_HOOKS: Final = (
    Hook(f"{_RUNNER}.ModelRunner.init_torch_distributed", _process_group, "after"),
    Hook(f"{_SCHEDULER}.Scheduler.process_input_requests", hooks.ingested, "after"),
    Hook(f"{_SCHEDULER}.Scheduler.get_new_batch_prefill", _open_again, "before"),
    Hook(f"{_CONFIGURATOR}.KVCacheConfigurator._build_mha_kv_pool", _mha_pool, "around"),
    Hook(f"{_CONFIGURATOR}.KVCacheConfigurator._build_mla_kv_pool", _mla_pool, "around"),
    Hook(f"{_REGISTRY}.default_radix_cache_factory", _tree, "after"),
    Hook(f"{_COMMON}.evict_from_tree_cache", _evict, "around"),
    Hook(f"{_BATCH}.ScheduleBatch.check_decode_mem", _decode_fits, "around"),
    Hook(f"{_POLICY}.PrefillAdder.add_one_req", _admit, "around"),
    Hook(f"{_POLICY}.PrefillAdder.add_chunked_req", _continue, "around"),
    *hooks.COMMON,
)

_SEAMS: Final = (
    # hooked
    Seam(_RUNNER, "ModelRunner.init_torch_distributed", ("self",)),
    Seam(_SCHEDULER, "Scheduler.process_input_requests", ("self", "recv_reqs")),
    Seam(_SCHEDULER, "Scheduler.get_new_batch_prefill", ("self", "running_batch")),
    Seam(
        _CONFIGURATOR,
        "KVCacheConfigurator._build_mha_kv_pool",
        ("self", "max_total_num_tokens", "mha_pool_class", "quant_method"),
    ),
    Seam(_CONFIGURATOR, "KVCacheConfigurator._build_mla_kv_pool", ("self", "max_total_num_tokens")),
    Seam(_REGISTRY, "default_radix_cache_factory", ("ctx",)),
    Seam(_COMMON, "evict_from_tree_cache", ("tree_cache", "num_tokens")),
    Seam(_BATCH, "ScheduleBatch.check_decode_mem", ("self", "selected_indices")),
    Seam(_POLICY, "PrefillAdder.add_one_req", ("self", "req", "has_chunked_req", "truncation_align_size")),
    Seam(_POLICY, "PrefillAdder.add_chunked_req", ("self", "req")),
    # relied on
    Seam("sglang.srt.runtime_context", "get_server_args", ()),
    Seam("sglang.srt.server_args", "ServerArgs.get_attention_backends", ("self",)),
    Seam(_CONFIGURATOR, "MHATokenToKVPool", ("size", "page_size", "dtype")),
    Seam(_CONFIGURATOR, "MLATokenToKVPool", ("size", "page_size", "dtype")),
    Seam(_BATCH, "ScheduleBatch.new_tokens_required_next_decode", ("self", "selected_indices")),
    Seam(_POLICY, "PrefillAdder._lock_node", ("self", "last_node")),
    Seam(_TREE, "RadixCache.evict", ("self", "params")),
    Seam(_TREE, "RadixCache.protected_size", ("self",)),
    Seam(_TREE, "RadixCache.evictable_size", ("self",)),
    Seam(_CHUNKS, "ChunkCache.protected_size", ("self",)),
    *seams.COMMON,
)

RELEASE: Final = Release(
    versions="0.5.16",
    lowest=(0, 5, 16),
    below=(0, 5, 17),
    hooks=_HOOKS,
    seams=_SEAMS,
    # Of its own pool with strides (PageMajorMHATokenToKVPool) it says: for Triton's kernels only.
    strided={"mha": frozenset({"triton", "torch_native"}), "mla": frozenset({"triton", "torch_native"})},
    backends=_backends,
    device=_device,
    idle=_idle,
)

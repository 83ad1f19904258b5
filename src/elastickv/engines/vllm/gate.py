"""What is refused, and in which words. Looks at configurations only; changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from elastickv.errors import EngineRefused

__all__ = [
    "CONNECTORS",
    "KINDS",
    "VERSIONS",
    "check_backends",
    "check_config",
    "check_groups",
    "check_version",
    "check_worker_class",
    "is_known_connector",
]

VERSIONS: Final = ">=0.32,<0.34"
_LOWEST: Final = (0, 32)
_BELOW: Final = (0, 34)

_EXECUTORS: Final = frozenset({"mp", "uni"})

CONNECTORS: Final = frozenset({"ExampleConnector"})
"""Connectors that copy block by block, of blocks that they hold a reference to. No other is known to be safe."""

_MULTI: Final = "MultiConnector"
"""Several in one: each of them is looked at."""

_REGISTERING: Final = {
    "NixlConnector": "registers the whole cache with the network card",
    "NixlPullConnector": "registers the whole cache with the network card",
    "NixlPushConnector": "registers the whole cache with the network card",
    "MooncakeConnector": "registers the whole cache with the network card and may bring its own memory",
    "MooncakeStoreConnector": "registers the whole cache with its store",
    "MoRIIOConnector": "registers the whole cache with the network card",
    "LMCacheConnectorV1": "copies from addresses that it keeps, on streams of its own",
    "LMCacheMPConnector": "shares the whole cache with another process",
    "FlexKVConnectorV1": "shares the whole cache with another process",
    "HF3FSKVConnector": "copies from addresses that it keeps, on streams of its own",
    "ExampleHiddenStatesConnector": "reads blocks on a stream of its own when their request has given them up",
    "DecodeBenchConnector": "fills the whole cache at start",
    "OffloadingConnector": "reads blocks on streams of its own when their request has given them up",
    "HiSparseConnector": "keeps reading blocks that it has given up",
    "SimpleCPUOffloadConnector": "walks vLLM's own list of free blocks",
}

_BACKENDS: Final = {
    "FLEX_ATTENTION": "it sizes its tables by the whole virtual cache and has one layout only",
    "TURBOQUANT": "it has one layout only, which scatters a block",
    "ULTRAQUANT": "it has one layout only, which scatters a block",
    "HPC_ATTN": "it has one layout only, which scatters a block",
    "CUTLASS_MSA": "it has one layout only, which scatters a block",
}

KINDS: Final = frozenset(
    {"FullAttentionSpec", "MLAAttentionSpec", "SinkFullAttentionSpec", "CrossAttentionSpec", "EncoderOnlyAttentionSpec"}
    | {"SlidingWindowSpec", "SlidingWindowMLASpec", "ChunkedLocalAttentionSpec", "RSWASpec", "MambaSpec"}
    | {"HiddenStateCacheSpec", "CircularBufferSpec"}
)
"""Kinds of layers that keep their blocks while a request runs, or whose given-up blocks are held (window.py)."""

_WORKER_METHODS: Final = ("_maybe_get_memory_pool_context", "initialize_from_config", "execute_model")


def _refuse(what: str, why: str, remedy: str) -> EngineRefused:
    return EngineRefused(f"elastickv cannot manage {what}: {why}; {remedy}, or unset ELASTICKV to serve without it")


def is_known_connector(name: str) -> bool:
    """Whether somebody has looked at the connector of that name, whatever came of it."""
    return name in CONNECTORS or name in _REGISTERING or name == _MULTI


def check_version(version: str) -> None:
    """Refuses a vLLM outside VERSIONS."""
    match = re.match(r"(\d+)\.(\d+)", version)
    found = (int(match[1]), int(match[2])) if match else None
    if found is None or not _LOWEST <= found < _BELOW:
        raise _refuse(f"vLLM {version}", f"it is written for vLLM {VERSIONS}", "install such a version")


def check_config(config: Any) -> None:
    """Refuses what the configuration (VllmConfig) already shows to be impossible."""
    _check_parallel(config.parallel_config)
    if config.kv_transfer_config is not None:
        for name in _connectors(config.kv_transfer_config):
            _check_connector(name)
    backend = getattr(config.attention_config, "backend", None)
    if backend is not None:
        check_backends([backend.name])
    dtype = str(config.cache_config.cache_dtype)
    if dtype.endswith("per_token_head"):
        why = "vLLM writes its scales over the whole cache at the first step"
        raise _refuse(f"the cache type {dtype}", why, "use --kv-cache-dtype auto or fp8")
    if getattr(config.attention_config, "hisparse_config", None) is not None:
        raise _refuse("HiSparse", "it reads blocks that it has given up", "start without it")


def _check_parallel(parallel: Any) -> None:
    remedy = "start one engine on one machine"
    backend = parallel.distributed_executor_backend
    if not isinstance(backend, str) or backend not in _EXECUTORS:
        name = backend if isinstance(backend, str) else getattr(backend, "__name__", str(backend))
        why = f"its orders travel through the executors {', '.join(sorted(_EXECUTORS))}"
        raise _refuse(f"the executor {name}", why, "choose --distributed-executor-backend mp")
    if parallel.nnodes > 1:
        raise _refuse(f"{parallel.nnodes} machines", "a ledger is one machine's", remedy)
    if parallel.data_parallel_size > 1:
        why = "each replica is a tenant of its own"
        raise _refuse(f"--data-parallel-size {parallel.data_parallel_size}", why, "start one engine a replica")
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, option, 1) > 1:
            why = "its warm-up writes to blocks that nobody was given"
            raise _refuse(f"--{option.replace('_', '-')} {getattr(parallel, option)}", why, "leave it at 1")
    if getattr(parallel, "enable_elastic_ep", False):
        raise _refuse("elastic expert parallelism", "it moves workers while they hold memory", "start without it")


def _connectors(transfer: Any) -> Iterable[str]:
    """Names of the connectors, also of those within a MultiConnector."""
    if not transfer.kv_connector:
        return
    if transfer.kv_connector != _MULTI:
        yield transfer.kv_connector
        return
    for inner in (transfer.kv_connector_extra_config or {}).get("connectors", []):
        yield str(inner.get("kv_connector"))


def _check_connector(name: str) -> None:
    if name in CONNECTORS:
        return
    why = _REGISTERING.get(name, "it is not known to copy block by block")
    known = ", ".join(sorted(CONNECTORS))
    raise _refuse(f"the KV connector {name}", why, f"use {known}")


def check_backends(names: Iterable[str]) -> None:
    """Refuses attention backends by name (AttentionBackend.get_name())."""
    for name in names:
        if name in _BACKENDS:
            raise _refuse(f"the attention backend {name}", _BACKENDS[name], "choose another with --attention-backend")


def check_groups(groups: Iterable[Any], *, on_cpu: bool) -> None:
    """Refuses groups of layers of a kind that is not known: their kernels might follow blocks that were given up."""
    if on_cpu:
        return
    for group in groups:
        for spec in getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values():
            kind = type(spec).__name__
            if kind not in KINDS:
                why = "it is not known whether its kernels read blocks that were already given up"
                raise _refuse(f"layers of the kind {kind}", why, "use another model")


def check_worker_class(worker: type) -> None:
    """Refuses a worker class that replaces one of the methods that are hooked."""
    from vllm.v1.worker.gpu_worker import Worker

    base: type = Worker
    for name in _WORKER_METHODS:
        if getattr(worker, name, None) is not getattr(base, name):
            where = f"{worker.__module__}.{worker.__qualname__}"
            raise _refuse(f"the worker {where}", f"it has its own {name}()", "use vLLM's worker for CPU or CUDA")

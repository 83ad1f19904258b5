"""What is refused, and in which words. Looks at configurations only; changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from elastickv.errors import EngineRefused

if TYPE_CHECKING:
    from elastickv.engines.sglang.session import Session

__all__ = ["REFUSED", "REFUSED_VARIABLES", "check_arguments", "check_engaged", "check_variables"]

REFUSED: Final[dict[str, tuple[Any, str, str]]] = {
    "speculative_algorithm": (None, "its draft has a cache of its own on the same blocks", "start without it"),
    "disaggregation_mode": ("null", "it registers the whole cache with the network card", "leave it at null"),
    "enable_pdmux": (False, "it runs steps on streams that are not known", "start without it"),
    "enable_unified_memory": (False, "it lays the cache out itself, behind ids of its own", "start without it"),
    "enable_page_major_kv_layout": (False, "elastickv lays tokens out like that by itself", "start without it"),
    "enable_hisparse": (False, "it moves blocks that it has given up", "start without it"),
    "enable_hierarchical_cache": (
        False,
        "its copies to the host read blocks on streams of their own",
        "start without it",
    ),
    "enable_lmcache": (False, "it copies from addresses that it keeps", "start without it"),
    "enable_flexkv": (False, "it shares the whole cache with another process", "start without it"),
    "enable_unified_cache_external_linker": (False, "it registers the whole cache with its store", "start without it"),
    "enable_kv_cache_sharding": (False, "its ranks hold different blocks", "start without it"),
    "enable_dp_attention": (False, "its ranks schedule by themselves", "start one engine a replica"),
    "attn_dp_size": (1, "its ranks schedule by themselves", "start one engine a replica"),
    "dp_size": (1, "each replica is a tenant of its own", "start one engine a replica"),
    "dcp_size": (1, "its blocks are spread over ranks", "leave it at 1"),
    "attn_cp_size": (1, "it is not known to keep to blocks that it was given", "leave it at 1"),
    "nnodes": (1, "a ledger is one machine's", "start one engine on one machine"),
    "radix_cache_backend": (None, "elastickv brings its own", "leave it out"),
    "prefill_only_disable_kv_cache": (False, "there is no cache to manage", "start without it"),
    "elastic_ep_backend": (None, "it moves ranks while they hold memory", "start without it"),
    "use_ray": (False, "it starts schedulers without their plug-ins", "start without it"),
    "dllm_algorithm": (None, "its steps write blocks that are not known to be theirs", "start without it"),
    "kv_canary": ("none", "it reads the whole cache, also where no memory is", "leave it out"),
    "disaggregation_decode_retraction_backup": (None, "it copies blocks on streams of its own", "leave it out"),
    "disaggregation_decode_enable_offload_kvcache": (
        False,
        "it copies blocks on streams of its own",
        "start without it",
    ),
}
"""Options of SGLang's that are refused: the value that is not, why, and what to do."""

REFUSED_VARIABLES: Final[dict[str, tuple[Any, str]]] = {
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": (False, "it maps the cache itself"),
    "SGLANG_USE_HND_KVCACHE": (False, "its blocks lie otherwise"),
    "SGLANG_MOONCAKE_CUSTOM_MEM_POOL": (None, "it takes the cache from a pool of its own"),
}
"""Variables of SGLang's that are refused where they are not as here, and why."""

_DTYPES: Final = ("auto", "float32", "bfloat16", "bf16", "float16", "fp8_e4m3", "fp8_e5m2")
_BACKENDS: Final = {
    "ascend": "it makes its own cache",
    "intel_xpu": "its memory is not known",
    "aiter": "it lays blocks out itself",
}


def _refuse(what: str, why: str, remedy: str) -> EngineRefused:
    return EngineRefused(f"elastickv cannot manage {what}: {why}; {remedy}, or unset ELASTICKV to serve without it")


def check_arguments(arguments: Any) -> None:
    """Refuses what SGLang's arguments already show to be impossible: ServerArgs, or a view of what they came to."""
    for name, (plain, why, remedy) in REFUSED.items():
        value = getattr(arguments, name, plain)
        if value != plain and value is not None:
            option = f"--{name.replace('_', '-')}"
            raise _refuse(option if value is True else f"{option} {value}", why, remedy)
    dtype = str(getattr(arguments, "kv_cache_dtype", "auto"))
    if dtype not in _DTYPES:
        raise _refuse(
            f"--kv-cache-dtype {dtype}", "its blocks have scales beside them", f"use one of {', '.join(_DTYPES)}"
        )
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        backend = str(getattr(arguments, name, None))
        if backend in _BACKENDS:
            raise _refuse(f"the attention backend {backend}", _BACKENDS[backend], "choose another")


def check_variables(read: Callable[[str], Any]) -> None:
    """Refuses what SGLang's own variables ask for; `read` says what one of them is, None where there is no such one."""
    for name, (plain, why) in REFUSED_VARIABLES.items():
        value = read(name)
        if value != plain and value is not None:
            raise _refuse(f"{name}={value}", why, "unset it")


def check_engaged(scheduler: Any, session: Session) -> None:
    """Refuses to serve if a part of the engine is not the plug-in's."""
    from elastickv.engines.sglang.tree import Elastic

    allocator = scheduler.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    wrong = []
    if not isinstance(allocator, session.allocators()):
        wrong.append(f"the allocator is {type(allocator).__qualname__}")
    if not session.holds(pool):
        wrong.append(f"the pool {type(pool).__qualname__} lies elsewhere")
    if not isinstance(scheduler.tree_cache, Elastic):
        wrong.append(f"the prefix cache is {type(scheduler.tree_cache).__qualname__}")
    if scheduler.is_hybrid_swa or scheduler.is_hybrid_ssm:
        wrong.append("the model has layers with windows or states, whose blocks are kept apart")
    if wrong:
        raise EngineRefused(
            f"elastickv is not in charge of this engine (SGLang {session.version}): {'; '.join(wrong)}; "
            "use a model with full attention and SGLang's own options, or unset ELASTICKV to serve without it"
        )

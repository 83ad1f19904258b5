"""What the vLLM plug-in refuses, and the literal texts. Nothing here starts an engine or imports vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastickv.engines import adapter
from elastickv.engines.vllm import gate, geometry
from elastickv.errors import EngineRefused, NotFound

OFF = "or unset ELASTICKV to serve without it"


def config(**changes: Any) -> SimpleNamespace:
    """As much of a VllmConfig as the gate reads; `changes` by "part.field"."""
    parallel = SimpleNamespace(
        distributed_executor_backend="uni",
        nnodes=1,
        data_parallel_size=1,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        enable_elastic_ep=False,
    )
    made = SimpleNamespace(
        parallel_config=parallel,
        kv_transfer_config=None,
        attention_config=SimpleNamespace(backend=None, hisparse_config=None),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(getattr(made, part), field, value)
        else:
            setattr(made, part, value)
    return made


def transfer(name: str, *inner: str) -> SimpleNamespace:
    extra = {"connectors": [{"kv_connector": one} for one in inner]}
    return SimpleNamespace(kv_connector=name, kv_connector_extra_config=extra)


def refusal(made: SimpleNamespace) -> str:
    with pytest.raises(EngineRefused) as caught:
        gate.check_config(made)
    return str(caught.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc1", "0.33.2+cpu", "0.32.0.dev5"])
def test_versions_that_are_managed(version: str) -> None:
    gate.check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "dev", ""])
def test_versions_that_are_refused(version: str) -> None:
    with pytest.raises(EngineRefused) as caught:
        gate.check_version(version)
    assert str(caught.value) == (
        f"elastickv cannot manage vLLM {version}: it is written for vLLM >=0.32,<0.34; install such a version, {OFF}"
    )


def test_a_plain_configuration_passes() -> None:
    gate.check_config(config())
    gate.check_config(config(parallel_config__distributed_executor_backend="mp"))
    gate.check_config(config(cache_config__cache_dtype="fp8"))


CONNECTORS = {
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
    "SomebodysConnector": "it is not known to copy block by block",
}


@pytest.mark.parametrize(("name", "why"), CONNECTORS.items())
def test_connectors_that_are_refused(name: str, why: str) -> None:
    text = f"elastickv cannot manage the KV connector {name}: {why}; use ExampleConnector, {OFF}"
    assert refusal(config(kv_transfer_config=transfer(name))) == text
    assert refusal(config(kv_transfer_config=transfer("MultiConnector", "ExampleConnector", name))) == text


def test_connectors_that_copy_pass() -> None:
    gate.check_config(config(kv_transfer_config=transfer("ExampleConnector")))
    gate.check_config(config(kv_transfer_config=transfer("MultiConnector", "ExampleConnector", "ExampleConnector")))
    gate.check_config(config(kv_transfer_config=SimpleNamespace(kv_connector=None, kv_connector_extra_config={})))


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_somebody_has_looked_at_every_connector_of_the_installed_vllm() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    registered = set(KVConnectorFactory._registry)
    assert {name for name in registered if not gate.is_known_connector(name)} == set()
    assert set(CONNECTORS) - registered == {"SomebodysConnector"}
    assert registered > gate.CONNECTORS


BACKENDS = {
    "FLEX_ATTENTION": "it sizes its tables by the whole virtual cache and has one layout only",
    "TURBOQUANT": "it has one layout only, which scatters a block",
    "ULTRAQUANT": "it has one layout only, which scatters a block",
    "HPC_ATTN": "it has one layout only, which scatters a block",
    "CUTLASS_MSA": "it has one layout only, which scatters a block",
}


@pytest.mark.parametrize(("name", "why"), BACKENDS.items())
def test_backends_that_are_refused(name: str, why: str) -> None:
    text = (
        f"elastickv cannot manage the attention backend {name}: {why}; choose another with --attention-backend, {OFF}"
    )
    assert refusal(config(attention_config__backend=SimpleNamespace(name=name))) == text
    with pytest.raises(EngineRefused) as caught:
        gate.check_backends(["CPU_ATTN", name])
    assert str(caught.value) == text


def test_backends_that_pass() -> None:
    gate.check_backends(["CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER", "MAMBA2_ATTN", "FLASHMLA"])


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        (
            "distributed_executor_backend",
            "ray",
            "the executor ray: its orders travel through the executors mp, uni; "
            "choose --distributed-executor-backend mp",
        ),
        (
            "distributed_executor_backend",
            dict,
            "the executor dict: its orders travel through the executors mp, uni; "
            "choose --distributed-executor-backend mp",
        ),
        ("nnodes", 2, "2 machines: a ledger is one machine's; start one engine on one machine"),
        (
            "data_parallel_size",
            2,
            "--data-parallel-size 2: each replica is a tenant of its own; start one engine a replica",
        ),
        (
            "decode_context_parallel_size",
            2,
            "--decode-context-parallel-size 2: its warm-up writes to blocks that nobody was given; leave it at 1",
        ),
        (
            "prefill_context_parallel_size",
            4,
            "--prefill-context-parallel-size 4: its warm-up writes to blocks that nobody was given; leave it at 1",
        ),
        (
            "enable_elastic_ep",
            True,
            "elastic expert parallelism: it moves workers while they hold memory; start without it",
        ),
    ],
)
def test_parallel_forms_that_are_refused(field: str, value: object, text: str) -> None:
    made = config(**{f"parallel_config__{field}": value})
    assert refusal(made) == f"elastickv cannot manage {text}, {OFF}"


def test_scales_that_vllm_writes_over_the_whole_cache() -> None:
    assert refusal(config(cache_config__cache_dtype="fp8_per_token_head")) == (
        "elastickv cannot manage the cache type fp8_per_token_head: vLLM writes its scales over the whole cache at the "
        f"first step; use --kv-cache-dtype auto or fp8, {OFF}"
    )


def test_hisparse() -> None:
    assert refusal(config(attention_config__hisparse_config=object())) == (
        f"elastickv cannot manage HiSparse: it reads blocks that it has given up; start without it, {OFF}"
    )


class DreamingSpec:
    """A kind of layer that nobody has looked at."""


class SlidingWindowSpec:
    """By the name of vLLM's."""


def test_kinds_of_layers_that_nobody_has_looked_at() -> None:
    known, unknown = (SimpleNamespace(kv_cache_spec=kind()) for kind in (SlidingWindowSpec, DreamingSpec))
    mixed = SimpleNamespace(
        kv_cache_spec=SimpleNamespace(kv_cache_specs={"a": SlidingWindowSpec(), "b": DreamingSpec()})
    )
    gate.check_groups([known, unknown], on_cpu=True)
    gate.check_groups([known], on_cpu=False)
    for groups in ([known, unknown], [mixed]):
        with pytest.raises(EngineRefused) as caught:
            gate.check_groups(groups, on_cpu=False)
        assert str(caught.value) == (
            "elastickv cannot manage layers of the kind DreamingSpec: it is not known whether its kernels read blocks "
            f"that were already given up; use another model, {OFF}"
        )


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_kind_of_layer_of_the_installed_vllm_is_known_or_refused_on_purpose() -> None:
    from vllm.v1 import kv_cache_interface
    from vllm.v1.kv_cache_interface import KVCacheSpec

    made = {name for name, kind in vars(kv_cache_interface).items() if _is_spec(kind, KVCacheSpec)}
    abstract = {"KVCacheSpec", "AttentionSpec", "UniformTypeKVCacheSpecs"}
    refused = {"HiSparseHotSpec", "HiSparseResidentSpec"}
    assert made - abstract - refused == gate.KINDS


def _is_spec(kind: object, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def tensor(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"offset": 0, "host_resident": False, **fields})


def cache(tensors: list[SimpleNamespace], layout: str = "LBNHC", blocks: int = 10) -> SimpleNamespace:
    return SimpleNamespace(num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_layout=layout)


def test_layouts_that_work() -> None:
    layers = ["a", "b", "c"]
    outer = geometry.read(cache([tensor(size=3000, layers=layers, layer_stride=1000, block_stride=100)]), "host")
    assert (outer.spans, outer.block_bytes) == (3, 100)
    inner = geometry.read(
        cache([tensor(size=3000, layers=layers, layer_stride=100, block_stride=300)], "BLNHC"), "host"
    )
    assert (inner.spans, inner.block_bytes) == (1, 300)
    # Groups alias from byte 0; the longer one decides.
    both = [
        tensor(size=3000, layers=layers, layer_stride=1000, block_stride=100),
        tensor(size=3000, layers=["d"], layer_stride=1000, block_stride=100),
    ]
    assert geometry.read(cache(both), "host").spans == 3


def test_heads_outside_of_blocks_are_stripes_too() -> None:
    shape = geometry.read(
        cache([tensor(size=4000, layers=["a", "b"], layer_stride=2000, block_stride=100)], "LHBNC"), "host"
    )
    assert (shape.spans, shape.block_bytes) == (4, 100)


def test_layouts_that_cannot_work() -> None:
    uneven = [
        tensor(size=3000, layers=["a"], layer_stride=1000, block_stride=100),
        tensor(size=3000, layers=["b"], layer_stride=2000, block_stride=200, offset=1000),
    ]
    with pytest.raises(EngineRefused) as caught:
        geometry.read(cache(uneven), "host")
    assert str(caught.value) == (
        "elastickv cannot manage the KV cache layout LBNHC: a block is not one piece in each of equal stripes; "
        "set VLLM_KV_CACHE_LAYOUT=BLNHC"
    )
    with pytest.raises(EngineRefused) as caught:
        geometry.read(cache([]), "host")
    assert str(caught.value) == (
        "elastickv cannot manage this engine: a rank of it has no KV cache; use fewer pipeline stages, "
        "or unset ELASTICKV to serve without it"
    )


def test_an_unknown_engine_names_the_known_ones() -> None:
    with pytest.raises(NotFound) as caught:
        adapter("vlm")
    assert str(caught.value) == "there is no adapter for the engine 'vlm'; there are: vllm, sglang"
    assert adapter("vllm").name == "vllm"


@pytest.mark.parametrize(
    ("chosen", "needed"),
    [
        (None, {}),
        ("elastickv", {}),
        ("other,elastickv", {}),
        ("", {"VLLM_PLUGINS": "elastickv"}),
        ("other", {"VLLM_PLUGINS": "other,elastickv"}),
    ],
)
def test_a_choice_of_plugins_lets_ours_in(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, needed: dict[str, str]
) -> None:
    """vLLM would serve unmanaged without a word: nobody asks a plug-in that is not chosen."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
    assert adapter("vllm").environment() == needed

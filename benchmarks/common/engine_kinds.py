"""The engines that a benchmark can serve: for each, its command line and the variables of its processes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.common.load import Form
from benchmarks.common.models import Model
from benchmarks.common.result import ROOT
from elastickv.demo.engines import SERVER

HOST_BLOCK, GPU_BLOCK = 32, 16
TINY_PAGE = 16 * 1024
"""Of the host: then a block of the tiny model is exactly one page in each of its four layers."""
COMPILATION = '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'
STREAM_INTERVAL = 16
"""On a GPU the server sends tokens in bundles (the first one at once): the client measures the engine, not itself."""
SGLANG_PAGE = 16
SGLANG_FRACTION = "0.9"
"""Of the memory that is free when a plain SGLang starts: weights and cache must fit in it. The cache is bounded too."""


@dataclass(frozen=True)
class Spec:
    """One engine. `kv_bytes`: what a plain one allocates. `options`: of `elastickv run`. `arguments`: of the engine."""

    name: str
    managed: bool
    kv_bytes: int = 0
    caching: bool = False
    seqs: int = 256
    max_len: int = 1024
    options: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """An engine. `arguments(spec, kv_bytes, model, on_host)` follow the `command`. `page`: of the tiny model on the
    host. `form`: how its server is asked. Variables: `environment` of every one, `plain` of one without elastickv,
    `on_gpu`, and `on_host(core)`. `exact`: variables and arguments with which an answer of a GPU depends on its
    prompt alone, whatever runs beside it. `profiles`: a plain one measures a GPU's memory, also where its cache is
    bounded.
    """

    command: Sequence[str]
    arguments: Callable[[Spec, int, Model, bool], list[str]]
    page: int
    form: Form = "completions"
    environment: Mapping[str, str] = field(default_factory=dict)
    plain: Mapping[str, str] = field(default_factory=dict)
    on_gpu: Mapping[str, str] = field(default_factory=dict)
    on_host: Callable[[int], Mapping[str, str]] = lambda core: {}
    exact: tuple[Mapping[str, str], Sequence[str]] = ({}, ())
    profiles: bool = False


def token_bytes(model: Model, on_host: bool) -> int:
    """Bytes of KV cache that a token takes, over all layers."""
    config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    return 2 * int(config["num_hidden_layers"]) * heads * size * (4 if on_host else 2)


def _vllm(spec: Spec, kv_bytes: int, model: Model, on_host: bool) -> list[str]:
    arguments = [
        *("--dtype", "float32" if on_host else "bfloat16"),
        *("--block-size", str(HOST_BLOCK if on_host else GPU_BLOCK), "--max-model-len", str(spec.max_len)),
        *("--max-num-seqs", str(spec.seqs), "--max-num-batched-tokens", str(2048 if on_host else 8192)),
        *("--kv-cache-memory-bytes", str(kv_bytes), "--gpu-memory-utilization", "0.1"),
        *("--skip-tokenizer-init", "--seed", "0", "--disable-uvicorn-access-log"),
        "--enable-prefix-caching" if spec.caching else "--no-enable-prefix-caching",
    ]
    if model.dummy:
        arguments += ["--load-format", "dummy"]
    if on_host:
        arguments += ["--enforce-eager"]
    else:
        arguments += ["--async-scheduling", "--compilation-config", COMPILATION]
        arguments += ["--stream-interval", str(STREAM_INTERVAL)]
    return [*arguments, *spec.arguments]


def _sglang(spec: Spec, kv_bytes: int, model: Model, on_host: bool) -> list[str]:
    """A plain one has as many tokens as `kv_bytes` hold, its padding page among them."""
    arguments = [
        *("--dtype", "float32" if on_host else "bfloat16", "--random-seed", "0"),
        *("--page-size", str(SGLANG_PAGE), "--context-length", str(spec.max_len)),
        *("--max-running-requests", str(spec.seqs), "--chunked-prefill-size", str(2048 if on_host else 8192)),
        *("--skip-tokenizer-init", "--grammar-backend", "none", "--sampling-backend", "pytorch"),
        *("--incremental-streaming-output", "--log-level-http", "warning"),
    ]
    if not spec.managed:
        tokens = kv_bytes // token_bytes(model, on_host) // SGLANG_PAGE * SGLANG_PAGE - SGLANG_PAGE
        arguments += ["--max-total-tokens", str(tokens), "--mem-fraction-static", SGLANG_FRACTION]
    if not spec.caching:
        arguments += ["--disable-radix-cache"]
    if model.dummy:
        arguments += ["--load-format", "dummy"]
    if on_host:
        arguments += ["--device", "cpu", "--attention-backend", "torch_native", "--disable-cuda-graph"]
    else:
        arguments += ["--attention-backend", "triton", "--stream-interval", str(STREAM_INTERVAL)]
    return [*arguments, *spec.arguments]


def _standin(spec: Spec, kv_bytes: int, model: Model, on_host: bool) -> list[str]:
    more = ["--caching"] if spec.caching else []
    return ["--kv-bytes", str(kv_bytes), "--seqs", str(spec.seqs), *more]


def _stubs() -> list[str]:
    """In place of torchvision, which SGLang imports, where there is none."""
    return [] if importlib.util.find_spec("torchvision") else [str(ROOT / "tests/engines/sgl/stubs")]


ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
KINDS: Final[dict[str, Kind]] = {
    "vllm": Kind(
        command=SERVER,
        arguments=_vllm,
        page=TINY_PAGE,
        environment={"VLLM_LOGGING_LEVEL": "INFO"},
        plain={"VLLM_PLUGINS": ""},
        on_gpu={"VLLM_USE_FLASHINFER_SAMPLER": "0"},
        on_host=lambda core: {**ONE_THREAD, "VLLM_CPU_OMP_THREADS_BIND": str(core)},
        exact=({"VLLM_BATCH_INVARIANT": "1"}, ()),
    ),
    "sglang": Kind(
        command=(sys.executable, "-m", "sglang.launch_server"),
        arguments=_sglang,
        page=TINY_PAGE,
        form="generate",
        # A look at its health is no request then, which would keep an idle engine busy.
        environment={"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0", "SGLANG_PLUGINS": "elastickv"},
        plain={"SGLANG_PLUGINS": "none"},
        on_host=lambda core: ONE_THREAD,
        exact=({}, ("--enable-deterministic-inference",)),
        profiles=True,
    ),
    "stand-in": Kind(
        command=(sys.executable, str(ROOT / "benchmarks/common/standin.py")),
        arguments=_standin,
        page=64 * 1024,
        on_host=lambda core: ONE_THREAD,
    ),
}
"""By the name that --engine takes."""


def kind_of(engine: str) -> Kind:
    """Ends the benchmark, naming the known ones, if there is none of that name."""
    if engine not in KINDS:
        raise SystemExit(f"error: --engine {engine}: give one of {', '.join(KINDS)}")
    return KINDS[engine]


def import_path(engine: str) -> list[str]:
    """Folders that its servers import from, besides what is installed."""
    return [str(ROOT), *(_stubs() if engine == "sglang" else [])]

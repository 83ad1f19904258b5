"""What cannot be managed does not start: said at once, by the process that was called, and nothing is left of it.

The real server's way from its arguments on, for each in a fork of one process; see refusals.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from elastickv.config import process_environment
from elastickv.engines.sglang import gate
from engines.kinds import SGLANG
from engines.subjects import SGLANG as SUBJECT
from engines.tiny_models import COMMON, lfm2

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

HERE = Path(__file__).resolve().parent

ARGUMENTS = {
    "speculative_algorithm": "--speculative-algorithm NGRAM --page-size 1",
    "disaggregation_mode": "--disaggregation-mode prefill",
    "enable_pdmux": "--enable-pdmux --chunked-prefill-size -1 --disable-overlap-schedule",
    "enable_hisparse": "--enable-hisparse",
    "enable_hierarchical_cache": "--enable-hierarchical-cache",
    "enable_lmcache": "--enable-lmcache",
    "enable_flexkv": "--enable-flexkv",
    "enable_unified_cache_external_linker": "--enable-unified-cache-external-linker",
    "enable_dp_attention": "--tp-size 2 --dp-size 2 --enable-dp-attention",
    "attn_dp_size": "--tp-size 2 --attn-dp-size 2",
    "dp_size": "--dp-size 2",
    "dcp_size": "--tp-size 2 --dcp-size 2",
    "attn_cp_size": "--tp-size 2 --attn-cp-size 2",
    "nnodes": "--nnodes 2 --dist-init-addr 127.0.0.1:9999",
    "radix_cache_backend": "--radix-cache-backend mine",
    "elastic_ep_backend": "--elastic-ep-backend mooncake",
    "kv_canary": "--kv-canary log",
}
OWN = {
    "enable_unified_memory",
    "enable_page_major_kv_layout",
    "enable_kv_cache_sharding",
    "prefill_only_disable_kv_cache",
    "use_ray",
    "dllm_algorithm",
    "disaggregation_decode_retraction_backup",
    "disaggregation_decode_enable_offload_kvcache",
}
"""What SGLang itself refuses with this model, on a CPU, or without another option that is refused."""

VARIABLES = {
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "1",
    "SGLANG_USE_HND_KVCACHE": "1",
    "SGLANG_MOONCAKE_CUSTOM_MEM_POOL": "NVLINK",
}


@dataclass(frozen=True)
class Ended:
    """How a server ended: its exit code, None where it had to be killed; what it wrote; what it left running."""

    code: int | None
    said: str
    left: list[str]
    seconds: float


class Servers:
    """Starts servers that are to be refused, one after the other."""

    def __init__(self, process: subprocess.Popen[str], model: Path) -> None:
        self.model = model
        self._process = process

    def start(self, arguments: str = "", model: Path | None = None, **environment: str) -> Ended:
        argv = ["--model-path", str(model or self.model), *_arguments(), *arguments.split()]
        return self._ask({"argv": argv, "environment": environment})

    def look_at(self, **config: Any) -> Ended:
        """What is said of a model with that configuration; nothing is started."""
        return self._ask({"model": config, "environment": {}})

    def _ask(self, case: dict[str, Any]) -> Ended:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))


def _arguments() -> Iterator[str]:
    for name, value in SGLANG.arguments.items():
        if name != "log_level" and value is not False:
            yield f"--{name.replace('_', '-')}"
            if value is not True:
                yield str(value)


@contextmanager
def _forking(model: Path, directory: Path) -> Iterator[Servers]:
    own = {name: value for name, value in process_environment().items() if not name.startswith(("ELASTICKV", "SGLANG"))}
    environment = {**own, **SGLANG.environment, **SUBJECT.managed(directory, blocks=64), SGLANG.plugin: "elastickv"}
    environment["PYTHONPATH"] = f"{HERE / 'stubs'}:{environment.get('PYTHONPATH', '')}".rstrip(":")
    command = [sys.executable, str(HERE / "refusals.py")]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield Servers(process, model)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def servers(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    directory = tmp_path_factory.mktemp("ledgers")
    directory.chmod(0o700)
    with _forking(tiny_llama, directory) as servers:
        yield servers


def check_refused(ended: Ended, *texts: str) -> None:
    assert ended.code not in (None, 0), ended.said[-4000:]
    assert ended.left == []
    said = ended.said.splitlines()[-1]
    assert said.startswith("elastickv.errors.EngineRefused: elastickv cannot manage"), ended.said[-4000:]
    assert all(text in said for text in texts), said


def test_every_option_is_tried() -> None:
    assert ARGUMENTS.keys() | OWN == gate.REFUSED.keys()
    assert VARIABLES.keys() == gate.REFUSED_VARIABLES.keys()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_option(servers: Servers, name: str) -> None:
    _, why, remedy = gate.REFUSED[name]
    check_refused(servers.start(ARGUMENTS[name]), f"--{name.replace('_', '-')}", why, remedy)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable(servers: Servers, name: str) -> None:
    check_refused(servers.start(**{name: VARIABLES[name]}), name, "unset it")


def test_a_backend(servers: Servers) -> None:
    check_refused(servers.start("--attention-backend aiter"), "the attention backend aiter")


def test_models_whose_blocks_are_kept_apart(servers: Servers, tmp_path: Path) -> None:
    check_refused(servers.start("--page-size 1", lfm2(tmp_path / "lfm2")), "states beside its blocks")
    windows = tmp_path / "gpt_oss"
    windows.mkdir()
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    kind = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "sliding_window": 64}
    config: dict[str, Any] = {**COMMON, **heads, **kind, "layer_types": ["sliding_attention", "full_attention"]}
    (windows / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ended = servers.start("--attention-backend triton", windows)
    check_refused(ended, "sliding windows (--disable-hybrid-swa-memory")
    sparse = servers.look_at(architectures=["DeepseekV32ForCausalLM"], index_topk=64)
    check_refused(sparse, "DeepSeek sparse attention")
    check_refused(servers.look_at(architectures=["DeepseekV4ForCausalLM"]), "the attention of DeepSeek-V4")
    assert servers.look_at(architectures=["DeepseekV3ForCausalLM"]).code == 0


def test_settings_that_are_wrong(servers: Servers) -> None:
    ended = servers.start(ELASTICKV_LIMIT="much")
    assert ended.code not in (None, 0)
    assert ended.left == []
    assert "ELASTICKV_LIMIT" in ended.said.splitlines()[-1]


def test_what_only_a_scheduler_sees(servers: Servers) -> None:
    """The other line: the scheduler refuses before it loads, and SGLang ends the server for it."""
    ended = servers.start(ELASTICKV_DEVICE="GPU-0")
    assert ended.code not in (None, 0), ended.said[-4000:]
    assert ended.left == []
    assert "elastickv was told to manage GPU-0, and this engine runs on host" in ended.said
    assert "Load weight begin" not in ended.said

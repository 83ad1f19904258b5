"""The engines that harness.py can run: for each, the file that its process runs and what suits this small machine."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

HERE: Final = Path(__file__).resolve().parent

OLDER_SGLANG: Final = Path(sys.prefix) / "sglang-0.5.16"
"""Where scripts/setup puts the oldest SGLang that is managed, beside the other one."""

Name = Literal["vllm", "sglang", "sglang_0_5_16"]


@dataclass(frozen=True)
class Kind:
    """One engine. `arguments` and `environment` lie under a job's own; `private`: prefixes of variables that it reads.

    `path`: folders that its processes import from. `threads`: variables that bind it to one core. `plugin`: a variable
    that, set to "elastickv", lets the plug-in in; in `environment` it keeps every plug-in out. `modules`: what a warm
    process imports, `late`: variables that these imports do not read, `spares`: how many processes an engine with this
    environment and these arguments spawns itself, all as in warm.py. `points`: entry points that are there only for
    tests, in the form of an entry_points.txt.
    """

    name: Name
    child: Path
    arguments: dict[str, Any]
    environment: dict[str, str]
    private: tuple[str, ...]
    path: tuple[Path, ...]
    threads: Callable[[int], dict[str, str]]
    plugin: str
    modules: tuple[str, ...]
    late: tuple[str, ...]
    spares: Callable[[dict[str, str], dict[str, Any]], int]
    points: str = ""


COMMON: Final = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

VLLM: Final = Kind(
    name="vllm",
    child=HERE / "child.py",
    arguments={
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "num_gpu_blocks_override": 512,
        "kv_cache_memory_bytes": 1 << 30,
        "gpu_memory_utilization": 0.1,
        "enable_prefix_caching": True,
        "seed": 0,
    },
    environment={**COMMON, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_PLUGINS": ""},
    private=("VLLM_",),
    path=(HERE,),
    threads=lambda core: {
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    },
    plugin="VLLM_PLUGINS",
    modules=("vllm.entrypoints.llm",),
    late=(
        "VLLM_PLUGINS",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_WORKER_MULTIPROC_METHOD",
    ),
    spares=lambda environment, _: int(environment.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1")),
)

STUBS: Final = () if importlib.util.find_spec("torchvision") else (HERE / "sgl/stubs",)
"""In place of torchvision, where there is none."""

SGLANG: Final = Kind(
    name="sglang",
    child=HERE / "sgl/child.py",
    arguments={
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "disable_cuda_graph": True,
        "page_size": 16,
        "max_total_tokens": 16384,
        "max_running_requests": 12,
        "chunked_prefill_size": 64,
        "context_length": 1024,
        "watchdog_timeout": 600.0,
        "random_seed": 0,
        "log_level": "info",
    },
    # Without a name SGLang loads every plug-in that is installed. Both checks of its memory stay on while it is busy;
    # the one of an idle engine is on, and fatal, by itself. A thread a rank: two ranks with two threads each spin for
    # one another on two cores, and a round of SGLang's own takes 115 s instead of 5.
    environment={
        **COMMON,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "SGLANG_PLUGINS": "elastickv_tests",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
        "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    },
    private=("SGLANG_", "SGL_"),
    path=(*STUBS, HERE),
    threads=lambda core: {},
    plugin="SGLANG_PLUGINS",
    modules=("sglang.srt.entrypoints.engine",),
    late=("SGLANG_PLUGINS", "SGLANG_CPU_OMP_THREADS_BIND"),
    spares=lambda _, arguments: arguments.get("tp_size", 1) * arguments.get("pp_size", 1) + 1,  # and the detokenizer
    points="[sglang.srt.plugins]\nelastickv_tests = sgl.inside:register\n",
)

# Its kernels for larger pages are for GPUs alone.
SGLANG_0_5_16: Final = replace(
    SGLANG,
    name="sglang_0_5_16",
    arguments={**SGLANG.arguments, "page_size": 1},
    path=(OLDER_SGLANG, HERE / "sgl/stubs_0_5_16", *SGLANG.path),
)

KINDS: Final[dict[Name, Kind]] = {"vllm": VLLM, "sglang": SGLANG, "sglang_0_5_16": SGLANG_0_5_16}

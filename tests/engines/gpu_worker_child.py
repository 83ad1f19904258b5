"""vLLM's own GPU worker class with the plug-in's hooks, over the stand-ins for NVIDIA's libraries; facts go to stdout.

Run as a file by test_vllm_gpu_worker.py. Real: the hooks, vLLM's Worker methods, its allocation and views of a cache,
its block tables, and everything of elastickv. Stood in for, because PyTorch for CPUs cannot: the model runner, the
current CUDA stream, PyTorch's cache of free blocks, and DLPack's step to a tensor on a GPU, which here becomes one of
the CPU over the same addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.utils import allocate_kv_cache

from elastickv.config import Settings
from elastickv.engines.vllm import backing, footprint, seams
from elastickv.engines.vllm import worker as hooks
from elastickv.engines.vllm.scheduler import TICKET
from elastickv.errors import EngineRefused
from elastickv.memory import Cache, RankGeometry, gpu

MIB = 1024 * 1024
BLOCKS, LAYERS = 256, 4
PAGE = 2 * 16 * 8 * 128 * 2
BLOCK = LAYERS * PAGE
LAYOUT = KVCacheLayout["BLNHC"]
OUT_OF_MEMORY = 2

facts: dict[str, Any] = {}
cuda = ctypes.CDLL("libcuda.so.1")
cuda.standin_calls.restype = cuda.standin_violations.restype = cuda.standin_used_bytes.restype = ctypes.c_uint64


def calls(name: str) -> int:
    return int(cuda.standin_calls(name.encode()))


class Runner:
    """What the worker calls of its model runner."""

    def __init__(self) -> None:
        self.kv_caches: list[torch.Tensor] = []
        self.lora_config = None
        self.is_pooling_model = False
        self.fences_at_launch: list[int] = []
        buffer_utils.is_uva_available = lambda: False  # else it pins memory, which takes a GPU
        self.block_tables = BlockTables([16], 4, 64, [8], torch.device("cpu"))
        self.written: list[list[int]] = []

    def initialize_kv_cache(self, config: KVCacheConfig, kv_cache_allocation_context: Any) -> None:
        with kv_cache_allocation_context:
            views = allocate_kv_cache(config, torch.device("cuda:0"), LAYOUT)
        self.kv_caches = [views[name] for name in config.kv_cache_tensors[0].layers]

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any) -> None:
        self.fences_at_launch.append(calls("cuEventRecord"))

    def maybe_remove_all_loras(self, config: Any) -> None:
        """The first thing that the warm-up calls: it writes as a warm-up does, and fails."""
        self.block_tables.append_block_ids(0, ([5, 6, 7],), True)
        self.written.append(list(self.block_tables.block_tables[0]._staged_write_contents))
        raise RuntimeError("the warm-up fails")

    def shutdown(self) -> None:
        facts["mapped_at_shutdown"] = int(cuda.standin_used_bytes(0))


def cache_config() -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    layers = [f"model.layers.{index}.attn" for index in range(LAYERS)]
    tensor = KVCacheTensor(size=BLOCKS * BLOCK, layers=layers, layer_stride=PAGE, block_stride=BLOCK)
    return KVCacheConfig(BLOCKS, [tensor], [KVCacheGroupSpec(layers, spec)], kv_cache_layout=LAYOUT.name)


def make_worker() -> Any:
    for name, method in hooks.METHODS.items():
        setattr(Worker, name, method)
    for name, make in hooks.WRAPPERS.items():
        seams.wrap(Worker, name, make)
    worker = object.__new__(Worker)
    worker.device = torch.device("cuda:0")
    worker.cache_config = SimpleNamespace(kv_cache_layout=None)
    compilation = SimpleNamespace(mode=None)
    worker.vllm_config = SimpleNamespace(kv_transfer_config=None, compilation_config=compilation)
    worker.model_runner = Runner()
    worker.profiler = None
    worker.use_v2_model_runner = True
    worker.elastic_ep_executor = SimpleNamespace(shutdown=lambda: None)
    worker._pp_send_work = []
    return worker


def start(device: str, directory: str) -> Cache:
    """The process that schedules: nothing of CUDA may be touched by it."""
    arguments = {"device": device, "directory": directory, "capacity": "96MiB", "name": "one", "stock": 0}
    settings = Settings.load(arguments={**arguments, "idle_release": "0s"})
    cache = Cache.create(settings, num_blocks=BLOCKS, ranks=[RankGeometry(device, 1, BLOCK)])
    facts["cuda_calls_of_the_scheduler"] = int(cuda.standin_calls(b"cuInit"))
    return cache


def initialize(worker: Any, cache: Cache) -> None:
    config = cache_config()
    try:
        worker.initialize_from_config(config)
    except EngineRefused as error:
        facts["without_a_spec"] = error.message
    facts["left_alone"] = worker.model_runner.kv_caches == []
    config.elastickv = cache.rank_spec(0)  # type: ignore[attr-defined]
    real = torch.from_dlpack

    def from_dlpack(memory: Any) -> torch.Tensor:
        facts["dlpack_device"] = memory.__dlpack_device__()
        try:
            return real(memory)
        except (RuntimeError, ValueError, BufferError, AssertionError) as error:
            facts["dlpack_without_a_gpu"] = str(error)
        return torch.frombuffer((ctypes.c_char * memory.tensor_bytes).from_address(memory.address), dtype=torch.int8)

    backing.torch = SimpleNamespace(**{**vars(torch), "from_dlpack": from_dlpack})  # type: ignore[attr-defined]
    worker.initialize_from_config(config)
    cache.wait_ready(20)
    facts["report"] = worker.elastickv_report()
    facts["shapes"] = [list(view.shape) for view in worker.model_runner.kv_caches]
    facts["contexts"] = int(cuda.standin_context_references(0)), calls("cuDevicePrimaryCtxRetain")


def run_steps(worker: Any, cache: Cache, stream: Any) -> None:
    views = worker.model_runner.kv_caches
    first, _ = cache.pool.alloc(40)
    for block in first:
        for view in views:
            facts["fresh_is_zero"] = facts.get("fresh_is_zero", True) and not view[block].any()
            view[block] = block % 100
    facts["written_is_read"] = all(bool((view[block] == block % 100).all()) for view in views for block in first)
    facts["mapped"] = worker.elastickv.report()["mapped"]
    plain = SimpleNamespace(total_num_scheduled_tokens=0)
    worker.execute_model(plain)
    cuda.standin_hold(stream, 1)
    for block in first:
        cuda.standin_work(stream, ctypes.c_uint64(worker.elastickv.memory.address + block * BLOCK), BLOCK)
    cache.pool.release(first, False)
    cache.pool.maintain(True)
    before = calls("cuEventRecord")
    worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=0, **{TICKET: cache.pool.ticket()}))
    launches = worker.model_runner.fences_at_launch
    facts["fenced_before_launch"] = launches[-1] - before
    time.sleep(0.1)
    facts["unmapped_under_work"] = calls("cuMemUnmap")
    cuda.standin_hold(stream, 0)
    until = time.monotonic() + 20
    while cache.pool.stats()["transit"] and time.monotonic() < until:
        time.sleep(0.005)
        cache.pool.poll()
    facts["mapped_after"] = worker.elastickv.report()["mapped"]
    facts["violations"] = int(cuda.standin_violations())
    cache.pool.check_integrity()


def warm_up(worker: Any) -> None:
    with contextlib.suppress(RuntimeError):
        worker.compile_or_warm_up_model()
    facts["warm_up_wrote_to"] = worker.model_runner.written
    facts["redirected_after"] = worker.model_runner.block_tables.redirect_writes_to_null_block


def reclaim(worker: Any, cache: Cache) -> None:
    given: list[str] = []
    backing.torch.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        device=lambda device: contextlib.nullcontext(), empty_cache=lambda: given.append("back")
    )
    worker.elastickv.reclaim_from_torch(worker.device)
    cuda.standin_fail(b"cuMemCreate", 1, OUT_OF_MEMORY)
    got = cache.pool.alloc(20)
    facts["reclaimed"] = given
    facts["allocated"] = got is not None and len(got[0])


def main() -> None:
    directory = sys.argv[1]
    cuda.standin_reset(1, ctypes.c_uint64(128 * MIB), ctypes.c_uint64(2 * MIB), 0)
    (device,) = gpu.visible_devices()
    cache = start(device, directory)
    cuda.standin_start_engine(0)
    context, stream = ctypes.c_void_p(), ctypes.c_void_p()
    cuda.cuInit(0)
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)  # as PyTorch does when its first tensor is made
    cuda.cuCtxSetCurrent(context)
    cuda.cuStreamCreate(ctypes.byref(stream), 1)
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=stream.value)
    worker = make_worker()
    facts["device"] = device, footprint.device_of(worker)
    initialize(worker, cache)
    run_steps(worker, cache, stream)
    warm_up(worker)
    reclaim(worker, cache)
    worker.shutdown()
    facts["used_at_the_end"] = int(cuda.standin_used_bytes(0))
    facts["contexts_at_the_end"] = int(cuda.standin_context_references(0))
    cache.close()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

"""Layouts: block-outermost where the backends allow it, layer-outermost where not, and pages that fit either.

vLLM's real functions decide; only that the platform is a GPU is pretended.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastickv.errors import EngineRefused
from elastickv.memory import PoolGeometry
from geometry_table import ARCHITECTURES

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

GIB, PAGE = 1 << 30, 2 << 20
ANY = ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC", "LHBNC"]
"""vLLM's order where no backend declares anything."""


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)


def resolve(supported: list[str], specs: Any = None, connector: str | None = None) -> str:
    from vllm.config import CacheConfig
    from vllm.v1.attention.backends import utils

    from elastickv.engines.vllm.engine import CORE

    config = SimpleNamespace(cache_config=CacheConfig(), kv_transfer_config=None)
    if connector is not None:
        config.kv_transfer_config = SimpleNamespace(kv_connector=connector)
    wrapped = CORE["resolve_kv_cache_layout"](utils.resolve_kv_cache_layout)
    chosen: str = wrapped(config, [supported], specs).name
    assert config.cache_config.kv_cache_layout == chosen
    return chosen


@pytest.mark.parametrize(
    ("supported", "chosen"),
    [
        (ANY, "BLNHC"),
        (["LBHNC", "BLHNC"], "BLHNC"),
        (["BLHNC", "BLNHC"], "BLHNC"),
        (["LBNHC"], "LBNHC"),
        (["LBHNC", "LBNHC"], "LBHNC"),
    ],
)
@pytest.mark.usefixtures("on_gpu")
def test_blocks_are_outermost_where_the_backends_allow_it(supported: list[str], chosen: str) -> None:
    assert resolve(supported) == chosen


@pytest.mark.parametrize(("asked", "chosen"), [("LBNHC", "LBNHC"), ("NHD", "LBNHC"), ("HND", "LBHNC")])
@pytest.mark.usefixtures("on_gpu")
def test_what_the_user_asks_for_goes_first(monkeypatch: pytest.MonkeyPatch, asked: str, chosen: str) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", asked)
    assert resolve(ANY) == chosen


@pytest.mark.usefixtures("on_gpu")
def test_layers_of_several_shapes_leave_fewer_layouts() -> None:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    specs = [
        FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=64, dtype=torch.bfloat16) for heads in (4, 8)
    ]
    assert resolve(ANY, specs) == "BLNHC"
    assert resolve(["LHBNC", "LBNHC"], specs) == "LBNHC"


def test_on_a_cpu_the_backends_own_order_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    assert resolve(ANY) == "LBNHC"


def test_backends_that_refuse_block_outermost_are_refused_or_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every backend class that can be imported here; those that need a GPU's kernels to be imported are skipped."""
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from elastickv.engines.vllm import gate

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", None, raising=False)
    monkeypatch.setattr(fa_utils, "get_scheduler_metadata", None, raising=False)
    seen, stubborn = set(), set()
    for member in AttentionBackendEnum:
        if member.name.startswith("ROCM_"):  # of another maker's GPUs, which are not managed
            continue
        try:
            backend = member.get_class()
            layouts = backend.supported_kv_cache_layouts()
        except (ImportError, AttributeError, ValueError, RuntimeError, AssertionError):
            continue
        seen.add(member.name)
        if layouts is not None and not any(layout.is_block_outermost for layout in layouts):
            stubborn.add(backend.get_name())
    assert {"FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION", "FLASHMLA", "CPU_ATTN"} <= seen
    for name in stubborn - {"CPU_ATTN"}:
        with pytest.raises(EngineRefused):
            gate.check_backends([name])
    assert "CPU_ATTN" in stubborn


# --- sizes


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
@pytest.mark.parametrize("file", ["llama-3.1-70b", "gemma-3-4b", "deepseek-v3", "qwen3-next-80b-a3b", "gpt-oss-20b"])
def test_stripes_of_layers_begin_on_pages(
    file: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core import kv_cache_utils

    from elastickv.engines.vllm import budget
    from engines.vllm_specs import Reading

    reading = Reading(ARCHITECTURES / f"{file}.json", tmp_path, tp=1, fp8=False)
    reading.choose_block(monkeypatch)
    reading.cache.kv_cache_layout = layout
    config = reading.vllm_config()
    device = budget.Device("GPU-x", PAGE, 40 * GIB + 12345, None)
    made = budget.plan(
        kv_cache_utils.get_kv_cache_configs,
        config,
        [reading.specs()],
        [device],
        budget.Wish(None, None, None),
        kv_cache_utils.get_max_concurrency_for_kv_cache_config,
    )
    (planned,), (rank,) = made.configs, made.ranks
    assert rank.spans > 1
    pool = PoolGeometry.of(planned.num_blocks, PAGE, [rank])  # which refuses spans off the pages
    assert planned.num_blocks * rank.block_bytes % PAGE == 0
    assert pool.virtual_bytes(0) == planned.kv_cache_tensors[0].size <= device.capacity
    lost = device.capacity - pool.virtual_bytes(0)
    step = rank.spans * PAGE * (rank.block_bytes // PAGE + 1)
    assert lost < 16 * step, "no more is lost than what whole pages in every stripe cost"
    offsets = {tensor.offset + i * tensor.layer_stride for tensor in planned.kv_cache_tensors for i in range(2)}
    assert all(offset % PAGE == 0 for offset in offsets)
    assert pool.page_cost("GPU-x") == rank.spans * PAGE


# --- block size


class Refusing:
    """A backend's name in vLLM's configuration, for one that takes layer-outermost layouts only, or any."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def get_class(self) -> Any:
        from vllm.v1.kv_cache_layout import KVCacheLayout

        layouts = [KVCacheLayout[name] for name in self.names] or None
        return SimpleNamespace(supported_kv_cache_layouts=lambda: layouts)


def block_after(tmp_path: Path, **changes: Any) -> int:
    """Tokens of a block of Llama-3.1-8B on 8 ranks, where a layer's part of 16 tokens would have 8 KiB."""
    from elastickv.engines.vllm.blocksize import raise_block_size
    from engines.vllm_specs import Reading

    reading = Reading(ARCHITECTURES / "llama-3.1-8b.json", tmp_path, tp=8, fp8=changes.pop("fp8", False))
    config = reading.vllm_config()
    for name, value in changes.items():
        part, _, field = name.partition("__")
        setattr(getattr(config, part), field, value)
    raise_block_size(config)
    return int(config.cache_config.block_size)


@pytest.mark.usefixtures("on_gpu")
def test_a_block_is_raised_where_blocks_may_be_outermost(tmp_path: Path) -> None:
    assert block_after(tmp_path) == 32
    assert block_after(tmp_path, fp8=True) == 64
    assert block_after(tmp_path, attention_config__backend=Refusing()) == 32
    assert block_after(tmp_path, attention_config__backend=Refusing("LBHNC", "BLHNC")) == 32


@pytest.mark.usefixtures("on_gpu")
def test_a_block_stays_where_layers_are_outermost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert block_after(tmp_path, attention_config__backend=Refusing("LBHNC")) == 16
    assert block_after(tmp_path, cache_config__user_specified_block_size=True) == 16
    assert block_after(tmp_path, model_config__use_mla=True) == 16
    assert block_after(tmp_path, model_config__is_hybrid=True) == 16
    for layout in ("LBNHC", "NHD", "HND"):
        monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
        assert block_after(tmp_path) == 16
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BHLNC")
    assert block_after(tmp_path) == 32


def test_a_block_stays_on_a_cpu(tmp_path: Path) -> None:
    assert block_after(tmp_path) == 16

"""The planner against vLLM's own, for the models of docs/geometry.md: same blocks, same spans, same requests.

Real specs and vLLM's real get_kv_cache_configs; geometry.read looks at what it planned, in both kinds of layout.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest

import geometry_table
from elastickv.memory import PoolGeometry, align_blocks
from elastickv.planning import CacheShape, Serving, cache_shape
from geometry_table import ARCHITECTURES, PAGE, Case

pytestmark = pytest.mark.vllm

CASES = list(geometry_table.cases())


@pytest.fixture(scope="module")
def vllm_specs() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    return pytest.importorskip("engines.vllm_specs")


def name_of(case: Case) -> str:
    return f"{case.file}-tp{case.tp}-{'fp8' if case.kv_width == 1 else 'auto'}"


def shape_of(case: Case, **serving: Any) -> CacheShape:
    return cache_shape(case.model, dataclasses.replace(case.serving, **serving))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_blocks_are_those_that_vllm_plans(
    case: Case, vllm_specs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    from elastickv.engines.vllm import geometry

    reading = vllm_specs.Reading(ARCHITECTURES / f"{case.file}.json", tmp_path, tp=case.tp, fp8=case.kv_width == 1)
    tokens = reading.choose_block(monkeypatch)
    shape = shape_of(case)
    assert shape.block_tokens == tokens
    blocks = align_blocks(1 << 20, PAGE, shape.part_bytes)
    (packed,) = reading.plan("BLNHC", blocks=blocks)
    assert geometry.read(packed, "") == shape.stages[0]
    assert len(packed.kv_cache_groups) == len(shape.groups)
    per_request = packed.num_blocks / get_max_concurrency_for_kv_cache_config(reading.vllm_config(), packed)
    assert shape.blocks_of(4096) == round(per_request)

    striped = shape_of(case, block_outermost=False, block_tokens=tokens)
    for layout in ("LBNHC", "LBHNC"):
        (planned,) = reading.plan(layout, blocks=blocks)
        found = geometry.read(planned, "")
        assert found == striped.stages[0]
        pool = PoolGeometry.of(planned.num_blocks, PAGE, [found])
        assert planned.kv_cache_tensors[0].size == pool.virtual_bytes(0)
        assert pool.page_cost("") == PAGE * found.spans


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("file", ["llama-3.1-8b", "gemma-3-4b", "granite-4.0-h-small", "qwen3-next-80b-a3b"])
def test_pipeline_stages_are_those_that_vllm_plans(
    file: str, pp: int, vllm_specs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastickv.engines.vllm import geometry

    case = Case(file, 1, 2)
    reading = vllm_specs.Reading(ARCHITECTURES / f"{file}.json", tmp_path, tp=1, fp8=False)
    reading.choose_block(monkeypatch)
    shape = shape_of(case, pp=pp)
    blocks = align_blocks(1 << 20, PAGE, math.gcd(*(stage.block_bytes for stage in shape.stages)))
    planned = reading.plan("BLNHC", blocks=blocks, pp=pp)
    assert [geometry.read(stage, "") for stage in planned] == list(shape.stages)
    striped = shape_of(case, pp=pp, block_outermost=False)
    planned = reading.plan("LBNHC", blocks=align_blocks(1 << 20, PAGE, shape.part_bytes), pp=pp)
    assert [geometry.read(stage, "") for stage in planned] == list(striped.stages)


def test_the_host_plans_like_the_host() -> None:
    assert shape_of(Case("llama-3.1-8b", 1, 2), on_gpu=False, block_outermost=False).block_tokens == 128
    assert cache_shape(Case("deepseek-v3", 1, 2).model, Serving(on_gpu=False)).block_tokens == 16

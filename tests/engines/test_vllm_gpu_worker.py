"""The plug-in's worker code on vLLM's real GPU worker class, over the stand-ins for NVIDIA's libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from native_build import standin_libraries

pytestmark = [pytest.mark.vllm]

DEVICE = "GPU-10111213-1415-1617-1819-1a1b1c1d1e00"
MIB = 1024 * 1024
PAGE, BLOCK, BLOCKS = 2 * MIB, MIB // 4, 256


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the one child said."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("gpu")
    nvml = folder / "nvml.txt"
    nvml.write_text(f"gpu {DEVICE} {128 * MIB} 0 NVIDIA H100\n", encoding="utf-8")
    libraries = folder / "libraries"
    libraries.mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ELASTICKV", "CUDA_"))},
        "LD_LIBRARY_PATH": str(standin_libraries(libraries)),
        "STANDIN_NVML": str(nvml),
    }
    command = [sys.executable, str(Path(__file__).with_name("gpu_worker_child.py")), str(folder / "ledgers")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_the_process_that_schedules_touches_no_cuda(facts: dict[str, Any]) -> None:
    assert facts["cuda_calls_of_the_scheduler"] == 0


def test_the_device_has_one_name_everywhere(facts: dict[str, Any]) -> None:
    assert facts["device"] == [DEVICE, DEVICE]


def test_a_worker_without_its_engines_order_refuses_before_it_allocates(facts: dict[str, Any]) -> None:
    assert "off in its engine; give both the same environment" in facts["without_a_spec"]
    assert facts["left_alone"]


def test_vllms_allocation_lies_in_the_elastic_range(facts: dict[str, Any]) -> None:
    assert facts["report"]["memory"]
    assert facts["report"]["tensors"]
    assert facts["shapes"] == [[BLOCKS, 8, 16, 256]] * 4
    assert facts["dlpack_device"] == [2, 0]  # kDLCUDA: a PyTorch with CUDA takes it as it is
    assert facts["dlpack_without_a_gpu"]


def test_no_second_context_is_made(facts: dict[str, Any]) -> None:
    references, retained = facts["contexts"]
    assert references == retained == 2  # the engine's own and the driver's reference to the same
    assert facts["contexts_at_the_end"] <= 2


def test_memory_behind_the_views_is_fresh_and_ours(facts: dict[str, Any]) -> None:
    assert facts["fresh_is_zero"]
    assert facts["written_is_read"]
    assert facts["mapped"] >= 40 * BLOCK


def test_a_step_is_fenced_before_it_is_launched_and_nothing_goes_under_work(facts: dict[str, Any]) -> None:
    assert facts["fenced_before_launch"] == 1
    assert facts["unmapped_under_work"] == 0
    assert facts["mapped_after"] == PAGE
    assert facts["violations"] == 0


def test_the_warm_up_writes_to_block_0_alone_and_the_switch_is_put_back_after_an_error(facts: dict[str, Any]) -> None:
    assert facts["warm_up_wrote_to"] == [[0, 0, 0]]
    assert facts["redirected_after"] is False


def test_pytorchs_free_blocks_are_given_back_before_memory_counts_as_exhausted(facts: dict[str, Any]) -> None:
    assert facts["reclaimed"] == ["back"]
    assert facts["allocated"] == 20


def test_everything_goes_after_vllm_has_let_go(facts: dict[str, Any]) -> None:
    assert facts["mapped_at_shutdown"] > 0
    assert facts["used_at_the_end"] == 0

"""Which device a rank will run on, and what it has there besides its cache; vLLM and PyTorch are stood in for."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastickv._core import Ledger
from elastickv.config import Settings
from elastickv.errors import DriverError, EngineRefused
from elastickv.ledger import read_device
from elastickv.memory import Tenancy, gpu
from elastickv.memory.tenancy import attach_member

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

MIB = 1024 * 1024
A, B, C = "GPU-aaaa", "GPU-bbbb", "GPU-cccc"


def parallel(ranks: int, assigned: list[int] | None = None) -> Any:
    return SimpleNamespace(parallel_config=SimpleNamespace(world_size=ranks, assigned_physical_gpu_ids=assigned))


def settings(**arguments: Any) -> Settings:
    return Settings.load(arguments=arguments, environ={})


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs, of which this process is shown the last two, in the other order."""
    from elastickv.engines.vllm import ranks

    def visible(environ: dict[str, str] | None = None) -> list[str]:
        return [C, B] if environ is None else [A, B, C]

    monkeypatch.setattr(ranks, "current_platform", SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True))
    monkeypatch.setattr(gpu, "visible_devices", visible)


def expected(config: Any, **arguments: Any) -> list[str]:
    from elastickv.engines.vllm.ranks import expected as found

    return found(config, settings(**arguments))


def test_every_rank_of_a_cpu_is_on_the_host() -> None:
    assert expected(parallel(2)) == ["host", "host"]


@pytest.mark.usefixtures("cuda")
def test_ranks_take_the_visible_gpus_in_order() -> None:
    assert expected(parallel(2)) == [C, B]
    assert expected(parallel(1), device="0") == [C]


@pytest.mark.usefixtures("cuda")
def test_assigned_gpus_are_places_on_the_bus() -> None:
    assert expected(parallel(2, [1, 0])) == [B, A]


@pytest.mark.usefixtures("cuda")
def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(EngineRefused) as caught:
        expected(parallel(3))
    assert str(caught.value) == (
        "this engine has 3 ranks, and 2 GPUs are visible to it; lower --tensor-parallel-size, or correct "
        "CUDA_VISIBLE_DEVICES"
    )


@pytest.mark.usefixtures("cuda")
def test_a_device_that_was_not_meant_is_refused() -> None:
    with pytest.raises(EngineRefused, match=f"told to manage {A}, and this engine runs on {C}"):
        expected(parallel(1), device=A)


def test_a_worker_elsewhere_than_expected_is_refused() -> None:
    from elastickv.engines.vllm.ranks import check

    check([C, "MIG-1234"], ["GPU-CCCC", "GPU-1234"])
    with pytest.raises(EngineRefused, match=f"expected rank 1 on {B}, and it runs on {A}; set CUDA_DEVICE_ORDER"):
        check([C, B], [C, A])


class Torch:
    """torch.cuda's figures, in MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reserved: int, peak: int, process: int | None) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * MIB)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: peak * MIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="aaaa"))
        monkeypatch.setattr(gpu, "process_memory", lambda uuid, pid: None if process is None else process * MIB)


def worker(mapped: int = 0) -> Any:
    memory = SimpleNamespace(mapped_bytes=mapped * MIB)
    backing = SimpleNamespace(memory=memory)
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), elastickv=backing, elastickv_device=A)


def measured(**more: Any) -> dict[str, Any]:
    from elastickv.engines.vllm.footprint import measure

    return {key: value // MIB if isinstance(value, int) else value for key, value in measure(worker(**more)).items()}


def test_a_gpu_worker_without_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,700 MiB 300 are the cache's and 800 PyTorch's; PyTorch had 1,000 at most."""
    Torch(monkeypatch, reserved=800, peak=1000, process=1700)
    assert measured(mapped=300) == {"used": 1400, "peak": 1600, "asleep": {}}


def test_where_nvml_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    Torch(monkeypatch, reserved=800, peak=1000, process=None)
    assert measured() == {"used": 800 + 640, "peak": 1000 + 640, "asleep": {}}

    def broken(uuid: str, pid: int) -> int:
        raise DriverError("lost")

    monkeypatch.setattr(gpu, "process_memory", broken)
    assert measured()["used"] == 800 + 640


def test_a_thread_where_nvml_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch is asked only where no allocator that calls Python is under it."""
    from vllm.device_allocator.cumem import CuMemAllocator

    from elastickv.engines.vllm.footprint import glance

    rows = [SimpleNamespace(tag="weights", handle=(0, size * MIB, 0, 0), is_asleep=False) for size in (500, 90)]
    monkeypatch.setattr(CuMemAllocator, "instance", SimpleNamespace(pointer_to_data=dict(enumerate(rows))))
    Torch(monkeypatch, reserved=800, peak=1000, process=None)
    assert glance(asleep_or_not(False)) == (800 + 640) * MIB
    assert glance(asleep_or_not(True)) == (590 + 640) * MIB


def test_what_sleeps_is_not_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch goes on counting what vLLM's allocator has unmapped."""
    from vllm.device_allocator.cumem import CuMemAllocator

    def allocation(tag: str, size: int, asleep: bool) -> Any:
        return SimpleNamespace(tag=tag, handle=(0, size * MIB, 0, 0), is_asleep=asleep)

    rows = [allocation("weights", 500, True), allocation("weights", 50, True), allocation("runtime", 90, False)]
    monkeypatch.setattr(CuMemAllocator, "instance", SimpleNamespace(pointer_to_data=dict(enumerate(rows))))
    Torch(monkeypatch, reserved=800, peak=1000, process=700)
    found = measured()
    assert found["asleep"] == {"weights": 550 * MIB}
    assert found["used"] == 700


class Locked:
    """PyTorch's allocator while the worker's thread is in it: its counters may not be asked from another one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        self.asked = 0
        monkeypatch.setattr(torch.cuda, "memory_reserved", self.ask)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", self.ask)

    def ask(self, device: object) -> int:
        self.asked += threading.current_thread() is not threading.main_thread()
        return 800 * MIB


def asleep_or_not(cumem: bool) -> Any:
    """A worker whose vLLM may sleep, or may not."""
    model = SimpleNamespace(enable_sleep_mode=False, enable_cumem_allocator=cumem)
    made = worker(mapped=300)
    made.vllm_config = SimpleNamespace(model_config=model)
    return made


def test_while_it_loads_a_gpu_worker_says_what_it_has(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """From a thread, and without PyTorch, whose lock and Python's would wait for each other."""
    from elastickv.engines import footprint
    from elastickv.engines.vllm.footprint import glance, measure

    Torch(monkeypatch, reserved=800, peak=1000, process=1700)
    locked = Locked(monkeypatch)
    monkeypatch.setattr(footprint, "_EVERY_S", 0.01)
    one = settings(directory=str(directory), name="one", capacity=64 * MIB)
    tenancy = Tenancy.join(one, ["host"])
    member = attach_member(tenancy.place(["host"], publishes=True)[0])
    publisher = footprint.Publisher(
        member, lambda: measure(asleep_or_not(True)), lambda: glance(asleep_or_not(True)), True
    )
    ledger = Ledger.open(str(directory), "host")
    publisher.start()
    end = time.monotonic() + 30
    while read_device(ledger).tenant("one").static_used != 1400 * MIB:
        assert time.monotonic() < end
        time.sleep(0.01)
    publisher.stop()
    assert locked.asked == 0
    assert publisher.publish()["used"] == 1400 * MIB
    member.close()
    tenancy.close()

"""How many blocks the virtual cache gets. vLLM's planner is stood in for by arithmetic of the same kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastickv.engines.vllm import budget
from elastickv.engines.vllm.budget import Device, Wish
from elastickv.errors import EngineRefused

KIB, MIB = 1024, 1024 * 1024
PAGE = 64 * KIB
NOTHING = Wish(None, None, None)


class Engine:
    """A model of `layers` layers (by rank), a block of `block` bytes in each, 32 tokens long; layers outermost."""

    def __init__(self, *layers: int, block: int = 16 * KIB, length: int = 320, auto: bool = False) -> None:
        self.layers = layers
        self.block = block
        self.specs: list[dict[str, Any]] = [{str(i): None for i in range(count)} for count in layers]
        self.config = SimpleNamespace(
            cache_config=SimpleNamespace(
                num_gpu_blocks_override=None, kv_cache_memory_bytes=None, gpu_memory_utilization=0.9
            ),
            model_config=SimpleNamespace(max_model_len=length, original_max_model_len=-1 if auto else length),
        )

    def planner(self, config: Any, specs: list[dict[str, Any]], memory: list[int]) -> list[Any]:
        blocks = config.cache_config.num_gpu_blocks_override
        model = config.model_config
        most = (blocks - 1) * 32
        if model.original_max_model_len == -1:
            if most < 32:
                raise ValueError("Cannot auto-fit max_model_len")
            model.max_model_len = min(model.max_model_len, most)
        if model.max_model_len > most:
            raise ValueError("To serve at least one request")
        return [
            SimpleNamespace(
                num_blocks=blocks,
                kv_cache_layout="LBNHC",
                kv_cache_tensors=[
                    SimpleNamespace(
                        size=count * blocks * self.block,
                        layers=list(spec),
                        layer_stride=blocks * self.block,
                        block_stride=self.block,
                        offset=0,
                    )
                ],
            )
            for count, spec in zip(self.layers, specs, strict=True)
        ]

    def plan(self, *devices: Device, wish: Wish = NOTHING, times: int = 1) -> budget.Plan:
        def concurrency(config: Any, one: Any) -> float:
            return float(one.num_blocks / (times * -(-config.model_config.max_model_len // 32)))

        return budget.plan(self.planner, self.config, self.specs, devices, wish, concurrency)


def host(capacity: int = 64 * MIB, limit: int | None = None, name: str = "host") -> Device:
    return Device(name, PAGE, capacity, limit)


def refusal(engine: Engine, *devices: Device) -> str:
    with pytest.raises(EngineRefused) as caught:
        engine.plan(*devices)
    return str(caught.value)


def test_a_model_without_a_cache_is_refused_with_that_reason() -> None:
    engine = Engine(0)
    assert not any(engine.specs)
    assert refusal(engine) == (
        "elastickv cannot manage this engine: its model has no KV cache; unset ELASTICKV to serve without it"
    )


def test_the_virtual_size_is_the_capacity() -> None:
    engine = Engine(4)
    made = engine.plan(host())
    assert made.configs[0].num_blocks == 64 * MIB // (4 * 16 * KIB) == 1024
    assert (made.ranks[0].spans, made.ranks[0].block_bytes) == (4, 16 * KIB)
    assert engine.config.cache_config.num_gpu_blocks_override == 1024


def test_a_limit_does_not_shorten_the_addresses() -> None:
    assert Engine(4).plan(host(limit=2 * MIB)).configs[0].num_blocks == 1024


def test_wishes_in_their_order() -> None:
    every = Wish(32 * MIB, 16 * MIB, 100)
    assert Engine(4).plan(host(), wish=every).configs[0].num_blocks == 512
    assert Engine(4).plan(host(), wish=every._replace(virtual=None)).configs[0].num_blocks == 100
    assert Engine(4).plan(host(), wish=every._replace(virtual=None, blocks=None)).configs[0].num_blocks == 256


def test_a_virtual_size_beyond_the_memory() -> None:
    assert Engine(4).plan(host(8 * MIB), wish=Wish(1 << 40, None, None)).configs[0].num_blocks == 1 << 24


def test_blocks_are_rounded_so_that_spans_begin_on_pages() -> None:
    # 24 KiB a block in a span: 8 blocks are three pages.
    made = Engine(3, block=24 * KIB).plan(host(), wish=Wish(None, None, 101))
    assert made.configs[0].num_blocks == 96
    assert Engine(1, block=24 * KIB).plan(host(), wish=Wish(None, None, 101)).configs[0].num_blocks == 101


def test_ranks_on_one_device_share_it() -> None:
    assert Engine(4, 4).plan(host(), host()).configs[0].num_blocks == 512


def test_ranks_on_devices_of_their_own() -> None:
    made = Engine(4, 4).plan(host(name="GPU-1"), host(name="GPU-2"))
    assert [one.num_blocks for one in made.configs] == [1024, 1024]
    uneven = Engine(4, 2).plan(host(name="GPU-1"), host(32 * MIB, name="GPU-2"))
    assert uneven.configs[0].num_blocks == 1024


def test_the_smallest_device_decides() -> None:
    made = Engine(4, 4).plan(host(name="GPU-1"), host(16 * MIB, name="GPU-2"))
    assert made.configs[0].num_blocks == 256


def test_a_length_of_the_engines_own_choice_fits_in_the_budget() -> None:
    engine = Engine(4, length=4096, auto=True)
    made = engine.plan(host(limit=2 * MIB))
    assert made.configs[0].num_blocks == 1024
    assert engine.config.model_config.max_model_len == 31 * 32  # 32 blocks under the limit, one is the null block


def test_a_request_that_takes_more_than_the_planner_knows_gets_a_shorter_length() -> None:
    engine = Engine(4, length=4096, auto=True)
    engine.plan(host(limit=2 * MIB), times=2)
    assert engine.config.model_config.max_model_len == 15 * 32
    with pytest.raises(EngineRefused, match="one request of max_model_len 4096 tokens takes 256 blocks"):
        Engine(4, length=4096).plan(host(limit=2 * MIB), times=2)


def test_a_length_that_fits_is_left() -> None:
    engine = Engine(4, length=320, auto=True)
    engine.plan(host())
    assert engine.config.model_config.max_model_len == 320


def test_a_request_that_does_not_fit_in_the_limit() -> None:
    assert refusal(Engine(4, length=1024), host(limit=2 * MIB)) == (
        "elastickv cannot manage this engine: one request of max_model_len 1024 tokens takes 32 blocks and vLLM's null "
        "block, 2.25 MiB, and this tenant's limit is 2 MiB, which holds 32; raise it, or lower --max-model-len "
        "(-1 lets it be chosen)"
    )


def test_a_request_that_does_not_fit_in_the_device() -> None:
    assert refusal(Engine(4, length=4096), host(4 * MIB)) == (
        "elastickv cannot manage this engine: one request of max_model_len 4096 tokens takes 128 blocks and vLLM's "
        "null block, 8.25 MiB, and the capacity of host is 4 MiB, which holds 64; raise it, or lower --max-model-len "
        "(-1 lets it be chosen)"
    )


def test_what_is_leased_besides_is_not_the_caches() -> None:
    crowded = host(limit=4 * MIB)._replace(static=2 * MIB)
    assert refusal(Engine(4, length=1024), crowded) == (
        "elastickv cannot manage this engine: one request of max_model_len 1024 tokens takes 32 blocks and vLLM's null "
        "block, 2.25 MiB, and this tenant's limit of 4 MiB leaves 2 MiB beside its weights and graphs, which holds 32; "
        "raise it, or lower --max-model-len (-1 lets it be chosen)"
    )
    made = Engine(4, length=320).plan(crowded)
    assert made.configs[0].num_blocks == 1024, "addresses reach as far as the device"


def test_others_that_leave_too_little_are_told_of() -> None:
    """They may end before such a request comes, so the engine starts."""
    engine = Engine(4, length=1024)
    assert engine.plan(host(8 * MIB)._replace(static=2 * MIB, others=3 * MIB)).warning == ""
    assert engine.plan(host(8 * MIB)._replace(static=2 * MIB, others=5 * MIB)).warning == (
        "one request of max_model_len 1024 tokens takes 2.25 MiB of host, and floors and weights of others leave 1 MiB "
        "now: such a request waits until they end"
    )


def test_a_block_that_does_not_fit() -> None:
    assert refusal(Engine(4, block=MIB), host(limit=6 * MIB)) == (
        "elastickv cannot manage this engine: a block of its KV cache is 4 MiB; vLLM's null block and one more take "
        "8 MiB, and this tenant's limit is 6 MiB; raise it, or lower --block-size"
    )


def test_not_even_a_token() -> None:
    engine = Engine(4, length=4096, auto=True)
    engine.planner = _refusing  # type: ignore[method-assign]
    with pytest.raises(EngineRefused, match=r"^elastickv cannot fit one token in 1024 blocks of memory: not one; "):
        engine.plan(host())


def _refusing(config: Any, specs: list[dict[str, Any]], memory: list[int]) -> list[Any]:
    if config.model_config.original_max_model_len == -1:
        raise ValueError("not one")
    return Engine(4).planner(config, specs, memory)


def test_a_probe_leaves_no_trace_when_it_fails() -> None:
    engine = Engine(4, auto=True)

    def broken(config: Any, specs: list[dict[str, Any]], memory: list[int]) -> list[Any]:
        raise RuntimeError("broken")

    engine.planner = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        engine.plan(host())
    assert engine.config.model_config.original_max_model_len == -1
    assert engine.config.cache_config.num_gpu_blocks_override is None


def test_vllm_is_told_sizes_that_need_no_free_memory() -> None:
    config = Engine(4).config
    config.cache_config.kv_cache_memory_bytes = 5 * MIB
    config.cache_config.num_gpu_blocks_override = 7
    assert budget.silence_vllm(config, 3 * MIB) == Wish(3 * MIB, 5 * MIB, 7)
    assert config.cache_config.kv_cache_memory_bytes == 16 * MIB
    assert config.cache_config.gpu_memory_utilization == 0.01

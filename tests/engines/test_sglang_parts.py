"""Parts of the SGLang plug-in that need no SGLang: what is refused, how buffers lie, who is kept."""

from __future__ import annotations

import sys
from abc import ABC
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import pytest

from elastickv.engines import adapter
from elastickv.engines.sglang import gate, releases, retract
from elastickv.engines.sglang.queue import queued_tokens
from elastickv.errors import EngineRefused

torch = pytest.importorskip("torch")

PLAIN = {name: plain for name, (plain, _, _) in gate.REFUSED.items()}


@pytest.mark.parametrize("version", ["0.5.15.post1", "0.5.17", "0.5.22", "0.6.0", "1.0", "what"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(EngineRefused) as caught:
        releases.find(version)
    assert str(caught.value) == (
        f"elastickv cannot manage SGLang {version}: it is written for SGLang 0.5.16 or >=0.5.23,<0.6; "
        "install such a version, or unset ELASTICKV to serve without it"
    )


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("0.5.16", "0.5.16"),
        ("0.5.23", ">=0.5.23,<0.6"),
        ("0.5.24.post1", ">=0.5.23,<0.6"),
        ("0.5.30rc1", ">=0.5.23,<0.6"),
    ],
)
def test_these_versions_are_managed(version: str, release: str) -> None:
    assert releases.find(version).versions == release


@pytest.mark.parametrize("version", ["0.5.16", "0.5.23"])
def test_every_hook_of_a_release_is_checked_before_it_is_put_on(version: str) -> None:
    release = releases.find(version)
    checked = {f"{seam.module}.{seam.name}" for seam in release.seams}
    assert {hook.target for hook in release.hooks} <= checked


def test_plain_arguments_are_managed() -> None:
    gate.check_arguments(SimpleNamespace(**PLAIN, kv_cache_dtype="auto", attention_backend="triton"))


@pytest.mark.parametrize("name", sorted(gate.REFUSED))
def test_each_refused_option_is_named_with_a_reason_and_a_remedy(name: str) -> None:
    plain, why, remedy = gate.REFUSED[name]
    value: Any = True if plain is False else plain + 1 if isinstance(plain, int) else "other"
    with pytest.raises(EngineRefused) as caught:
        gate.check_arguments(SimpleNamespace(**{**PLAIN, name: value}))
    text = str(caught.value)
    assert f"--{name.replace('_', '-')}" in text
    assert why in text
    assert remedy in text
    assert "unset ELASTICKV to serve without it" in text


@pytest.mark.parametrize(("name", "value"), [("kv_cache_dtype", "fp4_e2m1"), ("decode_attention_backend", "ascend")])
def test_types_and_backends_are_refused(name: str, value: str) -> None:
    with pytest.raises(EngineRefused, match=value):
        gate.check_arguments(SimpleNamespace(**{**PLAIN, name: value}))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(None, {}), ("", {}), ("a, elastickv", {}), ("a", {"SGLANG_PLUGINS": "a,elastickv"})],
)
def test_a_choice_of_plugins_gets_the_plugin(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: dict[str, str]
) -> None:
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("SGLANG_PLUGINS", chosen)
    assert adapter("sglang").environment() == expected


def request_that(text: str | None, beams: object = None) -> SimpleNamespace:
    return SimpleNamespace(to_finish=None if text is None else SimpleNamespace(message=text), beam_group=beams)


def retracts(batch: list[SimpleNamespace], others: list[SimpleNamespace]) -> Any:
    """As SGLang does while nothing is left for the last one: it aborts that, whatever else was to become of it."""
    last = batch[0]

    def retract_decode(_: Any) -> tuple[list[SimpleNamespace], float, list[SimpleNamespace]]:
        last.to_finish = SimpleNamespace(
            message="Out of memory even after retracting all other requests in the decode batch. Aborting the last."
        )
        return batch[1:], 0.5, [*others, last]

    return retract_decode, SimpleNamespace(reqs=batch)


def test_the_last_request_is_retracted_and_not_aborted() -> None:
    one, last = request_that(None), request_that(None)
    beam = request_that("Beam search group aborted: KV cache pool is full.", beams=object())
    retracted, ratio, aborted = retract.keep_last(*retracts([last, one], [beam]))
    assert (retracted, ratio, aborted) == ([one, last], 0.5, [beam])
    assert last.to_finish is None
    assert beam.to_finish is not None


def test_a_last_request_that_nobody_waits_for_stays_aborted() -> None:
    ended, beams = request_that("Aborted"), request_that(None, beams=object())
    for last in (ended, beams):
        assert retract.keep_last(*retracts([last], [])) == ([], 0.5, [last])
        assert last.to_finish is not None


@pytest.mark.parametrize("strided", [True, False])
def test_no_two_rows_share_a_byte_and_a_block_lies_where_the_pool_thinks(strided: bool) -> None:
    from elastickv.engines.sglang.layout import Rows

    rows = Rows("mha", 3, ((2, 8), (2, 8)), torch.float32, 4, 5, strided)
    geometry = rows.geometry("host")
    blocks = rows.aligned_blocks(4096)
    assert blocks >= rows.blocks
    assert geometry.spans == 1 or blocks * geometry.block_bytes % 4096 == 0
    memory = torch.zeros(geometry.spans * blocks * geometry.block_bytes, dtype=torch.int8)
    views = rows.views(memory, blocks)
    assert [len(part) for part in views] == [3, 3]
    number = 0
    for part in views:
        for layer in part:
            assert layer.shape == (20, 2, 8)
            for token in range(20):
                number += 1
                layer[token] = number
    number = 0
    for part in views:
        for layer in part:
            for token in range(20):
                number += 1
                assert bool((layer[token] == number).all())
                at = layer[token].data_ptr() - memory.data_ptr()
                within = at % (blocks * geometry.block_bytes)
                assert within // geometry.block_bytes == token // rows.page_tokens


def test_a_backend_that_wants_whole_layers_gets_them() -> None:
    from elastickv.engines.sglang.layout import layout_for

    pool = SimpleNamespace(page_size=16, size=160, layer_num=2, store_dtype=torch.float32)
    shapes = ((2, 8), (2, 8))
    strided = frozenset({"triton", "fa3"})
    assert layout_for(pool, "mha", shapes, {"triton"}, strided).strided
    assert not layout_for(pool, "mha", shapes, {"triton", "other"}, strided).strided
    assert not layout_for(pool, "mha", shapes, {"None"}, strided).strided
    assert layout_for(pool, "mha", shapes, {"triton"}, strided).blocks == 11
    with pytest.raises(EngineRefused, match="choose one of fa3"):
        layout_for(pool, "mha", ((2, 8), (2, 4)), {"other"}, strided)


def test_a_cache_of_a_class_that_the_release_chose_becomes_elastic(monkeypatch: pytest.MonkeyPatch) -> None:
    """As SGLang 0.5.16 has its cache without prefixes: its attributes come from a base beside an abstract one."""
    other = SimpleNamespace(UnifiedRadixCache=type("UnifiedRadixCache", (), {}))
    monkeypatch.setitem(sys.modules, "sglang.srt.mem_cache.unified_radix_cache", other)
    tree: Any = ModuleType("elastickv.engines.sglang.tree")
    exec(Path(gate.__file__).with_name("tree.py").read_text(encoding="utf-8"), tree.__dict__)

    class Trait(Protocol):
        token_to_kv_pool_allocator: Any

    class Base(ABC, Trait):
        def protected_size(self) -> int:
            return 5

    stock = type(
        "ChunkCache", (Base,), {"__module__": "sglang.srt.mem_cache.chunk_cache", "__qualname__": "ChunkCache"}
    )
    cache: Any = stock()
    cache.token_to_kv_pool_allocator = SimpleNamespace(withheld_size=lambda: 7)
    adopted = tree.adopt(cache, lambda: 3)
    assert adopted is cache
    assert isinstance(adopted, tree.Elastic)
    assert isinstance(adopted, stock)
    assert adopted.protected_size() == 15
    with pytest.raises(EngineRefused, match=r"cannot manage the prefix cache .*Base; unset"):
        tree.adopt(Base(), lambda: 0)


def test_the_queue_behind_the_request_that_asks_is_counted() -> None:
    waiting = SimpleNamespace(origin_input_ids=[0] * 40, output_ids=[0] * 10)
    assert [queued_tokens([waiting] * count) for count in (0, 1, 4)] == [0, 0, 150]
    assert queued_tokens([waiting] * 1000) == 256 * 50

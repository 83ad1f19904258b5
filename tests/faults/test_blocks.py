"""The patterns: what a tenant of the chaos run notices of its own memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

import elastickv
from chaos.blocks import Blocks, Damage
from chaos.choices import MIB, PAGE, Options, TenantSpec, tenant_spec


@pytest.fixture
def spec(tmp_path: Path) -> TenantSpec:
    options = Options(seed=1, directory=tmp_path / "d", seconds=1, capacity=16 * MIB)
    return dataclasses.replace(tenant_spec(options, "one", 6), block_bytes=3 * PAGE // 2, blocks=64)


@pytest.fixture
def blocks(spec: TenantSpec) -> Iterator[Blocks]:
    with elastickv.open_device("host", capacity=spec.capacity, directory=spec.directory) as device:
        yield Blocks(device.join("one"), spec)


def test_sound_memory_passes(blocks: Blocks) -> None:
    assert blocks.take(8)
    assert blocks.verify_all() == 8
    blocks.give(sorted(blocks.used)[:4], True)
    assert blocks.reuse(min(blocks.cached))
    blocks.give(sorted(blocks.used), False)
    assert blocks.take(12)  # old patterns of its own, and fresh pages
    assert blocks.verify_all() == 12


def test_a_word_that_nobody_wrote_is_damage(blocks: Blocks) -> None:
    assert blocks.take(2)
    one, other = sorted(blocks.used)
    blocks._of(one)[77] = blocks.used[other]
    with pytest.raises(Damage, match=f"block {one} of life 6 holds {blocks.used[other]:#x}"):
        blocks.verify(one)


def test_a_fresh_block_with_anothers_pattern_is_damage(blocks: Blocks) -> None:
    assert blocks.take(2)
    one, other = sorted(blocks.used)
    blocks._of(one)[:] = blocks.used[one] = blocks.used[other]
    blocks.give([one], False)
    with pytest.raises(Damage, match="was handed out with"):
        blocks.take(1)


def test_more_than_there_is_is_no_damage(blocks: Blocks) -> None:
    assert not blocks.take(63 * 10)
    assert blocks.used == {}

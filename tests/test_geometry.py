"""Geometry: every block lies on the same pages for every rank, and the sums are exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.config import Settings
from elastickv.errors import InvalidArgument
from elastickv.memory import PoolGeometry, RankGeometry, align_blocks, device_page

PAGE = 64 * 1024


@given(
    blocks=st.integers(2, 3000),
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 64)), min_size=1, max_size=4),
    unit=st.sampled_from([512, 1536, 24 * 1024]),
)
def test_a_block_lies_on_the_same_pages_for_every_rank(blocks: int, shapes: list[tuple[int, int]], unit: int) -> None:
    ranks = [RankGeometry("host", spans, factor * unit) for spans, factor in shapes]
    for rank in ranks:
        blocks = max(2, align_blocks(blocks, PAGE, rank.block_bytes)) if rank.spans > 1 else blocks
    try:
        geometry = PoolGeometry.of(blocks, PAGE, ranks)
    except InvalidArgument:
        assert any(rank.spans > 1 and blocks * rank.block_bytes % PAGE for rank in ranks)
        return
    for index, rank in enumerate(ranks):
        page = geometry.rank_page_bytes(index)
        assert page % PAGE == 0
        for block in {0, 1, blocks // 2, blocks - 1}:
            mine = (block * rank.block_bytes // page, ((block + 1) * rank.block_bytes - 1) // page)
            pool = (
                block * geometry.block_bytes // PAGE,
                ((block + 1) * geometry.block_bytes - 1) // PAGE,
            )
            assert mine == pool
        assert -(-geometry.virtual_bytes(index) // rank.spans // page) == geometry.pages
    assert geometry.page_cost("host") == sum(
        geometry.rank_page_bytes(index) * rank.spans for index, rank in enumerate(ranks)
    )


def test_spans_that_do_not_start_on_pages_are_refused_with_the_number_that_works() -> None:
    with pytest.raises(InvalidArgument) as caught:
        PoolGeometry.of(100, PAGE, [RankGeometry("host", 30, 24 * 1024)])
    assert str(caught.value) == (
        "30 spans of 100 blocks of 24576 bytes do not start on pages of 64 KiB; use a multiple of 8 blocks"
    )
    assert align_blocks(100, PAGE, 24 * 1024) == 96
    PoolGeometry.of(96, PAGE, [RankGeometry("host", 30, 24 * 1024)])


@pytest.mark.parametrize(
    ("blocks", "ranks", "text"),
    [
        (10, [], "a cache needs at least one rank"),
        (1, [RankGeometry("host", 1, 4096)], "a cache of 1 blocks: at least 2 are needed, block 0 is never handed out"),
        (10, [RankGeometry("host", 0, 4096)], "a rank of 0 spans with blocks of 4096 bytes"),
    ],
)
def test_wrong_shapes(blocks: int, ranks: list[RankGeometry], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        PoolGeometry.of(blocks, PAGE, ranks)


@pytest.mark.parametrize(
    ("capacity", "given", "page"),
    [(1 << 30, {}, 64 * 1024), (12 << 30, {}, 1 << 20), (512 << 30, {}, 32 << 20), (12 << 30, {"page": "4KiB"}, 4096)],
)
def test_the_host_page_keeps_the_kernel_s_count_of_ranges_low(
    capacity: int, given: dict[str, object], page: int
) -> None:
    settings = Settings.load(arguments=given, environ={})
    assert device_page("host", settings, capacity) == page
    assert device_page("GPU-1", settings, capacity) == 2 << 20

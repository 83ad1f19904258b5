"""How blocks lie in a rank's memory, and how that becomes pages that are the same for every rank.

A rank's buffer is `spans` stripes side by side, each of `num_blocks` blocks of `block_bytes`: one span is the
block-outermost layout, one span a layer the layer-outermost one. Ranks may differ in the bytes of a block (pipeline
stages of unequal length), so the pool counts in units: with g the greatest common divisor of all ranks' block_bytes
and P the driver's page, the pool sees blocks of g bytes on pages of P bytes, and a rank whose block is m times g maps
m pages where the pool means one. A block then lies on the same pages for everybody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elastickv.errors import InvalidArgument
from elastickv.units import format_size

__all__ = ["PoolGeometry", "RankGeometry", "align_blocks"]


@dataclass(frozen=True)
class RankGeometry:
    """One rank's buffer. Sizes in bytes."""

    device: str
    """`host` or a GPU's UUID."""
    spans: int
    block_bytes: int
    """Of one block within one span."""


@dataclass(frozen=True)
class PoolGeometry:
    """What the pool sees, and what it means for each rank. Sizes in bytes."""

    num_blocks: int
    block_bytes: int
    page_bytes: int
    pages: int
    ranks: tuple[RankGeometry, ...]

    @classmethod
    def of(cls, num_blocks: int, page_bytes: int, ranks: Sequence[RankGeometry]) -> PoolGeometry:
        """InvalidArgument where the numbers cannot work, with the numbers."""
        if not ranks:
            raise InvalidArgument("a cache needs at least one rank", ranks=0)
        if num_blocks < 2:
            raise InvalidArgument(
                f"a cache of {num_blocks} blocks: at least 2 are needed, block 0 is never handed out",
                num_blocks=num_blocks,
            )
        for rank in ranks:
            if rank.spans < 1 or rank.block_bytes < 1:
                raise InvalidArgument(f"a rank of {rank.spans} spans with blocks of {rank.block_bytes} bytes")
            if rank.spans > 1 and num_blocks * rank.block_bytes % page_bytes:
                raise InvalidArgument(
                    f"{rank.spans} spans of {num_blocks} blocks of {rank.block_bytes} bytes do not start on pages of "
                    f"{format_size(page_bytes)}; use a multiple of "
                    f"{page_bytes // math.gcd(page_bytes, rank.block_bytes)} blocks",
                    num_blocks=num_blocks,
                    block_bytes=rank.block_bytes,
                    page_bytes=page_bytes,
                )
        unit = math.gcd(*(rank.block_bytes for rank in ranks))
        return cls(num_blocks, unit, page_bytes, -(-num_blocks * unit // page_bytes), tuple(ranks))

    def rank_page_bytes(self, rank: int) -> int:
        """What one page of the pool is on this rank, in each of its spans."""
        return self.page_bytes * (self.ranks[rank].block_bytes // self.block_bytes)

    def page_cost(self, device: str) -> int:
        """Bytes of the device that one page of the pool takes, all ranks on it together."""
        return sum(
            self.rank_page_bytes(index) * rank.spans for index, rank in enumerate(self.ranks) if rank.device == device
        )

    def block_cost(self, device: str) -> int:
        """Bytes of the device that a lone block takes: the pages it lies on, whole."""
        return -(-self.block_bytes // self.page_bytes) * self.page_cost(device)

    def virtual_bytes(self, rank: int) -> int:
        """The exact size of the rank's buffer."""
        return self.ranks[rank].spans * self.num_blocks * self.ranks[rank].block_bytes

    @property
    def devices(self) -> tuple[str, ...]:
        """Each device once, in rank order."""
        return tuple(dict.fromkeys(rank.device for rank in self.ranks))


def align_blocks(num_blocks: int, page_bytes: int, block_bytes: int) -> int:
    """The most blocks ≤ num_blocks whose span ends on a page border, so that the next span starts on one."""
    step = page_bytes // math.gcd(page_bytes, block_bytes)
    return num_blocks // step * step

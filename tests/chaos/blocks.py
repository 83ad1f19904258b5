"""A tenant's blocks and the patterns in them: damage shows as a word that nobody wrote there."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from chaos.choices import PAGE, TenantSpec
from elastickv.errors import InvalidArgument
from elastickv.memory import BlockCache, Membership

GENERATIONS = 1 << 14


class Damage(Exception):
    """Memory does not hold what its owner wrote."""


class Blocks:
    """Takes, fills, checks and gives back. One thread calls; `lost` comes on any."""

    def __init__(self, member: Membership, spec: TenantSpec) -> None:
        self.spec = spec
        self.used: dict[int, int] = {}
        self.cached: dict[int, int] = {}
        self.generation = 0
        self._lock = threading.Lock()
        self.cache: BlockCache = member.cache(num_blocks=spec.blocks, block_bytes=spec.block_bytes, on_evict=self.lost)
        self._words = np.from_dlpack(self.cache).view(np.int64)  # type: ignore[arg-type]

    def lost(self, ids: Sequence[int]) -> None:
        """The cache's word that these blocks have lost their contents."""
        with self._lock:
            for block in ids:
                self.cached.pop(block, None)

    def _of(self, block: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        words = self.spec.block_bytes // 8
        return self._words[block * words : (block + 1) * words]

    def _tag(self, block: int) -> int:
        """Life, block and generation in one word, never zero."""
        self.generation = self.generation % (GENERATIONS - 1) + 1
        return (self.spec.life + 1) << 40 | block << 14 | self.generation

    def _check_fresh(self, block: int) -> None:
        """What is new reads as zero; what was mapped before still holds what this life wrote into this block."""
        words = self._of(block)
        for start in range(0, len(words), PAGE // 16):  # half a page: the smallest part of a block on a page of its own
            part = words[start : start + PAGE // 16]
            first = int(part[0])
            if not (part == first).all():
                raise Damage(f"block {block} of life {self.spec.life}: a fresh page holds more than one pattern")
            if first != 0 and first >> 14 != (self.spec.life + 1) << 26 | block:
                raise Damage(f"block {block} of life {self.spec.life} was handed out with {first:#x} in it")

    def take(self, n: int) -> bool:
        """n more blocks, filled; False: none now."""
        ids = self.cache.alloc(n)
        if ids is None:
            return False
        if len(set(ids)) != n or 0 in ids or not self.used.keys().isdisjoint(ids):
            raise Damage(f"life {self.spec.life} asked for {n} blocks and was given {ids}")
        with self._lock:
            for block in ids:
                self.cached.pop(block, None)
        for block in ids:
            self._check_fresh(block)
            self.used[block] = self._tag(block)
            self._of(block)[:] = self.used[block]
        return True

    def verify(self, block: int) -> None:
        """Damage when a used block does not hold what was written."""
        wanted, words = self.used[block], self._of(block)
        if not (words == wanted).all():
            wrong = int(words[np.argmax(words != wanted)])
            raise Damage(f"block {block} of life {self.spec.life} holds {wrong:#x} instead of {wanted:#x}")

    def give(self, ids: Sequence[int], cached: bool) -> None:
        """Checks blocks and frees them, their contents kept or not."""
        for block in ids:
            self.verify(block)
        with self._lock:  # they may be evicted before free() returns
            tags = {block: self.used.pop(block) for block in ids}
            if cached:
                self.cached |= tags
        self.cache.free(ids, cached=cached)

    def reuse(self, block: int) -> bool:
        """Takes a cached block back; False: it has gone meanwhile."""
        with self._lock:
            tag = self.cached.pop(block, None)
        if tag is None:
            return False
        try:
            self.cache.reuse(block)
        except InvalidArgument:
            return False  # evicted, and the word of it is on its way
        self.used[block] = tag
        self.verify(block)
        return True

    def verify_all(self) -> int:
        """Every used block; how many there are."""
        for block in self.used:
            self.verify(block)
        return len(self.used)

"""How SGLang's KV buffers lie in the elastic range.

Two layouts. `token`: one stripe, in which a token has all its layers side by side, so that one page serves whole blocks
of tokens; a layer's buffer is a view whose rows are as far apart as tokens. `layer`: one stripe for each layer's keys
and one for its values (or for its latent rows), each as SGLang would have allocated it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch

from elastickv.errors import EngineRefused
from elastickv.memory import RankGeometry

__all__ = ["Rows", "layout_for"]

_ENTRY_ALIGN: Final = 32
_ROW_ALIGN: Final = 16
"""Bytes; SGLang's own rule for rows of a strided entry (mem_cache/layout/token_major.py of 0.5.23)."""


@dataclass(frozen=True)
class Rows:
    """One rank's buffers. `shapes`: of one token's row in each of the buffers of one layer; `blocks`: with block 0."""

    kind: str
    layers: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    page_tokens: int
    blocks: int
    strided: bool

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """Bytes of a token's row in each buffer of a layer."""
        return tuple(math.prod(shape) * self.dtype.itemsize for shape in self.shapes)

    @property
    def entry_bytes(self) -> int:
        """Bytes of a token over all layers, in the token layout."""
        total = self.layers * sum(self.row_bytes)
        return -(-total // _ENTRY_ALIGN) * _ENTRY_ALIGN if self.strided else total

    @property
    def name(self) -> str:
        """For people and for the ledger."""
        return "token, one span" if self.strided else f"layer, {self.layers * len(self.shapes)} spans"

    def geometry(self, device: str) -> RankGeometry:
        """What the pool and the mapper need to know."""
        if self.strided:
            return RankGeometry(device, 1, self.page_tokens * self.entry_bytes)
        return RankGeometry(device, self.layers * len(self.shapes), self.page_tokens * self.row_bytes[0])

    def aligned_blocks(self, page_bytes: int) -> int:
        """`blocks`, or the next number above it at which every stripe begins on a page border."""
        if self.strided:
            return self.blocks
        step = page_bytes // math.gcd(page_bytes, self.page_tokens * self.row_bytes[0])
        return -(-self.blocks // step) * step

    def views(self, memory: torch.Tensor, buffer_blocks: int) -> list[list[torch.Tensor]]:
        """By buffer of a layer, the tensors of all layers, each with a row for every token of `blocks` blocks.

        `memory`: the elastic range, as bytes, of `buffer_blocks` blocks.
        """
        typed = memory.view(self.dtype)
        tokens = self.blocks * self.page_tokens
        size = self.dtype.itemsize
        views: list[list[torch.Tensor]] = [[] for _ in self.shapes]
        for layer in range(self.layers):
            for part, shape in enumerate(self.shapes):
                row = math.prod(shape)
                if self.strided:
                    stride = self.entry_bytes // size
                    offset = (layer * sum(self.row_bytes) + sum(self.row_bytes[:part])) // size
                else:
                    stride = row
                    stripe = layer * len(self.shapes) + part
                    offset = stripe * buffer_blocks * self.page_tokens * row
                inner = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
                views[part].append(typed.as_strided((tokens, *shape), (stride, *inner), offset))
        return views


def layout_for(
    pool: Any, kind: str, shapes: tuple[tuple[int, ...], ...], backends: set[str], strided_backends: frozenset[str]
) -> Rows:
    """The layout of SGLang's `pool`, given the attention backends that will read it, and those that take strides."""
    page, size = int(pool.page_size), int(pool.size)
    if size % page:
        raise EngineRefused(f"SGLang planned {size} tokens in pages of {page}, which is no whole number; report this")
    rows = [math.prod(shape) * pool.store_dtype.itemsize for shape in shapes]
    strided = backends <= strided_backends and all(row % _ROW_ALIGN == 0 for row in rows)
    if not strided and len(set(rows)) > 1:
        raise EngineRefused(
            f"elastickv cannot manage keys of {rows[0]} bytes beside values of {rows[1]} bytes with the attention "
            f"backends {', '.join(sorted(backends))}; choose one of {', '.join(sorted(strided_backends))} with "
            "--attention-backend, or unset ELASTICKV to serve without it"
        )
    return Rows(kind, int(pool.layer_num), shapes, pool.store_dtype, page, size // page + 1, strided)

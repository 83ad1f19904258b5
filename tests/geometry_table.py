"""The table of docs/geometry.md: models' published shapes, and what the planner makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from elastickv.memory import PoolGeometry
from elastickv.planning import Architecture, CacheShape, Kind, Serving, cache_shape, read_architecture
from elastickv.units import format_size

ARCHITECTURES: Final = Path(__file__).resolve().parent / "architectures"
PAGE: Final = 2 * 1024 * 1024

NAMES: Final = {
    "llama-3.1-8b": "Llama-3.1-8B",
    "llama-3.1-70b": "Llama-3.1-70B",
    "qwen3-0.6b": "Qwen3-0.6B",
    "qwen3-1.7b": "Qwen3-1.7B",
    "qwen3-4b": "Qwen3-4B",
    "qwen3-8b": "Qwen3-8B",
    "qwen3-14b": "Qwen3-14B",
    "qwen3-32b": "Qwen3-32B",
    "deepseek-v3": "DeepSeek-V3",
    "gemma-3-4b": "Gemma-3-4B",
    "gemma-3-12b": "Gemma-3-12B",
    "gemma-3-27b": "Gemma-3-27B",
    "llama-4-scout": "Llama-4-Scout",
    "qwen3-next-80b-a3b": "Qwen3-Next-80B-A3B",
    "granite-4.0-h-small": "Granite-4.0-H-Small",
    "lfm2-1.2b": "LFM2-1.2B",
    "gpt-oss-20b": "gpt-oss-20b",
    "gpt-oss-120b": "gpt-oss-120b",
}
RANKS: Final = {"llama-3.1-8b": (1, 2, 4, 8), "llama-3.1-70b": (1, 2, 4, 8), "deepseek-v3": (1, 8)}
HEAD: Final = (
    "| model | TP | cache | layers | groups | tokens | part | block | pages | layer-outermost | token |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)
_WORDS: Final = {
    Kind.FULL: "full",
    Kind.WINDOW: "window",
    Kind.CHUNK: "chunk",
    Kind.LATENT: "latent",
    Kind.STATE: "state",
}


class Case(NamedTuple):
    """One row."""

    file: str
    tp: int
    kv_width: int

    @property
    def model(self) -> Architecture:
        return read_architecture(ARCHITECTURES / f"{self.file}.json")

    @property
    def serving(self) -> Serving:
        return Serving(tp=self.tp, kv_width=self.kv_width)


def cases() -> Iterator[Case]:
    """Every row, in order."""
    for file in NAMES:
        for tp in RANKS.get(file, (1,)):
            for width in (2, 1):
                yield Case(file, tp, width)


def table() -> str:
    """The whole table."""
    return HEAD + "".join(_row(case) for case in cases())


def _row(case: Case) -> str:
    model = case.model
    shape = cache_shape(model, case.serving)
    kinds = [f"{model.count(kind)} {_WORDS[kind]}" for kind in Kind if model.count(kind)]
    longest = max(len(group.layers) for group in shape.groups)
    groups = f"{len(shape.groups)} of {longest}" if len(shape.groups) > 1 else "1"
    cells = (
        NAMES[case.file],
        case.tp,
        "fp8" if case.kv_width == 1 else "16 bits",
        ", ".join(kinds),
        groups,
        shape.block_tokens,
        format_size(shape.part_bytes),
        format_size(shape.block_bytes),
        _pages(shape),
        _stripes(case, shape),
        format_size(round(shape.token_bytes)),
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |\n"


def _pages(shape: CacheShape) -> str:
    size = shape.block_bytes
    if PAGE % size == 0:
        return "1 block" if size == PAGE else f"{PAGE // size} blocks"
    if size % PAGE == 0:
        return f"{size // PAGE} pages a block"
    unit = math.lcm(size, PAGE)
    return f"{unit // size} blocks on {unit // PAGE} pages"


def _stripes(case: Case, shape: CacheShape) -> str:
    outer = cache_shape(case.model, replace(case.serving, block_outermost=False, block_tokens=shape.block_tokens))
    pool = PoolGeometry.of(2 * PAGE, PAGE, [replace(outer.stages[0], device="GPU")])
    return f"{outer.stages[0].spans} x {format_size(pool.page_cost('GPU') // outer.stages[0].spans)}"

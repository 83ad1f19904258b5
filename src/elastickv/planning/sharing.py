"""Several models on one device: what each needs, how many tokens it holds, who can be up together, what to change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from elastickv.memory import PoolGeometry
from elastickv.planning.blocks import CacheShape
from elastickv.units import format_size

__all__ = ["Advice", "Model", "Plan", "plan_device"]

_MOST_MODELS: Final = 12
"""Up to so many models every set is tried; with more, only sets made by leaving the largest out."""


@dataclass(frozen=True)
class Model:
    """One model as it is to be served, on the device of its largest rank. Sizes in bytes."""

    name: str
    weights: int
    allowance: int
    """For graphs, activations and workspaces."""
    shape: CacheShape
    page_bytes: int
    length: int
    """Tokens of the longest request."""
    floor: int = 0
    fp8: CacheShape | None = None
    """The shape with an 8-bit cache; None if it has one already."""

    @cached_property
    def geometry(self) -> PoolGeometry:
        """The pool's view of it, for any number of blocks."""
        stages = [dataclasses.replace(rank, device=str(i)) for i, rank in enumerate(self.shape.stages)]
        return PoolGeometry.of(2 * self.page_bytes, self.page_bytes, stages)

    @property
    def page_cost(self) -> int:
        """What the pool's page takes on the rank that keeps most."""
        return max(self.geometry.page_cost(device) for device in self.geometry.devices)

    @property
    def static(self) -> int:
        """What it holds besides its cache."""
        return self.weights + self.allowance

    def bytes_of(self, blocks: int) -> int:
        """What so many blocks take, in whole pages."""
        geometry = self.geometry
        return -(-blocks * geometry.block_bytes // geometry.page_bytes) * self.page_cost

    def blocks_within(self, size: int) -> int:
        """How many blocks fit in so many bytes."""
        geometry = self.geometry
        return max(0, size) // self.page_cost * geometry.page_bytes // geometry.block_bytes

    @property
    def least(self) -> int:
        """What it holds when it is idle: everything static, and the page of block 0."""
        return self.static + self.bytes_of(1)

    @property
    def need(self) -> int:
        """What nobody else can have while it is up: its floor, or what it holds when idle if that is more."""
        return max(self.least, self.floor)

    @property
    def request(self) -> int:
        """What one request of `length` tokens takes of the cache, with block 0."""
        return self.bytes_of(self.shape.blocks_of(self.length) + 1)

    @property
    def alone(self) -> int:
        """The least device on which it can serve its longest request."""
        return max(self.static + self.request, self.need)

    def tokens_within(self, size: int) -> int:
        """Tokens of running requests that fit when it holds `size` bytes in all: as many of the longest as fit.

        The fraction of a request counts, as in the capacity that vLLM logs; block 0 is nobody's.
        """
        blocks = max(0, self.blocks_within(size - self.static) - 1)
        return int(blocks / self.shape.blocks_of(self.length) * self.length)


@dataclass(frozen=True)
class Advice:
    """One thing that would help. `what`: floor, fp8, sleep, length, device; `size`: the number in it, in bytes."""

    what: str
    text: str
    models: tuple[str, ...] = ()
    size: int | None = None


@dataclass(frozen=True)
class Plan:
    """What comes of putting the models on a device of `capacity` bytes."""

    capacity: int
    models: tuple[Model, ...]
    fits: bool
    """Whether all can be up at the same time, each with its floor, each able to serve its longest request."""
    needed: int
    sets: tuple[tuple[str, ...], ...]
    """The largest sets that can be up together; one with every name if all fit."""
    advice: tuple[Advice, ...]

    def most(self, model: Model) -> int:
        """Bytes that a model may hold at most: when all others that fit beside it are idle, or alone if not all fit."""
        others = sum(other.need for other in self.models if other is not model) if self.fits else 0
        return self.capacity - others


def plan_device(capacity: int, models: Sequence[Model]) -> Plan:
    """Plans the models on a device of `capacity` bytes."""
    fits = _fit(models, capacity)
    needed = _needed(models)
    sets = _sets(models, capacity)
    advice = () if fits else tuple(_advice(models, capacity, sets))
    return Plan(capacity, tuple(models), fits, needed, tuple(tuple(m.name for m in one) for one in sets), advice)


def _needed(models: Iterable[Model]) -> int:
    """The least device for all of them: all needs, and room for the longest request of any one beyond its own need."""
    models = list(models)
    return sum(model.need for model in models) + max((model.alone - model.need for model in models), default=0)


def _fit(models: Iterable[Model], capacity: int) -> bool:
    return _needed(models) <= capacity


def _sets(models: Sequence[Model], capacity: int) -> list[tuple[Model, ...]]:
    """Sets that fit and to which no other model can be added."""
    found: list[tuple[Model, ...]] = []
    if len(models) > _MOST_MODELS:
        rest = sorted(models, key=lambda model: model.alone)
        while rest and not _fit(rest, capacity):
            rest.pop()
        return [tuple(model for model in models if model in rest)] if rest else []
    for size in range(len(models), 0, -1):
        for chosen in itertools.combinations(models, size):
            if _fit(chosen, capacity) and not any(set(chosen) <= set(larger) for larger in found):
                found.append(chosen)
    return found


def _advice(models: Sequence[Model], capacity: int, sets: Sequence[tuple[Model, ...]]) -> Iterable[Advice]:
    yield from _lower_floors(models, capacity)
    for model in models:
        yield from _shorten(model, models, capacity)
    if sets and len(sets[0]) < len(models):
        asleep = [model for model in models if model not in sets[0]]
        names = tuple(model.name for model in asleep)
        freed = sum(model.need for model in asleep)
        yield Advice("sleep", f"put {' and '.join(names)} to sleep: that frees {format_size(freed)}", names, freed)
    needed = _needed(models)
    yield Advice("device", f"a device with {format_size(needed)} for all of them", size=needed)


def _lower_floors(models: Sequence[Model], capacity: int) -> Iterable[Advice]:
    """The highest floor that all may have, where no floor at all would make them fit."""
    bare = [dataclasses.replace(model, floor=0) for model in models]
    if not _fit(bare, capacity) or all(model.floor <= model.least for model in models):
        return
    low, high = 0, max(model.floor for model in models)
    step = max(model.page_bytes for model in models)
    while high - low > step:
        middle = (low + high) // 2
        capped = [dataclasses.replace(model, floor=min(model.floor, middle)) for model in models]
        low, high = (middle, high) if _fit(capped, capacity) else (low, middle)
    low = low // step * step
    lowered = tuple(model.name for model in models if model.floor > low)
    yield Advice("floor", f"floors of at most {format_size(low)} (for {', '.join(lowered)})", lowered, low)


def _shorten(model: Model, models: Sequence[Model], capacity: int) -> Iterable[Advice]:
    """Where the longest request is what does not fit: an 8-bit cache if that is enough, and the length that fits."""
    others = sum(other.need for other in models if other is not model)
    room = capacity - others - model.static
    if model.request <= room or room <= 0:
        return
    tokens = _longest(model, room)
    if model.fp8 is not None:
        smaller = dataclasses.replace(model, shape=model.fp8, fp8=None)
        changed = [smaller if one is model else one for one in models]
        if smaller.request <= room or _fit(changed, capacity):
            text = (
                f"--kv-dtype fp8 for {model.name}: a request of {model.length} tokens then takes "
                f"{format_size(smaller.request)} instead of {format_size(model.request)}"
            )
            yield Advice("fp8", text, (model.name,), smaller.request)
    if tokens > 0:
        text = f"--max-model-len {tokens} for {model.name}: {format_size(room)} are left for its requests"
        yield Advice("length", text, (model.name,), tokens)


def _longest(model: Model, room: int) -> int:
    """The longest request that fits in `room` bytes, in whole blocks; 0 if none does."""
    low, high = 0, model.length // model.shape.block_tokens
    while low < high:
        middle = (low + high + 1) // 2
        blocks = model.shape.blocks_of(middle * model.shape.block_tokens) + 1
        low, high = (middle, high) if model.bytes_of(blocks) <= room else (low, middle - 1)
    return low * model.shape.block_tokens

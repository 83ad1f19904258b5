"""What differs between the releases of SGLang that are managed, as a type; releases.py has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from elastickv.engines.seams import Seam

__all__ = ["Hook", "Release"]


class Hook(NamedTuple):
    """A function for SGLang's hook registry: the dotted name that it is put on, and how (hook_registry.HookType)."""

    target: str
    call: Callable[..., Any]
    kind: Literal["around", "after", "before"]


@dataclass(frozen=True)
class Release:
    """One release, or several that are alike. Making one imports no SGLang.

    `lowest` is managed, and everything from there to `below`, which is not. `versions`: that, for people. `strided`: by
    kind of pool, the attention backends that take rows with a stride. `backends`: the names of those that will read the
    pool. `device`: the type of device that the engine runs on. `idle`: whether a scheduler has nothing to do, or holds
    back what waits because it was paused. These are asked in the scheduler's process.
    """

    versions: str
    lowest: tuple[int, int, int]
    below: tuple[int, int, int]
    hooks: tuple[Hook, ...]
    seams: tuple[Seam, ...]
    strided: dict[str, frozenset[str]]
    backends: Callable[[], set[str]]
    device: Callable[[], str]
    idle: Callable[[Any], bool]

"""The places of an engine that a plug-in attaches to, and the check that they are what it was written against.

A seam is a function of a class or module, with the parameters that the plug-in relies on. A name that is gone or a
parameter that is renamed makes the plug-in refuse, rather than attach to something that is never called.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from elastickv.errors import EngineRefused

__all__ = ["Seam", "check", "find", "wrap"]


class Seam(NamedTuple):
    """Where (module, dotted name within it) and the parameters that must be there, in this order."""

    module: str
    name: str
    parameters: tuple[str, ...]


def check(engine: str, seams: Iterable[Seam]) -> None:
    """Refuses with every seam that is not as expected. `engine`: name and version, for the text."""
    wrong = [text for text in (_problem(seam) for seam in seams) if text]
    if wrong:
        raise EngineRefused(
            f"{engine} is not built as elastickv expects: {'; '.join(wrong)}; "
            f"use a version of {engine.partition(' ')[0]} that this elastickv names, or a newer elastickv"
        )


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces owner.name by make(owner.name), once: a second call finds the mark and changes nothing."""
    original = getattr(owner, name)
    if getattr(original, "_elastickv", False):
        return
    replaced = functools.wraps(original)(make(original))
    replaced._elastickv = True  # type: ignore[attr-defined]
    setattr(owner, name, replaced)


def find(seam: Seam) -> Any:
    """The function that the seam names; AttributeError or ImportError where there is none."""
    return functools.reduce(getattr, seam.name.split("."), importlib.import_module(seam.module))


def _problem(seam: Seam) -> str:
    where = f"{seam.module}.{seam.name}"
    try:
        found = find(seam)
    except (ImportError, AttributeError):
        return f"there is no {where}"
    have = tuple(inspect.signature(found).parameters)
    if have[: len(seam.parameters)] != seam.parameters:
        return f"{where} takes ({', '.join(have)}), expected ({', '.join(seam.parameters)}, ...)"
    return ""

"""A limit that moves while an engine works: ordered from inside its scheduler, every few steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Moves:
    """`limits` in bytes, in turn, one every `every` steps, for the tenant `name`; `ordered` counts them."""

    directory: str
    device: str
    name: str
    every: int
    limits: list[int | None]
    ordered: int = 0

    @classmethod
    def of(cls, asked: dict[str, Any] | None) -> Moves | None:
        return None if asked is None else cls(**asked)

    def before(self, step: int) -> None:
        """Called before each step that has requests."""
        if step % self.every == 0:
            from elastickv._core import Ledger

            limit = self.limits[self.ordered % len(self.limits)]
            Ledger.open(self.directory, self.device).order_limit(self.name, limit, False)
            self.ordered += 1

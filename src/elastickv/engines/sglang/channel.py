"""How the rank that decides tells the others, one way and in order.

The ranks of an engine run the same program on the same input, so they come to the same points in the same order. At
each such point the first one decides and tells; the others wait for what it says, with a deadline. It waits for nobody.
What does not fit together ends the engine: ranks that have come apart must not go on.
"""

from __future__ import annotations

from typing import TypeVar

from elastickv.errors import IntegrityError

__all__ = ["Channel"]

_Told = TypeVar("_Told")


class Channel:
    """Of an engine with one rank: there is nobody to tell."""

    def tell(self, kind: str, decision: object) -> None:
        """Of the rank that decides: passes on a decision of some kind. Returns at once."""

    def hear(self, kind: str, told: type[_Told]) -> _Told:
        """Of the others: the next decision, which must be of that kind."""
        raise IntegrityError(f"the only rank of an engine waits for a decision ({kind}) of another; please report this")

    def close(self) -> None:
        """Nobody tells or hears any more; may be called twice."""

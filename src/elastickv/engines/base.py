"""What every engine adapter answers before an engine is started."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Adapter"]


class Adapter(Protocol):
    """One engine. The methods look and change nothing; they may import the engine."""

    name: str
    """The engine's name, as in NAMES."""
    versions: str
    """The versions that are managed, for people: ">=0.32,<0.34"."""

    def installed_version(self) -> str | None:
        """The version installed in this interpreter, or None. Imports nothing."""
        ...

    def problems(self) -> list[str]:
        """Why the plug-in would refuse to start here, one text a reason; empty when it would not."""
        ...

    def environment(self) -> dict[str, str]:
        """Variables that a process of this engine needs, besides Settings.environment() and over this process's own."""
        ...

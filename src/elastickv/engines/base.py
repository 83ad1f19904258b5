"""What every engine adapter answers before an engine is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Adapter", "Server"]


@dataclass(frozen=True)
class Server:
    """How an engine's own OpenAI server is started, and how it is told to sleep. Paths are of its HTTP address."""

    module: str
    """Of this interpreter: python -m MODULE."""
    model_option: str
    name_option: str
    sleep_arguments: tuple[str, ...]
    """What it must be started with, to be able to sleep later."""
    environment: tuple[tuple[str, str], ...]
    sleep: str
    """POST: puts it to sleep, its weights into host memory."""
    wake: str
    """POST: wakes it."""
    asleep: str
    """GET: JSON with `is_sleeping`; "": it does not say."""
    health: str = "/health"

    def arguments(self, model: str, name: str, host: str, port: int) -> list[str]:
        """What follows the interpreter on its command line."""
        place = ["--host", host, "--port", str(port)]
        served = [self.model_option, model, self.name_option, name]
        return ["-m", self.module, *served, *place, *self.sleep_arguments]


class Adapter(Protocol):
    """One engine. The methods look and change nothing; they may import the engine."""

    name: str
    """The engine's name, as in NAMES."""
    versions: str
    """The versions that are managed, for people: ">=0.32,<0.34"."""
    server: Server
    """Its OpenAI server."""

    def installed_version(self) -> str | None:
        """The version installed in this interpreter, or None. Imports nothing."""
        ...

    def problems(self) -> list[str]:
        """Why the plug-in would refuse to start here, one text a reason; empty when it would not."""
        ...

    def environment(self) -> dict[str, str]:
        """Variables that a process of this engine needs, besides Settings.environment() and over this process's own."""
        ...

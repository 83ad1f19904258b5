"""The engines that elastickv can manage. Importing this package imports no engine."""

from __future__ import annotations

import importlib
from typing import Final

from elastickv.config import Settings, process_environment
from elastickv.engines.base import Adapter, Server
from elastickv.errors import NotFound

__all__ = ["NAMES", "Adapter", "Server", "adapter", "managed_environment"]

_MODULES: Final = {
    "vllm": "elastickv.engines.vllm.adapter",
    "sglang": "elastickv.engines.sglang.adapter",
}

NAMES: Final = tuple(_MODULES)


def adapter(name: str) -> Adapter:
    """The adapter of one engine, imported now. NotFound names the engines there are."""
    if name not in _MODULES:
        raise NotFound(f"there is no adapter for the engine {name!r}; there are: {', '.join(NAMES)}", name=name)
    found: Adapter = importlib.import_module(_MODULES[name]).ADAPTER
    return found


def managed_environment(settings: Settings) -> dict[str, str]:
    """What an engine is started with so that it is managed as `settings` say, whichever it turns out to be."""
    engines: dict[str, str] = {}
    for name in NAMES:
        engines |= adapter(name).environment()
    return process_environment() | engines | settings.environment()

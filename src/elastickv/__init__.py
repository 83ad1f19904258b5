"""elastickv: KV caches whose addresses are reserved up front and whose memory is mapped only while tokens live in it.

Names are loaded when they are first used, so that importing the package costs nothing and needs no engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from elastickv.errors import ElasticKVError

if TYPE_CHECKING:
    from elastickv.fit import would_fit
    from elastickv.limits import set_limit
    from elastickv.memory import open_device

__all__ = ["ElasticKVError", "__version__", "open_device", "set_limit", "would_fit"]

_LAZY: Final = {
    "open_device": "elastickv.memory",
    "set_limit": "elastickv.limits",
    "would_fit": "elastickv.fit",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("elastickv")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'elastickv' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)

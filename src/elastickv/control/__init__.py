"""The control socket: what an orchestrator asks of a machine's ledgers, as JSON lines over a private Unix socket.

`ControlServer` serves it, in the event loop of whoever starts it; `Client` speaks it. Names are loaded when they are
first used. The protocol is on a page of its own, docs/control.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from elastickv.control.client import Client
    from elastickv.control.server import ControlServer

__all__ = ["Client", "ControlServer"]

_LAZY: Final = {"Client": "elastickv.control.client", "ControlServer": "elastickv.control.server"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'elastickv.control' has no attribute {name!r}; it has {', '.join(__all__)}")

"""The operator of the chaos run: orders limits and trims, reads, forgets, and may be killed over it like anybody."""

from __future__ import annotations

import signal
import time
from multiprocessing.connection import Connection

from chaos import sockets
from elastickv import _core
from elastickv.errors import ElasticKVError
from elastickv.ledger import order_limit, read_device

ANSWERS = {"NotFound", "DeadlineExceeded", "InvalidArgument", "AlreadyExists", "AccessDenied"}
"""What an operator may be told: the tenant died, is stopped, has a higher floor, lives, or the file is closed to us."""


def act(directory: str, kind: str, name: str, size: int | None) -> str:
    """One order; "ok", or the name of the error that answered it."""
    try:
        ledger = _core.Ledger.open(directory, "host")
        if kind == "limit":
            order_limit(ledger, name, size, 1000)
        elif kind == "trim":
            revision = ledger.order_trim(name, size or 0)
            ledger.wait_trim(name, revision, 1000)
        elif kind == "forget":
            ledger.forget(name)
        else:
            read_device(ledger)
    except ElasticKVError as error:
        known = type(error).__name__
        return known if known in ANSWERS else f"unexpected {known}: {error}"
    return "ok"


def main(directory: str, pipe: Connection) -> None:
    """Takes ("do", kind, name, size) and ("fault", point, action, after); answers ("answer", kind, outcome, s)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            command, *values = pipe.recv()
            if command == "fault":
                _core.set_fault(*values)
                continue
            kind, name, size = values
            if kind.startswith("socket"):
                outcome, took = sockets.ask(directory, kind, name, size)
            else:
                began = time.monotonic()
                outcome, took = act(directory, kind, name, size), time.monotonic() - began
            pipe.send(("answer", kind, name, outcome, took))
    except (BrokenPipeError, EOFError):
        return  # the conductor is gone

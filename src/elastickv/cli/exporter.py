"""`elastickv exporter`: the ledgers' metrics for Prometheus."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from elastickv.cli import options as opt
from elastickv.config import Settings
from elastickv.errors import NotFound
from elastickv.telemetry import LedgerCollector, MetricsServer

__all__ = ["exporter"]


def exporter(
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 9777,
    directory: opt.Directory = None,
) -> None:
    """Serve the metrics of every ledger to Prometheus, until SIGTERM or Ctrl-C.

    Ledgers that appear later are served as well.
    """
    settings = Settings.load(options={"directory": directory})
    if not settings.directory.is_dir():
        raise NotFound(
            f"there is no ledger directory {settings.directory}; start an engine with `elastickv run`, "
            "or name another directory with --dir",
            directory=str(settings.directory),
        )
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server = MetricsServer(LedgerCollector(settings.directory), host, port)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving http://{shown}:{server.port}/metrics of the ledgers in {settings.directory}", flush=True)
    ended.wait()
    server.close()

"""elastickv's metrics on an engine's own /metrics page.

A collector that reads the ledgers is put into the registry that the page shows. It shows this engine's tenant and the
devices it is on; `elastickv exporter` shows everybody. Where several processes write common files, the page makes a
registry of these (MultiProcessCollector), at its start or at each scrape.

The page is the engine's. Whatever fails here is logged and shows as elastickv_up 0; it never takes the page away.

prometheus_client looks at its environment when it is imported, so this must not be before the engine has set that up.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from elastickv.config import Settings
from elastickv.engines import seams
from elastickv.ledger import TenantView
from elastickv.telemetry import LedgerCollector

__all__ = ["EngineCollector", "of_common_files", "register"]

_MARK: Final = "_elastickv_metrics"


def of_common_files(settings: Settings, logger: logging.Logger) -> None:
    """Has every registry that is made of common files in this process show elastickv's metrics too."""
    seams.wrap(MultiProcessCollector, "__init__", lambda original: _common_files(original, settings, logger))


def _common_files(original: Callable[..., Any], settings: Settings, logger: logging.Logger) -> Callable[..., Any]:
    def wrapped(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
        original(self, registry, *args, **kwargs)
        register(registry, settings, logger)

    return wrapped


def register(registry: CollectorRegistry | None, settings: Settings, logger: logging.Logger) -> None:
    """Puts the collector into a registry, once. Raises nothing."""
    try:
        if registry is not None and not getattr(registry, _MARK, False):
            registry.register(EngineCollector(settings, logger))
            setattr(registry, _MARK, True)
    except Exception:  # the border to the engine, whose page this is
        logger.exception("the engine's /metrics is without elastickv's metrics")


class EngineCollector(Collector):
    """A LedgerCollector of one engine that never raises."""

    def __init__(self, settings: Settings, logger: logging.Logger) -> None:
        self._logger = logger
        name, pid = settings.name, os.getpid()

        def ours(tenant: TenantView) -> bool:
            if name is not None:
                return tenant.name == name
            return tenant.alive and _descends(tenant.pid, pid)  # its name was made by a process that this one started

        self._collector = LedgerCollector(settings.directory, ours)

    def describe(self) -> Iterable[Metric]:
        return self._collector.describe()

    def collect(self) -> Iterator[Metric]:
        try:
            families = list(self._collector.collect())
        except Exception:  # the border to the engine, whose page this is
            self._logger.exception("the ledgers cannot be read for /metrics")
            families = [GaugeMetricFamily("elastickv_up", "0: the ledgers could not be read.", value=0)]
        yield from families


def _descends(pid: int, ancestor: int) -> bool:
    """Whether the process is `ancestor` or was started by it or by one that it started."""
    while pid > 1 and pid != ancestor:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has gone
            return False
        pid = int(stat.rpartition(")")[2].split()[1])
    return pid == ancestor

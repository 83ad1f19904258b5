"""elastickv's metrics on the engine's own /metrics page.

vLLM's API server asks get_prometheus_registry() for what it shows, which is the process's own registry. With several
API servers the page makes a registry of their common files at each scrape (MultiProcessCollector). A collector that
reads the ledger is put into either, so that every API server shows the same. It shows this engine's tenant and the
devices it is on; `elastickv exporter` shows everybody.

The page is vLLM's. Whatever fails here is logged and shows as elastickv_up 0; it never takes the page away.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from elastickv.config import Settings
from elastickv.engines.vllm import seams
from elastickv.ledger import TenantView
from elastickv.telemetry import LedgerCollector

__all__ = ["hook"]

_PAGE: Final = "vllm.entrypoints.serve.instrumentator.metrics"
_MARK: Final = "_elastickv_metrics"
_logger = logging.getLogger("vllm.elastickv.metrics")


def hook(settings: Settings) -> None:
    """Has every registry that vLLM makes for its page show elastickv's metrics as well. Raises nothing."""
    name = "get_prometheus_registry"
    try:
        from vllm.v1.metrics import prometheus

        seams.wrap(prometheus, name, lambda original: _registry(original, settings))
        seams.wrap(MultiProcessCollector, "__init__", lambda original: _common_files(original, settings))
    except (ImportError, AttributeError) as error:
        _logger.warning("this vLLM's /metrics goes without elastickv's (%s); use `elastickv exporter`", error)
        return
    if _PAGE in sys.modules:  # it has the function under a name of its own already
        setattr(sys.modules[_PAGE], name, getattr(prometheus, name))


def _registry(original: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        registry = original(*args, **kwargs)
        _register(registry, settings)
        return registry

    return wrapped


def _common_files(original: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    def wrapped(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
        original(self, registry, *args, **kwargs)
        _register(registry, settings)

    return wrapped


def _register(registry: CollectorRegistry | None, settings: Settings) -> None:
    try:
        if registry is not None and not getattr(registry, _MARK, False):
            registry.register(_EngineCollector(settings))
            setattr(registry, _MARK, True)
    except Exception:  # the border to vLLM, whose page this is
        _logger.exception("the engine's /metrics is without elastickv's metrics")


class _EngineCollector(Collector):
    """A LedgerCollector of one engine that never raises."""

    def __init__(self, settings: Settings) -> None:
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
        except Exception:  # the border to vLLM, whose page this is
            _logger.exception("the ledgers cannot be read for /metrics")
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

"""Metrics: what stands in the ledgers, in Prometheus' terms.

`catalogue` names every metric, `collector` reads the ledgers at each scrape and fills them in, `server` answers.
Nothing is kept between scrapes.
"""

from elastickv.telemetry.catalogue import METRICS, Metric
from elastickv.telemetry.collector import LedgerCollector
from elastickv.telemetry.server import MetricsServer

__all__ = ["METRICS", "LedgerCollector", "Metric", "MetricsServer"]

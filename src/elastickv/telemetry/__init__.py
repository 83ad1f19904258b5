"""Metrics: what stands in the ledgers, in Prometheus' terms.

`catalogue` names every metric, `reader` reads the ledgers, `collector` fills the metrics in at each scrape, `server`
answers.
Nothing is kept between scrapes.
"""

from elastickv.telemetry.catalogue import METRICS, Metric
from elastickv.telemetry.collector import LedgerCollector
from elastickv.telemetry.server import MetricsServer

__all__ = ["METRICS", "LedgerCollector", "Metric", "MetricsServer"]

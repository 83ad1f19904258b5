"""/metrics: every metric of the catalogue, those of the ledgers beside them, and the table of the docs."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from elastickv import _core
from elastickv.gateway.catalogue import GATEWAY_METRICS
from elastickv.gateway.metrics import MetricsPage
from elastickv.gateway.states import State
from elastickv.gateway.stats import Stats
from elastickv.telemetry import METRICS
from gateway.views import model_view
from support import WATCHING_PAGE, metrics_table, table_of

MIB = 1 << 20


def busy() -> Stats:
    stats = Stats()
    stats.arrived("chat", 12)
    stats.first_byte("chat", 0.02)
    stats.produced("chat", 3)
    stats.finished("chat", 0.5, 3, 200, decode_s=0.04)
    return stats


def test_every_metric_is_there_with_its_labels_and_its_text(directory: Path) -> None:
    ledger = _core.Ledger.open(str(directory), "host", 64 * MIB)
    tenant = ledger.join("chat")
    views = [model_view("chat", queued=2, outstanding=3), model_view("code", State.ASLEEP)]
    text, kind = MetricsPage(directory, busy()).render(views, "")
    assert kind.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(text.decode())}
    for metric in GATEWAY_METRICS:
        found = families[metric.name]
        assert (found.type, found.documentation) == (metric.kind, metric.text)
        assert all(set(sample.labels) - {"le"} == set(metric.labels) for sample in found.samples)
        assert found.samples
        assert re.fullmatch(r"elastickv_gateway_[a-z_]+", metric.name)
    assert families.keys() >= {metric.name for metric in METRICS}
    values = {(s.name, tuple(s.labels.values())): s.value for family in families.values() for s in family.samples}
    assert values["elastickv_gateway_waiting", ("chat",)] == 2
    assert values["elastickv_gateway_running", ("chat",)] == 3
    assert values["elastickv_gateway_replicas_ready", ("code",)] == 0
    assert values["elastickv_gateway_state", ("code", "asleep")] == 1
    assert values["elastickv_gateway_state", ("code", "ready")] == 0
    assert values["elastickv_gateway_requests_total", ("200", "chat")] == 1
    assert values["elastickv_gateway_output_tokens_total", ("chat",)] == 3
    assert values["elastickv_gateway_tpot_seconds_sum", ("chat",)] == 0.02
    assert values["elastickv_alive", ("host", "chat")] == 1
    tenant.close()


def test_openmetrics_where_it_is_asked_for(directory: Path) -> None:
    text, kind = MetricsPage(directory, busy()).render([model_view("chat")], "application/openmetrics-text")
    assert kind.startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(text.decode())}
    assert {"elastickv_gateway_requests", "elastickv_gateway_state", "elastickv_up"} <= names


def test_names_are_told_apart_once() -> None:
    names = [metric.name for metric in (*METRICS, *GATEWAY_METRICS)]
    assert len(names) == len(set(names))


def test_the_docs_list_every_metric() -> None:
    """`scripts/docs` writes it."""
    assert table_of(WATCHING_PAGE) == metrics_table(GATEWAY_METRICS)

"""The Grafana dashboard: what it asks for is what is exported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from elastickv.telemetry import METRICS

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parent.parent / "dashboards/elastickv.json").read_text(encoding="utf-8")
)
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
KNOWN = {metric.exposed: metric for metric in METRICS}


def metric_of(name: str) -> str:
    """The catalogue's name for a name in a query."""
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    return base if base in KNOWN and KNOWN[base].kind == "histogram" else name


def test_every_query_names_metrics_that_are_exported() -> None:
    named = {metric_of(name) for query in QUERIES for name in re.findall(r"\belastickv_\w+", query)}
    assert len(named) > 20
    assert named - set(KNOWN) == set()
    asked = {metric_of(name) for v in VARIABLES.values() for name in re.findall(r"\belastickv_\w+", str(v["query"]))}
    assert asked - set(KNOWN) == set()


def test_every_query_selects_by_labels_that_its_metrics_have() -> None:
    for query in QUERIES:
        selected = re.findall(r"\b(elastickv_\w+)\{([^}]*)\}", query)
        assert len(selected) == len(re.findall(r"\belastickv_\w+", query)), query  # none without a choice of labels
        for name, matchers in selected:
            labels = set(re.findall(r"(\w+)=~?\"", matchers))
            assert labels <= {*KNOWN[metric_of(name)].labels, "job"}, query
            assert "job" in labels, query
        for group in re.findall(r"by \(([^)]*)\)", query):
            of_all = set.union(*(set(KNOWN[metric_of(name)].labels) for name, _ in selected)) | {"le"}
            assert set(re.split(r",\s*", group)) <= of_all, query
        for variable in re.findall(r"\$(\w+)", query):
            assert variable in VARIABLES or variable == "__rate_interval", query


def test_quantiles_are_of_rates_of_buckets_and_rates_are_of_counters() -> None:
    for query in QUERIES:
        rated = re.findall(r"rate\((elastickv_\w+)", query)
        assert all(name.endswith(("_total", "_bucket")) for name in rated), query
        assert ("histogram_quantile" in query) == ("_bucket" in query), query
        for name in re.findall(r"\belastickv_\w+", query):
            assert name in rated or not name.endswith(("_total", "_bucket")), query


def test_the_panels_that_an_operator_needs_are_there() -> None:
    everything = " ".join(QUERIES)
    for name in (
        "leased_bytes", "static_reserved_bytes", "device_capacity_bytes", "limit_wanted_bytes", "limit_held_bytes",
        "demand_bytes", "evicted_blocks_total", "give_backs_asked_total", "give_backs_answered_total",
        "give_backs_late_total", "lease_wait_seconds_bucket", "map_seconds_bucket", "unmap_seconds_bucket",
    ):  # fmt: skip
        assert f"elastickv_{name}{{" in everything, name
    (memory,) = [panel for panel in PANELS if panel["title"] == "Device memory by tenant"]
    assert memory["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"


def test_grafana_can_load_it() -> None:
    assert DASHBOARD["uid"] == "elastickv"
    assert DASHBOARD["schemaVersion"] >= 39
    assert "id" not in DASHBOARD  # given by the server that loads it
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & cells, panel["title"]
        cells |= mine
    for panel in PANELS:
        assert panel["targets"], panel["title"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters))
    assert VARIABLES["datasource"]["type"] == "datasource"

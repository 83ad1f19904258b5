"""Metrics: the collector on real ledgers, the exporter as a process, the page of the docs."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from elastickv import _core
from elastickv.telemetry import METRICS, LedgerCollector
from support import METRICS_PAGE, Outcome, metrics_table, table_of

MIB = 1 << 20
CAPACITY = 64 * MIB
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Values:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(directory: Path, **options: Any) -> Values:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(LedgerCollector(directory, **options))
    return parse(generate_latest(registry).decode())


def value(values: Values, name: str, **labels: str) -> float:
    return values[f"elastickv_{name}", frozenset(labels.items())]


def names_of(values: Values, **labels: str) -> set[str]:
    """Names of the samples that have these labels, among others."""
    return {name for name, have in values if set(labels.items()) <= have}


@pytest.fixture
def ledger(directory: Path) -> _core.Ledger:
    return _core.Ledger.open(str(directory), "host", CAPACITY)


def test_every_figure_of_a_tenant(directory: Path, ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat", floor=MIB, limit=32 * MIB, weight=3, priority=-1, engine='vllm "1"\n', layout="flat")
    other = ledger.join("other")
    assert tenant.lease(4 * MIB)
    assert tenant.lease_static(8 * MIB)
    tenant.publish_static_used(2 * MIB)
    tenant.add_mapped(3 * MIB)
    tenant.publish(
        virtual_bytes=9 * MIB,
        used=MIB,
        cached=2 * MIB,
        mapped_free=5,
        transit=7,
        misses=11,
        evicted_need=1,
        evicted_neighbour=2,
        evicted_limit=3,
        evicted_idle=4,
        evicted_budget=5,
    )
    ledger.order_limit("chat", 16 * MIB)
    ledger.order_trim("chat", 6 * MIB)
    ledger.set_unmanaged(10 * MIB)
    assert not other.lease(43 * MIB, True)
    values = scrape(directory)
    labels = {"device": "host", "tenant": "chat"}
    expected = {
        "alive": 1, "virtual_bytes": 9 * MIB, "leased_bytes": 4 * MIB, "static_reserved_bytes": 8 * MIB,
        "static_used_bytes": 2 * MIB, "mapped_bytes": 3 * MIB, "used_bytes": MIB, "cached_bytes": 2 * MIB,
        "mapped_free_bytes": 5, "transit_bytes": 7, "floor_bytes": MIB, "limit_wanted_bytes": 16 * MIB,
        "limit_held_bytes": 32 * MIB, "limit_agreed": 0, "trim_wanted_bytes": 6 * MIB, "weight": 3, "priority": -1,
        "demand_bytes": 0, "lease_misses_total": 11, "give_backs_asked_total": 1, "give_backs_answered_total": 0,
        "give_backs_late_total": 0,
    }  # fmt: skip
    assert {name: value(values, name, **labels) for name in expected} == expected
    causes = ("need", "neighbour", "limit", "idle", "budget")
    assert [value(values, "evicted_blocks_total", cause=cause, **labels) for cause in causes] == [1, 2, 3, 4, 5]
    (info,) = [dict(have) for name, have in values if name == "elastickv_info" and labels.items() <= have]
    assert (info["engine"], info["layout"], info["pid"].isdecimal()) == ('vllm "1"\n', "flat", True)
    assert value(values, "demand_bytes", device="host", tenant="other") == 43 * MIB
    assert value(values, "demand_age_seconds", device="host", tenant="other") >= 0
    assert "elastickv_limit_wanted_bytes" not in names_of(values, tenant="other")
    device = {name: value(values, f"device_{name}_bytes", device="host") for name in ("capacity", "unmanaged", "free")}
    assert device == {"capacity": CAPACITY, "unmanaged": 10 * MIB, "free": 42 * MIB}
    tenant.acknowledge_limit(*tenant.limit_wanted)
    assert value(scrape(directory), "limit_agreed", **labels) == 1


def test_histograms_are_cumulative_and_in_seconds(directory: Path, ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat")
    for micros in (5, 10, 15, 400_000, 3_000_000):
        tenant.observe("map", micros * 1000)
    values = scrape(directory)
    labels = {"device": "host", "tenant": "chat"}
    buckets = {dict(have)["le"]: n for (name, have), n in values.items() if name == "elastickv_map_seconds_bucket"}
    assert len(buckets) == 17
    assert (buckets["1e-05"], buckets["2e-05"], buckets["0.2"], buckets["0.5"]) == (2, 3, 3, 4)
    assert (buckets["1.0"], buckets["+Inf"]) == (4, 5)
    assert sorted(buckets.values()) == [buckets[le] for le in sorted(buckets, key=float)]
    assert value(values, "map_seconds_count", **labels) == 5
    assert value(values, "map_seconds_sum", **labels) == pytest.approx(3.40003)
    assert value(values, "lease_wait_seconds_count", **labels) == 0


def test_a_name_that_does_not_run_keeps_its_limit_only(directory: Path, ledger: _core.Ledger) -> None:
    tenant = ledger.join("gone", limit=32 * MIB)
    assert tenant.lease(MIB)
    tenant.close()
    assert names_of(scrape(directory), tenant="gone") == {"elastickv_alive", "elastickv_limit_wanted_bytes"}
    ledger.order_limit("gone", None)
    assert names_of(scrape(directory), tenant="gone") == {"elastickv_alive"}
    again = ledger.join("gone")
    assert value(scrape(directory), "alive", device="host", tenant="gone") == 1
    again.close()


def test_everything_that_is_exported_is_in_the_catalogue_and_can_be_read(directory: Path, ledger: _core.Ledger) -> None:
    tenant = ledger.join("chat", limit=MIB)
    registry = CollectorRegistry(auto_describe=True)
    registry.register(LedgerCollector(directory))
    text = generate_latest(registry).decode()
    sampled = {family.name for family in text_string_to_metric_families(text) if family.samples}
    assert sampled == {metric.name for metric in METRICS}
    for metric in METRICS:
        assert re.fullmatch(r"elastickv_[a-z_]+", metric.name)
        assert not metric.name.endswith("_total")
        (found,) = [family for family in text_string_to_metric_families(text) if family.name == metric.name]
        assert (found.type, found.documentation) == (metric.kind, metric.text)
        for sample in found.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
    assert openmetrics(registry).decode().endswith("# EOF\n")
    tenant.close()


def test_an_unreadable_ledger_hides_no_other(directory: Path, ledger: _core.Ledger, caplog: Any) -> None:
    tenant = ledger.join("chat")
    broken = directory / "GPU-broken.ledger"
    broken.write_bytes(b"x" * 4096)
    broken.chmod(0o600)
    for _ in range(3):
        values = scrape(directory)
        assert value(values, "ledger_up", device="GPU-broken") == 0
        assert value(values, "ledger_up", device="host") == 1
        assert value(values, "alive", device="host", tenant="chat") == 1
        assert names_of(values, device="GPU-broken") == {"elastickv_ledger_up"}
    collector = LedgerCollector(directory)
    caplog.clear()
    list(collector.collect())
    list(collector.collect())
    assert len(caplog.records) == 1  # told once, not at each scrape
    assert "no metrics of device GPU-broken" in caplog.text
    tenant.close()


def test_a_choice_of_tenants_shows_their_devices_only(directory: Path, ledger: _core.Ledger) -> None:
    mine, other = ledger.join("mine"), ledger.join("other")
    elsewhere = _core.Ledger.open(str(directory), "GPU-1", CAPACITY).join("other")
    values = scrape(directory, select=lambda tenant: tenant.name == "mine")
    assert names_of(values, tenant="other") == set()
    assert names_of(values, device="GPU-1") == set()
    assert value(values, "device_capacity_bytes", device="host") == CAPACITY
    assert value(values, "alive", device="host", tenant="mine") == 1
    for tenant in (mine, other, elsewhere):
        tenant.close()


def test_without_a_directory_the_collector_says_so(directory: Path) -> None:
    assert scrape(directory) == {("elastickv_up", frozenset()): 0}
    assert not directory.exists()


def test_the_page_lists_every_metric() -> None:
    """`scripts/docs` writes it."""
    assert table_of(METRICS_PAGE) == metrics_table()


def test_the_page_names_only_metrics_that_exist() -> None:
    known = {metric.exposed for metric in METRICS}
    named = set(re.findall(r"\belastickv_[a-z_]+", METRICS_PAGE.read_text(encoding="utf-8")))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} - known == set()


@contextmanager
def running_exporter(directory: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "elastickv.cli", "exporter", "--dir", str(directory), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"serving (http://127\.0\.0\.1:\d+/metrics) of the ledgers in (.*)\n", line)
            assert found, line + (process.communicate(timeout=20)[1] if not line else "")
            assert found[2] == str(directory)
            yield process, found[1]
        finally:
            process.kill()


def get(url: str) -> Values:
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        return parse(answer.read().decode())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_exporter_serves_ledgers_that_appear_later_until_a_signal(directory: Path, number: signal.Signals) -> None:
    directory.mkdir(mode=0o700)
    with running_exporter(directory) as (process, url):
        assert get(url) == {("elastickv_up", frozenset()): 1}
        silent = socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), 20)
        tenant = _core.Ledger.open(str(directory), "host", CAPACITY).join("late")
        assert value(get(url), "alive", device="host", tenant="late") == 1
        tenant.close()
        assert value(get(url), "alive", device="host", tenant="late") == 0
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        silent.close()
    assert (process.returncode, out, err) == (0, "", "")


def test_the_exporter_says_why_it_cannot_start(cli: Callable[..., Outcome], directory: Path) -> None:
    outcome = cli("exporter", "--dir", directory)
    assert outcome.code == 3
    assert outcome.err.startswith(f"error: there is no ledger directory {directory}; start an engine with")
    directory.mkdir(mode=0o700)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = cli("exporter", "--dir", directory, "--port", port)
    assert outcome == Outcome(
        4, "", f"error: cannot listen on 127.0.0.1 port {port}: Address already in use; choose another with --port\n"
    )
    outcome = cli("exporter", "--dir", directory, "--host", "192.0.2.1", "--port", "0")  # RFC 5737: nobody's address
    assert outcome.code == 2
    assert outcome.err.endswith("give an address of this machine with --host\n")
    assert cli("exporter", "--port", "70000").code == 2

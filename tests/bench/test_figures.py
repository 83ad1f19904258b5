"""Figures, arrival times, result files and their comparison: without any engine."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import page
from benchmarks.common import options, schedule
from benchmarks.common.load import Load, Outcome
from benchmarks.common.result import FIELDS, ROOT, Result, Row, Target, read
from benchmarks.common.schedule import Shape
from benchmarks.common.stats import paired_ratio, percentile, ratio, summary
from benchmarks.engine.start import said

COMPARE = ROOT / "benchmarks/compare.py"


def test_percentiles_are_those_of_a_straight_line_between_ranks() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(values, p) for p in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert percentile(values, 99) == pytest.approx(3.97)
    assert percentile([7.0], 99) == 7.0


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=60), st.floats(0, 100))
def test_a_percentile_lies_between_the_ends_and_agrees_with_numpy(values: list[float], percent: float) -> None:
    numpy = pytest.importorskip("numpy")
    found = percentile(values, percent)
    assert min(values) <= found <= max(values)
    assert found == pytest.approx(float(numpy.percentile(values, percent)), abs=1e-6)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_a_percentile_of_nothing_or_beyond_the_ends_is_refused(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile(values, percent)


def test_a_failed_request_weighs_on_every_figure_from_its_rank_on() -> None:
    values = [*([1.0] * 98), math.inf, math.inf]
    assert percentile(values, 50) == 1.0
    assert math.isinf(percentile(values, 99))
    assert math.isinf(summary(values)["mean"])
    assert summary([]) == {}


def test_ratios_of_nothing_are_nothing() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(0.0, 2.0) == 0.0
    assert ratio(2.0, 0.0) == math.inf
    assert ratio(2.0, math.inf) == 0.0
    assert [ratio(a, b) for a, b in ((None, 1.0), (1.0, None), (0.0, 0.0), (math.inf, math.inf))] == [None] * 4


def test_a_slow_moment_of_the_machine_does_not_move_the_ratio_of_pairs() -> None:
    """Both sides of the second pair were measured while it was three times slower."""
    assert paired_ratio([1.1, 3.3, 1.1], [1.0, 3.0, 1.0]) == pytest.approx(1.1)
    assert paired_ratio([], []) is None


def test_a_ramp_goes_up_to_its_peak_and_down_by_one_a_second() -> None:
    arrivals = schedule.ramp(4, start=10.0)
    assert arrivals == sorted(arrivals)
    assert len(arrivals) == 16  # a ramp up to p has p * p requests
    per_second = [sum(10 + s <= at < 11 + s for at in arrivals) for s in range(7)]
    assert per_second == [1, 2, 3, 4, 3, 2, 1]
    assert schedule.ramp(3, step=0.5)[-1] == pytest.approx(2.0)
    assert schedule.ramp(1) == [0.0]
    with pytest.raises(ValueError, match="a ramp up to 0"):
        schedule.ramp(0)


def test_poisson_arrivals_are_the_same_for_a_seed_and_have_the_rate() -> None:
    arrivals = schedule.poisson(20.0, 4000, seed=3)
    assert arrivals == schedule.poisson(20.0, 4000, seed=3)
    assert arrivals != schedule.poisson(20.0, 4000, seed=4)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(200.0, rel=0.1)
    gaps = [b - a for a, b in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation / mean == pytest.approx(1.0, abs=0.1)  # of an exponential distribution
    with pytest.raises(ValueError, match="rate"):
        schedule.poisson(0.0, 1, seed=0)


def test_sides_take_turns_first() -> None:
    assert schedule.alternate(3, ("A", "B")) == ["A", "B", "B", "A", "A", "B"]


def test_prompts_share_no_prefix_and_repeat_with_the_seed() -> None:
    prompts = schedule.prompts(50, 16, 256, seed=1)
    assert prompts == schedule.prompts(50, 16, 256, seed=1)
    assert len({tuple(one[:4]) for one in prompts}) == 50
    assert all(2 <= token < 256 for one in prompts for token in one)


def test_variables_on_a_command_line() -> None:
    assert options.variables("") == {}
    assert options.variables("A=1,B=two=2") == {"A": "1", "B": "two=2"}


@pytest.mark.parametrize("text", ["A", "A=1,B", "=1", "A="])
def test_a_variable_without_a_name_or_a_value_is_refused(text: str) -> None:
    with pytest.raises(SystemExit, match="without a value; write NAME=VALUE"):
        options.variables(text)


@pytest.mark.parametrize("text", ["512", "512+", "+1", "a+b", "0+1", "512+0", "5 + 1"])
def test_a_bad_shape_is_refused(text: str) -> None:
    assert Shape.parse("512+128") == (512, 128)
    with pytest.raises(ValueError, match="PROMPT"):
        Shape.parse(text)


def test_latency_counts_from_the_scheduled_arrival_and_a_failure_has_none() -> None:
    """The client sent the second one two seconds late; the third was cut off."""
    fine = Outcome("m", arrival=1.0, sent=1.0, first=1.5, last=3.5, tokens=[1, 2, 3])
    late = Outcome("m", arrival=1.0, sent=3.0, first=3.5, last=3.5, tokens=[1])
    cut = Outcome("m", arrival=1.0, sent=1.0, first=1.1, last=1.2, tokens=[1, 2], error="cut off")
    load = Load([fine, late, cut], 4.0)
    assert load.ttft() == [0.5, 2.5, math.inf]
    assert load.tpot() == [1.0, 0.0, math.inf]
    assert load.failures == [cut]
    assert load.tokens_per_second == 1.0
    assert load.lag == 2.0
    samples = load.samples()
    assert samples["ttft"] == [0.5, 2.5, None]
    assert samples["errors"] == {"2": "cut off"}


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("r", "", 0.99, 1.0, Target("ratio", "least", 0.99)), True),
        (Row("r", "", 0.98, 1.0, Target("ratio", "least", 0.99)), False),
        (Row("r", "", 1.0, 1.0, Target("ratio", "most", 1.01), given_ratio=1.02), False),
        (Row("r", "", 8.0, 99.0, Target("with", "most", 8)), True),
        (Row("r", "", math.inf, 1.0, Target("ratio", "most", 1.1)), False),
        (Row("r", "", 1.0, math.inf, Target("ratio", "most", 1.1)), True),
        (Row("r", "", None, 1.0, Target("ratio", "most", 1.1)), False),
        (Row("r", "", 1.0, None, Target("ratio", "most", 1.1)), False),
        (Row("r", "", 1.0, 2.0, Target("ratio", "most", 1.1), spoilt=1), False),
        (Row("r", "", 1.0, 2.0), None),
    ],
)
def test_a_target_is_met_by_a_figure_that_is_there_and_by_no_other(row: Row, met: bool | None) -> None:
    assert row.met is met


def example(folder: Path, name: str = "engine/example", **changes: Any) -> Path:
    result = Result(name, "vllm", False, "host", {"seed": 0, "output": folder})
    result.rows = changes.get("rows") or [
        Row("throughput", "1/s", 95.0, 100.0, Target("ratio", "least", 0.99)),
        Row("TTFT", "ms", math.inf, 10.0, Target("ratio", "most", 1.01)),
        Row("idle", "MiB", 2.0, 1024.0, Target("with", "most", 8)),
    ]
    result.samples = {"rounds": [[1.0, 2.0, math.inf]]}
    result.fail("with", changes.get("failed", []))
    return result.write(folder)


def test_a_result_has_every_field_and_reads_back(tmp_path: Path) -> None:
    path = example(tmp_path, failed=["round 1: cut off"])
    report = read(path)
    assert tuple(report) == FIELDS
    assert json.loads(path.read_text(encoding="utf-8")) == report
    assert report["failures"] == {"with": 1, "without": 0}
    assert report["failed"] == ["with: round 1: cut off"]
    assert report["samples"] == {"rounds": [[1.0, 2.0, None]]}  # JSON has no infinity
    assert report["hardware"]["cores"] >= 1
    assert report["versions"]["python"].startswith("3.")
    assert [row["met"] for row in report["rows"]] == [False, False, True]


def test_a_client_that_was_late_is_said() -> None:
    result = Result("engine/example", "vllm", False, "host", {})
    prompt = Outcome("m", arrival=1.0, sent=1.001, first=1.5, last=3.5, tokens=[1, 2])
    late = Outcome("m", arrival=1.0, sent=1.25, first=1.5, last=3.5, error="cut off")
    result.account("with", "round 1", Load([prompt], 4.0))
    assert result.notes == []
    result.account("with", "round 2", Load([prompt, late], 4.0))
    assert len(result.notes) == 1
    assert "round 2: the load client was up to 250 ms late" in result.notes[0]
    assert result.failed == ["with: round 2: cut off"]


def compare(*paths: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(COMPARE), *map(str, paths)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def lines(text: str, what: str) -> list[str]:
    return [line for line in text.splitlines() if what in line]


def test_compare_tells_missed_from_met_and_shows_failures(tmp_path: Path) -> None:
    done = compare(example(tmp_path, failed=["round 1: cut off"]))
    assert done.returncode == 0, done.stderr
    (throughput,), (ttft,), (idle,) = (lines(done.stdout, what) for what in ("throughput", "TTFT", "idle"))
    assert "MISSED" in throughput
    assert "0.950" in throughput
    assert "ratio ≥ 0.99" in throughput
    assert "MISSED" in ttft
    assert "met" in idle
    assert "MISSED" not in idle
    assert "FAILED: 1 of elastickv" in done.stdout
    assert "round 1: cut off" in done.stdout


def test_compare_sets_two_results_side_by_side(tmp_path: Path) -> None:
    better = [Row("throughput", "1/s", 100.0, 100.0, Target("ratio", "least", 0.99)), Row("new", "", 1.0)]
    done = compare(example(tmp_path / "a"), example(tmp_path / "b", rows=better))
    assert done.returncode == 0, done.stderr
    (throughput,) = lines(done.stdout, "throughput")
    assert "1.053" in throughput  # 100 / 95
    assert throughput.index("MISSED") < throughput.index("met")
    assert lines(done.stdout, "idle")
    assert lines(done.stdout, "new")


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    one, other = example(tmp_path / "a"), example(tmp_path / "b", name="engine/other")
    done = compare(one, other)
    assert done.returncode == 2
    assert "engine/example" in done.stderr
    assert "engine/other" in done.stderr
    (tmp_path / "c.json").write_text('{"benchmark": "x"}', encoding="utf-8")
    assert "it has no engine" in compare(tmp_path / "c.json").stderr
    assert compare(tmp_path / "missing.json").returncode == 2


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").rglob("*.json")), ids=lambda path: path.stem)
def test_recorded_results_can_be_read(path: Path) -> None:
    assert read(path)["rows"]


def test_the_page_has_the_recorded_results() -> None:
    """scripts/docs writes them."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.BEGIN + page.tables() + page.END in text
    for path in (ROOT / "benchmarks/results").rglob("*.json"):
        assert f"../{path.relative_to(ROOT)}" in text


def test_what_an_engine_logged_is_timed_from_the_start_of_the_load(tmp_path: Path) -> None:
    log = tmp_path / "late.log"
    lines = ["INFO 12-31 23:59:58 [loader.py:1] weights", "no time at all", "[2026-01-01 00:00:03] graphs " + 500 * "x"]
    log.write_text("\n".join(lines))
    found = said(log, datetime(2025, 12, 31, 23, 59, 55, 500_000))
    assert found == [(2.5, lines[0]), (7.5, lines[2][:400])]

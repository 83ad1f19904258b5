"""The replay of a trace: how it is folded, and the whole of it at small size with a program in place of engines."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.result import ROOT, read
from benchmarks.gateway import replay

RUN_S = 300


def trace(path: Path, count: int = 120) -> Path:
    """27 models, of which the later ones are asked less often; those of the tail rest in the midst of it."""
    rng = random.Random(5)
    rows = ["arrived_at,model,prompt_tokens,output_tokens"]
    for number in range(count):
        rare = not count // 5 < number < 4 * count // 5 and number % 4 == 0
        name = rng.randrange(9, 27) if rare else rng.randrange(3) if rng.random() < 0.7 else rng.randrange(3, 9)
        rows.append(f"{number * 0.5:.3f},model-{name:02},{rng.randrange(1, 900)},{rng.randrange(1, 900)}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def chosen(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**(dict(replay.FULL) | changes))


def test_a_trace_is_folded_onto_three_models(tmp_path: Path) -> None:
    lines = replay.read_trace(trace(tmp_path / "trace.csv"))
    made = replay.folded(lines, chosen(requests=40, seconds=10.0))
    assert len(made) == 40
    assert {line.model for line in made} == set(replay.MODELS)
    arrivals = [line.arrival for line in made]
    assert arrivals == sorted(arrivals)
    assert (arrivals[0], arrivals[-1]) == (0.0, pytest.approx(10.0))
    assert all(1 <= line.prompt <= 384 and 4 <= line.answer <= 128 for line in made)
    counts = [sum(line.model == name for line in made) for name in replay.MODELS]
    assert counts == sorted(counts, reverse=True)
    assert len(replay.folded(lines, chosen(requests=10_000))) == len(lines)


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no such file"):
        replay.read_trace(tmp_path / "none.csv")


@pytest.mark.slow
def test_the_replay_loses_nothing_while_models_sleep_and_wake(tmp_path: Path) -> None:
    words = ["--small", "--trace", str(trace(tmp_path / "trace.csv")), "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gateway/replay.py"), *words],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = read(tmp_path / "replay.json")
    rows = {row["what"]: row for row in report["rows"]}
    assert report["failures"] == {"with": 0, "without": 0}, report["failed"]
    assert rows["requests sent"]["with"] == rows["requests sent"]["without"] == 60
    assert rows["requests not answered"]["met"]
    assert rows["times that a model went to sleep"]["with"] >= 1
    assert rows["times that a model was woken"]["with"] >= 1
    assert rows["times that a model went to sleep"]["without"] == 0
    assert rows["most memory held at any sample"]["met"]
    assert rows["most memory held at any sample"]["with"] > 0

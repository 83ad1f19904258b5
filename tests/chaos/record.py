"""`python -m chaos.record RUN.json…`: what runs of scripts/chaos wrote, in the form of a benchmark's result.

Writes benchmarks/results/cpu/chaos.json; benchmarks/page.py then puts them on the page.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.result import RESULTS, Result, Row, Target
from chaos.choices import MIB

NONE, SECOND = Target("with", "most", 0), Target("with", "most", 1)


def rows(run: dict[str, Any]) -> list[Row]:
    """What the run must show, and what it did."""
    kind = f"soak of {run['seconds'] / 60:.0f} min" if run["soak"] else f"{run['kills']} kills"
    mib = float(run["capacity"] / MIB)
    within = Target("with", "most", mib)
    counts = run["counts"]
    found = [
        Row(f"{kind}: violations", "", len(run["violations"]), target=NONE),
        Row(f"{kind}: most memory at any look, by the kernel", "MiB", run["peak_kernel"] / MIB, target=within),
        Row(f"{kind}: most leased", "MiB", run["peak_leased"] / MIB, target=within),
        Row(f"{kind}: leases still seen after their process's end", "s", run["worst_held"], target=SECOND),
        Row(f"{kind}: the same to the next look, which may be late", "s", run["worst_recovery"]),
        Row(f"{kind}: operations of tenants", "", counts["operations"]),
        Row(f"{kind}: blocks checked at {counts['quiet points']} quiet points", "", counts["blocks checked"]),
    ]
    for who, (first, last) in run.get("growth", {}).items():
        found += [
            Row(f"{kind}: {who}, {what} at the end less those at a fifth of the time", "", last[what] - first[what])
            for what in first
            if what != "anon"
        ]
        found.append(Row(f"{kind}: {who}, memory gained since then", "MiB", (last["anon"] - first["anon"]) / MIB))
    return found


def record(
    runs: Annotated[list[Path], typer.Argument(help="What `scripts/chaos --json` wrote.", show_default=False)],
    folder: Annotated[Path, typer.Option(help="Where chaos.json goes.")] = RESULTS / "cpu",
) -> None:
    """One result file from one or more runs."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in runs]
    result = Result("chaos", "bare", False, "host", {"commands": [run["command"] for run in read]})
    result.samples = {run["command"]: run for run in read}
    for run in read:
        result.rows += rows(run)
        result.fail("with", run["violations"])
        for text in run["skipped"]:
            result.note(f"skipped: {text}")
    result.write(folder)


if __name__ == "__main__":
    typer.run(record)

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
from chaos.report import write

FIGURES = {
    "fds": ("descriptors", "", 1),
    "tasks": ("threads", "", 1),
    "files": ("files in the directory", "", 1),
    "anon": ("own memory", "MiB", MIB),
}
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
    return found + (grown(kind, run["growth"]) if run["soak"] else [])


def grown(kind: str, growth: dict[str, Any]) -> list[Row]:
    """What was gained between a fifth of the time and the end, by the process that gained most."""
    found = []
    for whose, ours in (("tenants that live on", True), ("monitor and conductor", False)):
        ends = [pair for who, pair in growth.items() if who.startswith("tenant") == ours]
        for what, (name, unit, size) in FIGURES.items():
            gains = [(last[what] - first[what]) / size for first, last in ends if what in first]
            if gains:
                found.append(Row(f"{kind}: {name} gained, {whose}", unit, max(gains)))
    return found


def record(
    runs: Annotated[list[Path], typer.Argument(help="What `scripts/chaos --json` wrote.", show_default=False)],
    folder: Annotated[Path, typer.Option(help="Where chaos.json goes.")] = RESULTS / "cpu",
    note: Annotated[list[str] | None, typer.Option(help="What a reader must know besides.")] = None,
) -> None:
    """One result file from one or more runs."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in runs]
    result = Result("chaos", "bare", False, "host", {})
    result.samples = {run["command"]: run for run in read}
    result.notes = note or []
    for run in read:
        result.rows += rows(run)
        result.fail("with", run["violations"])
        for text in run["skipped"]:
            result.note(f"skipped: {text}")
    own = {
        "command": "; ".join(run["command"] for run in read),
        "date": read[0]["date"],
        "commit": read[0]["commit"],
        "hardware": read[0]["machine"],
    }
    path = folder / "chaos.json"
    write(path, result.report() | own)
    print(path)


if __name__ == "__main__":
    typer.run(record)

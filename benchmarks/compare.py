"""A table of a result file: with and without elastickv, their ratio, the target, met or missed.

    python benchmarks/compare.py RESULT.json               one result
    python benchmarks/compare.py BEFORE.json AFTER.json    two results of one benchmark, such as of two commits

Leaves with 0 whatever the figures say, with 2 where a file is no result or the two are not of one benchmark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.result import read
from benchmarks.common.stats import ratio

WIDTH = 132
"""Where the output is no terminal."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, metavar="RESULT.json")
    parser.add_argument("second", type=Path, nargs="?", metavar="RESULT2.json")
    chosen = parser.parse_args()
    try:
        first = read(chosen.first)
        if chosen.second is None:
            show(first, str(chosen.first))
        else:
            beside(first, read(chosen.second))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(report: Mapping[str, Any], place: str = "") -> None:
    """Prints one result."""
    sides = report["sides"]
    table = Table(title=_title(report), title_justify="left", caption=place, caption_justify="left")
    table.add_column("figure")
    for side in (sides["without"], sides["with"], f"{sides['with']} / {sides['without']}", "target"):
        table.add_column(side, justify="right")
    table.add_column("")
    for row in report["rows"]:
        figures = (number(row["without"]), number(row["with"]), number(row["ratio"], 3))
        name = f"{row['what']}, {row['unit']}" if row["unit"] else row["what"]
        table.add_row(name, *figures, target(row["target"]), verdict(row["met"]))
    console().print(table)
    _after(report)


def beside(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Prints two results of one benchmark. ValueError where they are of two."""
    if first["benchmark"] != second["benchmark"]:
        raise ValueError(f"a result of {first['benchmark']} and one of {second['benchmark']} have no figure in common")
    names = [f"{key} ({report.get('commit') or report['date']})" for key, report in (("1", first), ("2", second))]
    table = Table(title=f"{first['benchmark']}: with elastickv", title_justify="left")
    table.add_column("figure")
    for title in (*names, "2 / 1", "ratio 1", "ratio 2", "target"):
        table.add_column(title, justify="right")
    table.add_column("1")
    table.add_column("2")
    after = {row["what"]: row for row in second["rows"]}
    before = {row["what"]: row for row in first["rows"]}
    nothing: dict[str, Any] = {"unit": "", "with": None, "ratio": None, "target": None, "met": None}
    for what in dict.fromkeys([*before, *after]):
        a, b = before.get(what, nothing), after.get(what, nothing)
        unit = a["unit"] or b["unit"]
        ratios = (number(ratio(b["with"], a["with"]), 3), number(a["ratio"], 3), number(b["ratio"], 3))
        name = f"{what}, {unit}" if unit else what
        figures = (number(a["with"]), number(b["with"]), *ratios, target(b["target"] or a["target"]))
        table.add_row(name, *figures, verdict(a["met"]), verdict(b["met"]))
    console().print(table)
    for key, report in (("1", first), ("2", second)):
        print(f"{key}: {_title(report)}")
        _after(report)
    if first["hardware"] != second["hardware"] or first["versions"] != second["versions"]:
        print("The hardware, its load or the versions differ: see both files.")


def _title(report: Mapping[str, Any]) -> str:
    hardware = report["hardware"]
    machine = hardware.get("gpu") or hardware.get("cpu") or "unknown"
    commit = report["commit"] and f"commit {report['commit']}"
    parts = [report["benchmark"], report["engine"], machine, report["date"], commit]
    return " · ".join(str(part) for part in parts if part) + (" · small size" if report["small"] else "")


def _after(report: Mapping[str, Any]) -> None:
    counts = {report["sides"].get(side, side): count for side, count in report["failures"].items() if count}
    if counts:
        print("FAILED: " + ", ".join(f"{count} of {side}" for side, count in counts.items()))
    if report["small"] or report["engine"] == "stand-in":
        print("This run shows that the benchmark works. Its figures are those of a small model or of none.")
    for line in report["failed"]:
        print(f"  {line}")
    for line in report["notes"]:
        print(f"note: {line}")


def number(value: float | None, places: int | None = None) -> str:
    if value is None:
        return "-"
    if places is not None:
        return f"{value:.{places}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def target(wanted: Mapping[str, Any] | None) -> str:
    if wanted is None:
        return ""
    sign = "≤" if wanted["at"] == "most" else "≥"
    return f"{'ratio ' if wanted['of'] == 'ratio' else ''}{sign} {wanted['value']:.4g}"


def verdict(met: bool | None) -> str:
    return "" if met is None else "met" if met else "MISSED"


def console() -> Console:
    """As wide as the terminal; WIDTH columns elsewhere."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(width=WIDTH, highlight=False)


if __name__ == "__main__":
    sys.exit(main())

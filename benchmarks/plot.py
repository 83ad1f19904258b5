"""Pictures of result files, for docs/benchmarks.md: needs matplotlib, and nothing else does.

    python benchmarks/plot.py benchmarks/results/nvidia-h100-80gb-hbm3/*.json --output docs/pictures/h100

Writes targets.svg: every figure that has a target, as a multiple of it, the missed ones included; and for results that
have them burst.svg (TTFT at every peak), burst-memory.svg (what each engine held meanwhile), NAME-ttft.svg (the
share of requests answered within a time) and start_beside-slowest.svg (the slowest TTFT of each half second).
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.result import read

MET, MISSED, WITHOUT = "#2f7d4f", "#c0392b", "#8a8f98"
WIDTH = 8.5
"""Inches."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    chosen = parser.parse_args()
    try:
        reports = {path.stem: read(path) for path in chosen.results}
        import matplotlib as mpl
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError:
        print("error: the pictures need matplotlib; run: pip install 'elastickv[bench]'", file=sys.stderr)
        return 3
    mpl.use("Agg")
    # The same figures give the same file: no date and no random ids in it.
    mpl.rcParams.update({"svg.hashsalt": "elastickv", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False})
    chosen.output.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures(reports).items():
        path = chosen.output / f"{name}.{chosen.format}"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if chosen.format == "svg" else None)
        print(path)
    return 0


def pictures(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By name; those that the results have no figures for are not there."""
    found = {"targets": targets(reports)}
    for name, report in reports.items():
        if report["benchmark"] == "engine/burst":
            found[name] = burst(report)
            found[f"{name}-memory"] = memory(report)
        if report["benchmark"] == "engine/start_beside":
            found[f"{name}-slowest"] = slowest(report)
        curves = answered(report)
        if curves is not None:
            found[f"{name}-ttft"] = curves
    return {name: figure for name, figure in found.items() if figure is not None}


def shares(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float, bool]]:
    """Each figure with a target as a multiple of it, turned so that less is better and 1 just meets it.

    A target of 0 has no multiple: 0 where it is met, else 10. A figure that is missing counts as 10 too.
    """
    found = []
    for name, report in reports.items():
        for row in report["rows"]:
            wanted = row["target"]
            if wanted is None:
                continue
            value = row["with"] if wanted["of"] == "with" else row["ratio"]
            if value is None or not wanted["value"]:
                share = 0.0 if row["met"] else 10.0
            elif wanted["at"] == "most":
                share = value / wanted["value"]
            else:
                share = wanted["value"] / value if value else 10.0
            found.append((f"{name}: {row['what']}", share, bool(row["met"])))
    return found


def targets(reports: Mapping[str, Mapping[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    rows = shares(reports)[::-1]
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH, 0.6 + 0.24 * len(rows)))
    axes = figure.subplots()
    for place, (_, share, met) in enumerate(rows):
        axes.plot([max(share, 1e-3)], [place], "o", color=MET if met else MISSED)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(8e-4, max(12.0, 1.2 * max(share for _, share, _ in rows)))
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_xlabel("multiple of the target; left of the line it is met (green), right of it missed (red)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def burst(report: Mapping[str, Any]) -> Any:
    """Mean and P99 of TTFT at every peak, both sides."""
    from matplotlib.figure import Figure

    pattern = re.compile(r"peak (\d+): TTFT (mean|p99)")
    rows = [(match, row) for row in report["rows"] if (match := pattern.fullmatch(row["what"]))]
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH, 3.2))
    for axes, kind in zip(figure.subplots(1, 2), ("mean", "p99"), strict=True):
        points = sorted((int(match[1]), row) for match, row in rows if match[2] == kind)
        for side, colour in (("without", WITHOUT), ("with", MET)):
            there = [(peak, row[side] / 1e3) for peak, row in points if row[side] is not None]
            axes.plot([x for x, _ in there], [y for _, y in there], "o-", color=colour, label=report["sides"][side])
        axes.set_yscale("log")
        axes.set_title("mean" if kind == "mean" else "P99")
        axes.set_xlabel("peak of each engine, requests a second")
        axes.set_ylabel("TTFT, s")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def memory(report: Mapping[str, Any]) -> Any:
    """What each engine held at every peak, one upon the other, and what of it all was in use."""
    from matplotlib.figure import Figure

    peaks = {what: rounds[0] for what, rounds in report["samples"].get("memory", {}).items() if rounds[0]["at"]}
    if not peaks:
        return None
    figure = Figure(figsize=(WIDTH, 2.2 * len(peaks)))
    for axes, (what, one) in zip(figure.subplots(len(peaks), 1, squeeze=False).flat, peaks.items(), strict=True):
        held = [[mib / 1024 for mib in series] for series in one["held"].values()]
        used = [sum(moment) / 1024 for moment in zip(*one["used"].values(), strict=True)]
        axes.stackplot(one["at"], *held, labels=[f"{name} holds" for name in one["held"]], alpha=0.6)
        axes.plot(one["at"], used, color="black", linewidth=0.8, label="in use, all")
        axes.set_title(what)
        axes.set_xlabel("s")
        axes.set_ylabel("GiB")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def answered(report: Mapping[str, Any]) -> Any:
    """The share of requests whose first token came within a time; a failed request never gets there."""
    from matplotlib.figure import Figure

    loads = {what: pair for what, pair in pairs(report).items() if "saturation" not in what}
    if not loads:
        return None
    figure = Figure(figsize=(WIDTH, 3.0 * math.ceil(len(loads) / 2)))
    grid = list(figure.subplots(math.ceil(len(loads) / 2), min(2, len(loads)), squeeze=False).flat)
    for axes in grid[len(loads) :]:
        axes.remove()
    for axes, (what, sides) in zip(grid, sorted(loads.items(), key=by_number), strict=False):
        for side, colour in (("without", WITHOUT), ("with", MET)):
            series = sides[side]
            came = sorted(value for value in series if value is not None)
            heights = [(place + 1) / len(series) for place in range(len(came))]
            axes.step(came, heights, where="post", color=colour, label=report["sides"][side])
        axes.set_title(what)
        axes.set_xlabel("TTFT, s")
        axes.set_ylabel("share of requests")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.tight_layout()
    return figure


def slowest(report: Mapping[str, Any]) -> Any:
    """The slowest TTFT of the requests that arrived in each half second, first rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.0))
    axes = figure.subplots()
    for side, colour in (("without", WITHOUT), ("with", MET)):
        label = report["sides"][side]
        for one in report["samples"].get(f"busy engine, {label}", [])[:1]:
            worst: dict[int, float] = {}
            for at, ttft in zip(one["arrival"], one["ttft"], strict=True):
                worst[int(2 * at)] = max(worst.get(int(2 * at), 0.0), math.inf if ttft is None else ttft)
            places = sorted(worst)
            heights = [worst[place] for place in places]
            axes.step([place / 2 for place in places], heights, where="post", color=colour, label=label)
    if not axes.lines:
        return None
    axes.set_xlabel("arrival, s")
    axes.set_ylabel("slowest TTFT, s")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def by_number(load: tuple[str, Any]) -> tuple[int, str]:
    """Peaks from the lowest on."""
    peak = re.search(r"peak (\d+)", load[0])
    return int(peak[1]) if peak else 0, load[0]


def pairs(report: Mapping[str, Any]) -> dict[str, dict[str, Sequence[float | None]]]:
    """TTFT samples of loads that both sides have, all rounds together: samples are named "WHAT, SIDE"."""
    found: dict[str, dict[str, Sequence[float | None]]] = {}
    for name, rounds in report["samples"].items():
        what, _, side = name.rpartition(", ")
        side = {report["sides"]["with"]: "with", report["sides"]["without"]: "without"}.get(side, side)
        if side in ("with", "without") and isinstance(rounds, list) and rounds and "ttft" in rounds[0]:
            found.setdefault(what, {})[side] = [value for one in rounds for value in one["ttft"]]
    return {what: sides for what, sides in found.items() if len(sides) == 2}


if __name__ == "__main__":
    sys.exit(main())

"""Writes the tables of recorded results into docs/benchmarks.md, from benchmarks/results.

python benchmarks/page.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.result import RESULTS, ROOT, read
from benchmarks.compare import number, target, verdict

PAGE = ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"


def main() -> int:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + tables() + END + after, encoding="utf-8")
    return 0


def tables() -> str:
    """One for each machine, the missed targets in bold."""
    parts = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        parts.append(f"\n### {folder.name}\n\n")
        parts.append("| result | figure | without | with | ratio | target | |\n|---|---|---|---|---|---|---|\n")
        for path in sorted(folder.glob("*.json")):
            parts += [line(path, row, number_ == 0) for number_, row in enumerate(read(path)["rows"])]
    return "".join(parts) + "\n"


def line(path: Path, row: dict[str, Any], first: bool) -> str:
    link = f"[{path.stem}](../{path.relative_to(ROOT)})" if first else ""
    unit = f", {row['unit']}" if row["unit"] else ""
    figures = " | ".join((number(row["without"]), number(row["with"]), number(row["ratio"], 3)))
    said = verdict(row["met"])
    said = f"**{said}**" if row["met"] is False else said
    return f"| {link} | {row['what']}{unit} | {figures} | {target(row['target'])} | {said} |\n"


if __name__ == "__main__":
    sys.exit(main())

"""The list of fault points: the sources, the binding and the docs say the same."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from elastickv import _core

ROOT = Path(__file__).resolve().parent.parent.parent
CORE = ROOT / "src/core"
PAGE = ROOT / "docs/faults.md"


def in_the_sources() -> Counter[str]:
    """Names by how often they stand in the core, the list itself apart."""
    files = [path for path in CORE.rglob("*.[ch]pp") if path.parent.name != "base"]
    return Counter(name for path in files for name in re.findall(r'fault::point\("([^"]+)"\)', path.read_text()))


def test_every_listed_point_stands_in_the_sources() -> None:
    """The other way round the compiler sees to it."""
    names = [name for name, _, _ in _core.fault_points()]
    assert len(names) == len(set(names)) > 40
    assert set(in_the_sources()) == set(names)


def test_names_say_part_and_step() -> None:
    assert [n for n, _, _ in _core.fault_points() if not re.fullmatch(r"[a-z]+\.[a-z]+(\.[a-z_]+)?", n)] == []


def test_a_step_that_can_fail_looks_at_the_answer() -> None:
    """`(void)fault::point(...)` throws the answer away: right exactly where the list says that the step cannot fail."""
    text = "".join(path.read_text() for path in CORE.rglob("*.cpp"))
    ignored = set(re.findall(r'\(void\)fault::point\("([^"]+)"\)', text))
    assert ignored == {name for name, can_fail, _ in _core.fault_points() if not can_fail}


def test_the_page_lists_every_point() -> None:
    rows = [f"| `{name}` | {'yes' if fails else 'no'} | {what} |" for name, fails, what in _core.fault_points()]
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [line for line in shown if line.split("`")[1].count(".") >= 1] == rows

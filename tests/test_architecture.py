"""Rules over the source tree. Each one holds for every file that ships, those of tomorrow too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src/elastickv"
PYTHON = sorted(PACKAGE.rglob("*.py"))
NATIVE = sorted(path for folder in ("src/core", "src/bindings") for path in (ROOT / folder).rglob("*.[ch]pp"))
TESTS = sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.[ch]pp"))
SCRIPTS = [path for folder in ("scripts", ".ci") for path in sorted((ROOT / folder).iterdir()) if path.is_file()]

ENGINES = {"vllm", "torch", "sglang", "transformers", "numpy"}
MAY_IMPORT_ENGINES = {"engines", "demo"}
MAX_PYTHON_LINES, MAX_NATIVE_LINES, MAX_FUNCTION_LINES = 450, 500, 60
MIN_ANNOTATED = 0.97

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(tree: ast.AST) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported(tree: ast.AST) -> Iterator[str]:
    """Top names of absolute imports, wherever they stand, except under `if TYPE_CHECKING`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def test_there_is_something_to_look_at() -> None:
    assert len(PYTHON) > 5
    assert len(NATIVE) > 5
    assert len(SCRIPTS) >= 5


def test_one_file_names_the_cuda_driver_calls() -> None:
    named = [name_of(path) for path in NATIVE if re.search(r"\bcuMem\w+", without_comments(path.read_text()))]
    assert len({name.rpartition(".")[0] for name in named}) <= 1, named


def test_one_file_reads_the_environment() -> None:
    wanted = re.compile(r"\bos\.(environ|getenv|putenv)\b|from os import .*\b(environ|getenv)\b")
    readers = [name_of(path) for path in PYTHON if wanted.search(path.read_text(encoding="utf-8"))]
    assert readers == ["src/elastickv/config.py"]


def test_native_code_never_looks_at_the_environment() -> None:
    assert [name_of(path) for path in NATIVE if re.search(r"\b(secure_)?getenv\b", path.read_text())] == []


def test_the_core_knows_no_python_and_no_engine() -> None:
    """Texts for people may name them; includes and code may not."""
    wanted = re.compile(r"#include\s*[<\"](Python\.h|nanobind|pybind11|torch|ATen|c10)")
    names = re.compile(r"\b(vllm|sglang|torch|py_?object)\b", re.IGNORECASE)
    found = {}
    for path in NATIVE:
        code = without_comments(path.read_text(encoding="utf-8"))
        if "core" in path.relative_to(ROOT).parts:
            match = wanted.search(code) or names.search(re.sub(r'"(\\.|[^"\\])*"', '""', code))
            if match:
                found[name_of(path)] = match[0]
    assert found == {}


def test_only_adapters_and_the_demo_import_engines() -> None:
    importers = {
        name_of(path)
        for path in PYTHON
        if path.relative_to(PACKAGE).parts[0] not in MAY_IMPORT_ENGINES
        and not ENGINES.isdisjoint(imported(tree_of(path)))
    }
    assert importers == set()


def test_only_the_command_line_knows_the_gateway() -> None:
    importer = re.compile(r"^\s*(from|import) elastickv\.gateway", re.MULTILINE)
    found = [p for p in PYTHON if importer.search(p.read_text(encoding="utf-8"))]
    assert {path.relative_to(PACKAGE).parts[0] for path in found} == {"cli", "gateway"}


def test_a_command_that_serves_nothing_loads_no_web_server() -> None:
    heavy = "{'starlette', 'uvicorn', 'aiohttp', 'uvloop', 'httpx'}"
    code = f"import sys, elastickv.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_gateway_knows_engines_by_their_adapters() -> None:
    importer = re.compile(r"^\s*(from|import) elastickv\.engines\.", re.MULTILINE)
    found = [path for path in PYTHON if importer.search(path.read_text(encoding="utf-8"))]
    assert [name_of(path) for path in found if path.is_relative_to(PACKAGE / "gateway")] == []


def test_files_keep_their_budget() -> None:
    over = {name_of(p): n for p in PYTHON if (n := len(p.read_text().splitlines())) > MAX_PYTHON_LINES}
    over |= {name_of(p): n for p in NATIVE if (n := len(p.read_text().splitlines())) > MAX_NATIVE_LINES}
    assert over == {}


def test_functions_keep_their_budget() -> None:
    over = {
        f"{name_of(path)}:{f.lineno} {f.name}": (f.end_lineno or f.lineno) - f.lineno + 1
        for path in PYTHON
        for f in functions(tree_of(path))
        if (f.end_lineno or f.lineno) - f.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert over == {}


def test_functions_are_annotated() -> None:
    def annotated(function: Function) -> bool:
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        named = [a for a in arguments if a.arg not in ("self", "cls")]
        return function.returns is not None and all(a.annotation is not None for a in named)

    every = [(path, f) for path in PYTHON for f in functions(tree_of(path))]
    bare = [f"{name_of(path)}:{f.lineno} {f.name}" for path, f in every if not annotated(f)]
    assert 1 - len(bare) / len(every) >= MIN_ANNOTATED, bare


def test_nothing_is_left_to_be_done_later() -> None:
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", r"\bX{3}\b", "raise Not" + "Implemented")))
    left = [
        f"{name_of(path)}:{number}"
        for path in [*PYTHON, *NATIVE, *TESTS, *SCRIPTS]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert left == []


def test_a_broad_except_says_why_it_is_one() -> None:
    """On its own line or on the next one stands the reason, and it never swallows."""
    silent = []
    for path in PYTHON:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            if not re.search(r"\b(everything|Exception|BaseException)\b", caught):
                continue
            comment = lines[node.lineno - 1].partition("#")[2] + lines[node.lineno].partition("#")[2]
            reason = re.sub(r"noqa: \w+\s*-?", "", comment).strip()
            if len(reason) < 15 or all(isinstance(step, ast.Pass | ast.Continue) for step in node.body):
                silent.append(f"{name_of(path)}:{node.lineno}")
    assert silent == []


def test_no_check_is_an_assert() -> None:
    """Asserts are compiled out under -O and under NDEBUG."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in PYTHON
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assert)
    ]
    found += [name_of(p) for p in NATIVE if re.search(r"(?<![\w_])assert\s*\(", without_comments(p.read_text()))]
    assert found == []


@pytest.mark.parametrize("path", [p for p in PYTHON if p.name != "__main__.py"], ids=name_of)
def test_modules_say_what_they_export_and_what_they_are_for(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), "a module docstring"
    exports = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    assert len(exports) == 1, "__all__, once"
    names = ast.literal_eval(exports[0])
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | Function)}
    public = {name for name in defined if not name.startswith("_")}
    assert public - set(names) == set(), "public and not in __all__"


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE, *TESTS, *SCRIPTS], ids=name_of)
def test_no_path_of_a_machine(path: Path) -> None:
    here = re.compile("/" + "work/|/" + r"root/|/home/\w")
    assert not here.search(path.read_text(encoding="utf-8"))


def test_scripts_stop_at_the_first_failure_and_can_be_run() -> None:
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("#!/usr/bin/env bash\n"), path
        assert "\nset -euo pipefail\n" in text, path
        assert path.stat().st_mode & 0o111, path

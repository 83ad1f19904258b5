"""`elastickv run`, and what every verb shares: how errors and versions are printed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from elastickv.config import VARIABLES
from support import Outcome

Cli = Callable[..., Outcome]
COMMAND = [sys.executable, "-m", "elastickv.cli", "run"]


def test_no_command(cli: Cli) -> None:
    example = "elastickv run --name chat --floor 8GiB -- vllm serve MODEL"
    assert cli("run") == Outcome(2, "", f"error: run: no command; write it after --, as in: {example}\n")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--floor", "2g", "--limit", "1g"], "floor 2 GiB is more than limit 1 GiB; lower --floor or raise --limit"),
        (["--name", "a/b"], "--name: 'a/b' is not a name; write 1 to 63 letters, digits, '.', '_' or '-'"),
        (["--weight", "1001"], "--weight: '1001' must be a whole number from 1 to 1000"),
        (
            ["--limit", "8 gigs"],
            "--limit: '8 gigs' is not a size; write bytes (1000000), KiB, MiB, GiB, TiB (512MiB, 1.5GiB), k, m, g, t "
            "(the same: 2g is 2GiB), kB, MB, GB, TB, none",
        ),
        (
            ["--device", "gpu"],
            "--device: 'gpu' is not a device; write host, auto, a GPU's number (0, cuda:0) or its UUID "
            "(GPU-..., MIG-...)",
        ),
    ],
)
def test_options_are_checked_before_anything_starts(cli: Cli, tmp_path: Path, options: list[str], text: str) -> None:
    touched = tmp_path / "touched"
    assert cli("run", *options, "--", "touch", touched) == Outcome(2, "", f"error: {text}\n")
    assert not touched.exists()


def test_every_setting_is_an_option_and_stands_in_the_docs() -> None:
    """All but whether the engine is managed, which run itself decides, and secrets, which no command line has."""
    from elastickv.cli import app

    parameters = typer.main.get_group(app).commands["run"].params
    taken = {parameter.name: parameter.opts for parameter in parameters if parameter.param_type_name == "option"}
    taken.pop("help", None)
    assert taken == {one.field: [one.option] for one in VARIABLES if one.field != "enabled" and not one.secret}
    synopsis = Path(__file__).parent.parent.joinpath("docs/cli.md").read_text(encoding="utf-8")
    synopsis = synopsis.partition("\n## run\n")[2].partition("-- COMMAND")[0]
    assert sorted(re.findall(r"--[a-z-]+", synopsis)) == sorted(options[0] for options in taken.values())


def test_the_other_options_reach_the_settings(cli: Cli, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for option, value, text in (
        ("--static", "most", "--static: 'most' is not a size"),
        ("--headroom", "none", "--headroom: 'none' is not a size"),
        ("--start-wait", "long", "--start-wait: 'long' is not a time"),
    ):
        outcome = cli("run", option, value, "--", "touch", touched)
        assert (outcome.code, outcome.out) == (2, "")
        assert text in outcome.err
    assert not touched.exists()


def test_an_unknown_program(cli: Cli) -> None:
    assert cli("run", "--", "nonesuch-program") == Outcome(
        3, "", "error: run: no program 'nonesuch-program' on the PATH; install it, or write its whole path\n"
    )


def test_the_command_gets_the_settings_and_its_own_arguments(directory: Path) -> None:
    script = (
        "import os, sys; print(os.getpid(), sys.argv[1:], {k: v for k, v in os.environ.items() if 'ELASTICKV' in k})"
    )
    options = ["--name", "chat", "--floor", "1MiB", "--dir", str(directory), "--cache-release", "never"]
    environment = {**os.environ, "ELASTICKV_WEIGHT": "3", "ELASTICKV_FLOOR": "9GiB"}
    command = [*COMMAND, *options, "--", sys.executable, "-c", script, "--name", "its own"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=60)
    expected = {
        "ELASTICKV": "1",
        "ELASTICKV_DIR": str(directory),
        "ELASTICKV_NAME": "chat",
        "ELASTICKV_FLOOR": "1048576",
        "ELASTICKV_WEIGHT": "3",
        "ELASTICKV_CACHE_RELEASE": "never",
    }
    pid, _, rest = out.partition(" ")
    assert int(pid) == process.pid
    arguments, _, told = rest.partition("] ")
    assert arguments + "]" == "['--name', 'its own']"
    assert eval(told) == expected  # a printed dictionary of texts
    assert process.returncode == 0


def test_the_exit_code_is_the_commands() -> None:
    command = [*COMMAND, "--", sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 7


def test_usage_errors_leave_with_two(cli: Cli) -> None:
    outcome = cli("limit", "chat")
    assert outcome.code == 2
    assert "Missing argument" in outcome.err


def test_version(cli: Cli) -> None:
    assert cli("--version") == Outcome(0, importlib.metadata.version("elastickv") + "\n", "")


def test_a_reader_that_goes_away_is_no_error(directory: Path) -> None:
    script = f"{sys.executable} -m elastickv.cli doctor --dir {directory} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("ok    package: elastickv")
    assert "Traceback" not in done.stderr

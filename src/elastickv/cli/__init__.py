"""The command line: one file a verb. Only main() prints errors and chooses exit codes."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer

from elastickv.cli.control import app as control
from elastickv.cli.demo import demo
from elastickv.cli.doctor import doctor
from elastickv.cli.exporter import exporter
from elastickv.cli.forget import forget
from elastickv.cli.limit import limit
from elastickv.cli.model import app as model
from elastickv.cli.plan import plan
from elastickv.cli.run import run
from elastickv.cli.serve import serve
from elastickv.cli.status import status
from elastickv.cli.top import top
from elastickv.cli.trim import trim
from elastickv.errors import ElasticKVError

__all__ = ["app", "main", "options"]

app = typer.Typer(
    name="elastickv",
    help="KV caches of several engines in one memory: start engines, watch them, steer them.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(context_settings={"allow_interspersed_args": False})(run)
for verb in (serve, status, top, limit, trim, forget, plan, doctor, exporter, demo):
    app.command()(verb)
app.add_typer(control, name="control")
app.add_typer(model, name="model")


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """Options before the verb."""
    if version:
        print(importlib.metadata.version("elastickv"))
        raise typer.Exit


def main() -> None:
    """Runs the command line of this process. Errors become one line on stderr and the error's exit code."""
    try:
        app()
    except ElasticKVError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone (`elastickv status | head`): nothing is left to say, and nobody to say it to.
        sys.stderr.close()
        sys.exit(141)

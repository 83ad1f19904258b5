"""`elastickv doctor`: is everything there that engines need, and is a running engine really managed?"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from elastickv.cli import options as opt
from elastickv.cli.checks import everything
from elastickv.cli.proof import prove
from elastickv.config import Settings

__all__ = ["doctor"]

MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


def doctor(
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Prove that this running tenant is managed.")
    ] = None,
    device: opt.Device = None,
    directory: opt.Directory = None,
    as_json: opt.Json = False,
) -> None:
    """Check the directory, the ledgers, the drivers and the plug-in; with --name, prove that an engine is managed.

    Leaves with 1 if anything is bad.
    """
    settings = Settings.load(options={"device": device, "directory": directory})
    findings = []
    for finding in [prove(settings, name)] if name is not None else everything(settings):
        findings.append(finding)
        if not as_json:
            print(f"{MARKS[finding.outcome]}  {finding.check}: {finding.text}", flush=True)
    bad = any(finding.outcome == "bad" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not bad, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    if bad:
        raise typer.Exit(1)

"""`python -m chaos`: one run from the command line. scripts/chaos calls it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common.result import commit, hardware
from chaos.choices import Options
from chaos.conductor import Conductor
from chaos.report import Report, write


def run(options: Options, echo: bool = False) -> Report:
    """One run in the folder above its ledger directory; the log is `log.txt` there."""
    report = Report(options.directory.parent / "log.txt", echo)
    conductor = Conductor(options, report)
    try:
        conductor.run()
    finally:
        report.close()
    return report


def chaos(
    minutes: Annotated[float, typer.Option(min=0.01, help="Ends after so long.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Where every choice comes from.")] = 1,
    kills: Annotated[int | None, typer.Option(min=1, help="Ends after so many kills.")] = None,
    tenants: Annotated[int, typer.Option(min=3, max=6, help="Processes that share the device.")] = 4,
    soak: Annotated[bool, typer.Option(help="Half of the tenants are never killed, and watched for growth.")] = False,
    rogue: Annotated[bool, typer.Option(help="Plants a tenant that maps without leases: the run must fail.")] = False,
    directory: Annotated[Path | None, typer.Option("--dir", help="Kept afterwards; default: a temporary one.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    quiet: Annotated[bool, typer.Option(help="Prints the summary only.")] = False,
) -> None:
    """Runs 3 to 6 tenants on the host driver, kills them, and checks. Exit code 1: something that must hold did not."""
    folder = directory or Path(tempfile.mkdtemp(prefix="elastickv-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    ledgers = folder / "ledgers"
    ledgers.mkdir(mode=0o700)
    limit = minutes * 60 if kills is None else max(minutes * 60, kills * 3.0)
    options = Options(seed, ledgers, limit, kills, tenants, soak=soak, rogue=rogue)
    report = run(options, echo=not quiet)
    summary = {
        "command": "scripts/chaos " + " ".join(sys.argv[1:]),
        "date": datetime.now(tz=timezone.utc).strftime("%Y-%m-%d"),
        "machine": hardware("host"),
        "commit": commit(),
        "capacity": options.capacity,
        "soak": soak,
        **report.summary(),
    }
    if output is not None:
        write(output, summary)
    print(
        f"seed {seed}: {report.figures.get('kills', 0)} kills, {report.figures.get('starts', 0)} starts, "
        f"{report.counts['operations']} operations, dead leases seen for {report.figures.get('worst_held', 0):.3f} s, "
        f"{len(report.violations)} violations in {report.seconds:.0f} s"
    )
    for text in report.violations[:10]:
        print(f"violation: {text.splitlines()[0]}", file=sys.stderr)
    if report.violations:
        print(f"the log is {folder / 'log.txt'}", file=sys.stderr)
        raise typer.Exit(1)
    if directory is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    typer.run(chaos)

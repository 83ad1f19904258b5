"""What several test modules share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from elastickv.config import VARIABLES, Variable
from elastickv.gateway.catalogue import GATEWAY_METRICS
from elastickv.telemetry import METRICS, Metric

TENANT = """
import json, sys
import elastickv
name, directory, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[5])
blocks, cached = int(sys.argv[3]), int(sys.argv[4])
with elastickv.open_device("host", capacity="64MiB", directory=directory) as device:
    with device.join(name, **options).cache(num_blocks=512, block_bytes=64 * 1024) as cache:
        ids = cache.alloc(blocks + cached)
        cache.free(ids[blocks:], cached=True)
        print("ready", flush=True)
        sys.stdin.read()
"""


@dataclass(frozen=True)
class Outcome:
    """What one call of the command line left behind."""

    code: int
    out: str
    err: str


@contextmanager
def running_tenant(
    directory: Path, name: str, *, blocks: int = 10, cached: int = 0, options: str = "{}"
) -> Iterator[subprocess.Popen[str]]:
    """A process that holds blocks of 64 KiB (one page each) on a device of 64 MiB, until the block is left."""
    command = [sys.executable, "-c", TENANT, name, str(directory), str(blocks), str(cached), options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if line != "ready\n":
                raise RuntimeError(f"the tenant said {line!r} and ended with {process.wait(10)}")
            yield process
        finally:
            if process.stdin:
                process.stdin.close()
            process.wait(timeout=20)


ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION_PAGE = ROOT / "docs/configuration.md"
GEOMETRY_PAGE = ROOT / "docs/geometry.md"
METRICS_PAGE = ROOT / "docs/metrics.md"
WATCHING_PAGE = ROOT / "docs/watching.md"
TABLE_BEGIN, TABLE_END = "<!-- table -->\n", "<!-- end of table -->\n"


def _option(variable: Variable) -> str:
    if variable.secret:
        return "none"
    return "set by `run`" if variable.field == "enabled" else f"`{variable.option}`"


def configuration_table() -> str:
    """The settings as a table of the docs."""
    head = "| variable | option | key | default | what it is |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| `{v.variable}` | {_option(v)} | `{v.key}` | {v.default or 'none'} | {v.doc} |\n" for v in VARIABLES
    )


def put_table(page: Path, table: str) -> None:
    """Puts the table between the page's marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(TABLE_BEGIN)
    _, _, after = rest.partition(TABLE_END)
    page.write_text(before + TABLE_BEGIN + table + TABLE_END + after, encoding="utf-8")


def table_of(page: Path) -> str:
    """The table between the page's marks."""
    return page.read_text(encoding="utf-8").partition(TABLE_BEGIN)[2].partition(TABLE_END)[0]


def metrics_table(metrics: Sequence[Metric] = METRICS) -> str:
    """The metrics as a table of the docs."""
    return "| metric | kind | labels | what it is |\n|---|---|---|---|\n" + "".join(
        f"| `{m.exposed}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.text} |\n" for m in metrics
    )


def write_tables() -> None:
    """Writes every generated table of the docs."""
    from geometry_table import table

    put_table(CONFIGURATION_PAGE, configuration_table())
    put_table(GEOMETRY_PAGE, table())
    put_table(METRICS_PAGE, metrics_table())
    put_table(WATCHING_PAGE, metrics_table(GATEWAY_METRICS))

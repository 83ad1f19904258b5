"""The whole table in one go: every benchmark from the top, within a time budget, and the table of what came out.

    python benchmarks/suite.py [--minutes 120]     on a GPU
    python benchmarks/suite.py --small             the same at small size, on any machine

Each benchmark is a process of its own and may take what is left of the time; what was not run, or failed, is said, with
the reason. Leaves with 1 if a benchmark failed, with 0 otherwise, whatever the figures say.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.options import device_of
from benchmarks.common.result import RESULTS, ROOT, gpu_name, read, slug
from benchmarks.compare import show

NOTHING_TO_MEASURE = 3
LEAVE_S = 60.0


class Entry(NamedTuple):
    """A benchmark: its file, the minutes that it takes at full size on an H100, whether it serves a model."""

    path: str
    minutes: float
    serves: bool = False
    gpu_only: bool = False


TABLE = (
    Entry("gpu/mapper_cost.py", 1),
    Entry("gpu/growth.py", 1),
    Entry("gpu/hand_over.py", 1),
    Entry("engine/serving.py", 18, serves=True),
    Entry("engine/idle.py", 5, serves=True),
    Entry("engine/burst.py", 35, serves=True),
    Entry("engine/start.py", 12, serves=True),
    Entry("engine/kill.py", 25, serves=True),
    Entry("engine/wake.py", 5, serves=True, gpu_only=True),
)
"""In the order of the table of targets. The minutes are estimates, used to leave out what cannot be finished."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes: is everything there?")
    parser.add_argument("--minutes", type=float, default=120.0, help="for all of them (120)")
    parser.add_argument("--device", default="auto", help="host, or a GPU's number; auto: GPU 0 where there is one")
    parser.add_argument("--engine", default="vllm", help="vllm, sglang or stand-in")
    parser.add_argument("--only", default="", help="names by commas, such as growth,burst")
    parser.add_argument("--output", type=Path, help="folder of the results (benchmarks/results/GPU, or cpu)")
    chosen = parser.parse_args()
    chosen.device = device_of(chosen.device)
    known = {Path(entry.path).stem for entry in TABLE}
    only = set(chosen.only.split(",")) if chosen.only else known
    if only - known:
        parser.error(f"no benchmark named {', '.join(sorted(only - known))}; there are {', '.join(sorted(known))}")
    folder = chosen.output or RESULTS / slug("cpu" if chosen.device == "host" else gpu_name(chosen.device))
    began = time.time()
    left_out, failed = run_all([one for one in TABLE if Path(one.path).stem in only], chosen, folder)
    for path in sorted(folder.glob("*.json")):
        if path.stat().st_mtime >= began:
            show(read(path), str(path))
    for line in left_out:
        print(f"not run: {line}")
    for line in failed:
        print(f"FAILED: {line}")
    return int(bool(failed))


def run_all(entries: list[Entry], chosen: argparse.Namespace, folder: Path) -> tuple[list[str], list[str]]:
    """Why some were not run, and which failed."""
    left_out, failed = [], []
    until = time.monotonic() + 60 * chosen.minutes
    for entry in entries:
        left = until - time.monotonic()
        if entry.gpu_only and chosen.device == "host":
            left_out.append(f"{entry.path}: needs a GPU")
            continue
        if left < (20 if chosen.small else 60 * entry.minutes):
            left_out.append(f"{entry.path}: takes about {entry.minutes:g} min, {left / 60:.1f} are left of --minutes")
            continue
        code = run(command(entry, chosen, folder, left / 60), left)
        if code == NOTHING_TO_MEASURE:
            left_out.append(f"{entry.path}: see its message above")
        elif code:
            failed.append(f"{entry.path}: left with {code}")
    return left_out, failed


def command(entry: Entry, chosen: argparse.Namespace, folder: Path, minutes: float) -> list[str]:
    words = [sys.executable, str(ROOT / "benchmarks" / entry.path), "--device", chosen.device, "--output", str(folder)]
    if chosen.small:
        words.append("--small")
    if entry.serves:
        words += ["--engine", chosen.engine]
    if Path(entry.path).stem in ("burst", "kill") and not chosen.small:
        words += ["--minutes", f"{min(minutes, entry.minutes) * 0.9:.1f}"]
    return words


def run(words: list[str], seconds: float) -> int:
    """Its exit code. When its time is over it is asked to leave, so that it can end its servers."""
    print(f"== {shlex.join(words)}", flush=True)
    with subprocess.Popen(words, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"== its {seconds / 60:.1f} minutes are over", flush=True)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEAVE_S)
            return 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

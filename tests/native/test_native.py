"""Builds and runs the native tests: as they are, under AddressSanitizer, and under ThreadSanitizer."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD_S, RUN_S = 1800, 600
KINDS = ("plain", "address", "thread")


def run(command: list[str], seconds: int, **environment: str) -> str:
    """The command's output. A failure shows its end, for that is where the failed cases and reports are."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        start_new_session=True,  # so that what the tests forked goes with them
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        ended = f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"did not end within {seconds} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # the ordinary case: nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode is None:
        output, _ = process.communicate(timeout=10)
    if ended != "ended with 0":
        failed = "\n".join(re.findall(r"^FAIL .*\n.*", output, re.MULTILINE))
        pytest.fail(f"{' '.join(command)} {ended}\n{failed}\n{output[-6000:]}", pytrace=False)
    return output


def build(kind: str) -> Path:
    """Builds the tests in a folder that is kept, so that a second run compiles only what has changed."""
    folder = ROOT / "build" / f"native-{kind}"
    sanitizer = "" if kind == "plain" else kind
    tools = Path(sys.executable).parent
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    assert cmake, "no cmake on the PATH or beside this Python; run scripts/setup"
    options = ["-DELASTICKV_BINDINGS=OFF", "-DELASTICKV_NATIVE_TESTS=ON", f"-DELASTICKV_SANITIZE={sanitizer}"]
    if sanitizer:  # reports are easier to read, and compiling takes half as long
        options.append("-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    run([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options], BUILD_S, PATH=path)
    run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)], BUILD_S, PATH=path)
    return folder / "native_tests"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_native(kind: str) -> None:
    program = build(kind)
    command = [str(program)]
    if kind == "thread" and shutil.which("setarch"):
        # Where the kernel randomises more address bits than the runtime knows, it refuses to start.
        command = ["setarch", os.uname().machine, "-R", *command]
    output = run(
        command,
        RUN_S,
        ASAN_OPTIONS="detect_leaks=1:strict_string_checks=1",
        TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1",
    )
    last = output.strip().splitlines()[-1]
    counted = re.fullmatch(r"(\d+) ran, 0 failed", last)
    assert counted, last
    assert int(counted[1]) > 100, last

"""Builds what the tests have in C++: the native tests, and the stand-ins for NVIDIA's libraries."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["KINDS", "build", "run_native", "standin_libraries"]

ROOT = Path(__file__).resolve().parent.parent
BUILD_S = 1800
KINDS = ("plain", "address", "thread")
"""As they are, under AddressSanitizer, and under ThreadSanitizer."""


def run_native(command: list[str], seconds: int, **environment: str) -> str:
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


def build(kind: str, *targets: str) -> Path:
    """Builds the targets (all where none is named) in a folder that is kept: a second run compiles what has changed."""
    folder = ROOT / "build" / f"native-{kind}"
    sanitizer = "" if kind == "plain" else kind
    tools = Path(sys.executable).parent
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    assert cmake, "no cmake on the PATH or beside this Python; run scripts/setup"
    options = ["-DELASTICKV_BINDINGS=OFF", "-DELASTICKV_NATIVE_TESTS=ON", f"-DELASTICKV_SANITIZE={sanitizer}"]
    if sanitizer:  # reports are easier to read, and compiling takes half as long
        options.append("-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    chosen = ["--target", *targets] if targets else []
    with _alone_in(folder):
        run_native([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options], BUILD_S, PATH=path)
        run_native([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1), *chosen], BUILD_S, PATH=path)
    return folder


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process builds in the folder: scripts/test compiles ahead, and two workers may want one."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + BUILD_S
    with (folder / ".building").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    pytest.fail(f"another process has been building in {folder} for {BUILD_S} s", pytrace=False)
                time.sleep(0.2)
        yield


def standin_libraries(folder: Path) -> Path:
    """Puts libcuda.so.1 and libnvidia-ml.so.1 into the folder, for LD_LIBRARY_PATH, and returns it."""
    built = build("plain", "standin_cuda", "standin_nvml")
    for name, library in (("libcuda.so.1", "libstandin_cuda.so"), ("libnvidia-ml.so.1", "libstandin_nvml.so")):
        (folder / name).symlink_to(built / library)
    return folder


if __name__ == "__main__":
    for one in KINDS:
        build(one)

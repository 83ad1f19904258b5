"""Builds and runs the native tests: as they are, under AddressSanitizer, and under ThreadSanitizer."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from native_build import KINDS, build, run_native

RUN_S = 600


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_native(kind: str) -> None:
    command = [str(build(kind) / "native_tests")]
    if kind == "thread" and shutil.which("setarch"):
        # Where the kernel randomises more address bits than the runtime knows, it refuses to start.
        command = ["setarch", os.uname().machine, "-R", *command]
    output = run_native(
        command,
        RUN_S,
        ASAN_OPTIONS="detect_leaks=1:strict_string_checks=1",
        TSAN_OPTIONS="halt_on_error=1:second_deadlock_stack=1",
    )
    last = output.strip().splitlines()[-1]
    counted = re.fullmatch(r"(\d+) ran, 0 failed", last)
    assert counted, last
    assert int(counted[1]) > 100, last

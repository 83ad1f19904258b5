"""Starts a managed server with arguments that must be refused, each in a fork of one process that has SGLang loaded.

A case is a line of JSON on stdin: {"argv": [...], "environment": {...}}, or with "model" a configuration that the
plug-in looks at, and no server. It is answered with a line: the exit code, what was said, how long it took from the
arguments on, and the commands of processes that were left. The variables are those of a managed engine.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

DEADLINE_S = 240.0
LEAVE_S = 30.0


def main() -> None:
    for module in ("sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler"):
        importlib.import_module(module)  # so that each fork has it
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(case: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _serve(case, said.fileno())
        code = _wait(child, began + DEADLINE_S)
        seconds = time.monotonic() - began
        while (left := _of_session(child)) and time.monotonic() < began + seconds + LEAVE_S:
            time.sleep(0.05)  # helpers of Python's end when they see that nobody is there
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        said.seek(0)
        return {"code": code, "seconds": seconds, "left": list(left.values()), "said": said.read()}


def _serve(case: dict[str, Any], said: int) -> NoReturn:
    os.setsid()
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(case["environment"])
    code = 1
    try:
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()
        if "model" in case:
            _look_at(case["model"])
        else:
            run_server(prepare_server_args(case["argv"]))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - as the interpreter does with what nobody catches
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _look_at(config: dict[str, Any]) -> None:
    """Of a model that SGLang itself does not take on a CPU: what the plug-in says of such a configuration."""
    from transformers import PretrainedConfig

    from elastickv.engines.sglang.entry import check_model

    model = {"hf_config": PretrainedConfig(**config), "is_hybrid_swa": False, "linear_attn_registry_result": None}
    check_model(SimpleNamespace(**model))


def _wait(child: int, until: float) -> int | None:
    """The exit code; None where it had to be killed."""
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _of_session(session: int) -> dict[int, str]:
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                fields = (place / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(place.name)] = command
    return found


if __name__ == "__main__":
    main()

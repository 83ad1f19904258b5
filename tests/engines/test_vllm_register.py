"""What `register` does to vLLM: nothing when it is off, everything when it is on, and a guard when it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.vllm

PREAMBLE = """
import json, sys
from importlib import import_module
from elastickv.engines.vllm import register, seams
from elastickv.errors import EngineRefused
def identities():
    return {f"{s.module}.{s.name}": id(seams.find(s)) for s in seams.here()}
def names():
    from vllm.v1.worker.gpu_worker import Worker
    return sorted(n for n in vars(Worker) if "elastickv" in n)
def caught(call, *args):
    try:
        call(*args)
    except BaseException as error:
        return [type(error).__name__, str(error)]
    return None
"""

Child = tuple[int, dict[str, object], str]


def child(script: str, **environment: str) -> Child:
    """Runs `script` in a fresh interpreter: its exit code, the JSON object it printed last, and stderr."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ELASTICKV", "VLLM_"))}
    extra = {"CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "ERROR", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)],
        env={**own, **extra},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def test_off_leaves_vllm_as_it_was() -> None:
    code, out, err = child(
        """
        register()
        assert not any(name.startswith("vllm") for name in sys.modules), "vLLM was imported"
        before = identities()
        register()
        import os
        for value in ("0", "off", ""):
            os.environ["ELASTICKV"] = value
            register()
        print(json.dumps({"same": identities() == before, "names": names()}))
        """
    )
    assert code == 0, err
    assert out == {"same": True, "names": []}


def test_on_hooks_every_seam_once() -> None:
    code, out, err = child(
        """
        before = identities()
        register()
        first = identities()
        register()
        hooked = sorted(name for name, value in first.items() if value != before[name])
        print(json.dumps({"once": identities() == first, "hooked": hooked, "names": names()}))
        """,
        ELASTICKV="1",
    )
    assert code == 0, err
    assert out["once"] is True
    assert out["names"] == [
        "elastickv_begin",
        "elastickv_fence",
        "elastickv_footprint",
        "elastickv_look",
        "elastickv_report",
        "elastickv_stay_awake",
    ]
    assert out["hooked"] == sorted(
        [
            "vllm._custom_ops.create_onednn_mm",
            "vllm._custom_ops.create_onednn_scaled_mm",
            "vllm.config.scheduler.SchedulerConfig.get_scheduler_cls",
            "vllm.platforms.cpu.CpuPlatform.is_sleep_mode_available",
            "vllm.v1.engine.core.EngineCore._initialize_kv_caches",
            "vllm.v1.engine.core.EngineCore.release_kv_cache_memory",
            "vllm.v1.engine.core.EngineCore.reset_prefix_cache",
            "vllm.v1.engine.core.EngineCore.shutdown",
            "vllm.v1.engine.core.EngineCore.sleep",
            "vllm.v1.engine.core.get_kv_cache_configs",
            "vllm.v1.engine.core.resolve_kv_cache_layout",
            "vllm.v1.executor.abstract.Executor.__init__",
            "vllm.v1.executor.abstract.Executor.compile_or_warm_up_model",
            "vllm.v1.executor.abstract.Executor.determine_available_memory",
            "vllm.v1.executor.abstract.Executor.discard",
            "vllm.v1.executor.abstract.Executor.initialize_from_config",
            "vllm.v1.executor.abstract.Executor.sleep",
            "vllm.v1.executor.abstract.Executor.wake_up",
            "vllm.v1.worker.cpu_worker.CPUWorker.discard",
            "vllm.v1.worker.cpu_worker.CPUWorker.sleep",
            "vllm.v1.worker.cpu_worker.CPUWorker.wake_up",
            "vllm.v1.worker.gpu_worker.Worker._maybe_get_memory_pool_context",
            "vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model",
            "vllm.v1.worker.gpu_worker.Worker.execute_model",
            "vllm.v1.worker.gpu_worker.Worker.initialize_from_config",
            "vllm.v1.worker.gpu_worker.Worker.load_model",
            "vllm.v1.worker.gpu_worker.Worker.reload_weights",
            "vllm.v1.worker.gpu_worker.Worker.shutdown",
            "vllm.v1.worker.gpu_worker.Worker.sleep",
        ]
    )


GUARD = """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    out = {"register": caught(register)}
    out["engine"] = caught(EngineCore, None, None, False)
    out["uni"] = caught(UniProcExecutor, None)
    out["multi"] = caught(MultiprocExecutor, None)
    print(json.dumps(out))
"""

REFUSALS = {
    "a vLLM that is too new": (
        "import vllm.version; vllm.version.__version__ = '0.34.0'",
        {"ELASTICKV": "1"},
        "elastickv cannot manage vLLM 0.34.0: it is written for vLLM >=0.32,<0.34; install such a version, "
        "or unset ELASTICKV to serve without it",
    ),
    "a seam that is gone": (
        "from vllm.v1.engine.core import EngineCore; del EngineCore._initialize_kv_caches",
        {"ELASTICKV": "1"},
        "vLLM 0.32.0 is not built as elastickv expects: there is no "
        "vllm.v1.engine.core.EngineCore._initialize_kv_caches; "
        "use a version of vLLM that this elastickv names, or a newer elastickv",
    ),
    "a seam that takes something else": (
        "from vllm.v1.worker.gpu_worker import Worker; Worker.execute_model = lambda self, batch: None",
        {"ELASTICKV": "1"},
        "vLLM 0.32.0 is not built as elastickv expects: vllm.v1.worker.gpu_worker.Worker.execute_model takes "
        "(self, batch), expected (self, scheduler_output, ...); "
        "use a version of vLLM that this elastickv names, or a newer elastickv",
    ),
    "a setting that is wrong": (
        "",
        {"ELASTICKV": "1", "ELASTICKV_CAPACITY": "lots"},
        "elastickv does not start this engine: ELASTICKV_CAPACITY: 'lots' is not a size; write bytes (1000000), KiB, "
        "MiB, GiB, TiB (512MiB, 1.5GiB), k, m, g, t (the same: 2g is 2GiB), kB, MB, GB, TB. "
        "Correct that, or unset ELASTICKV to serve without it",
    ),
    "a switch that is neither on nor off": (
        "",
        {"ELASTICKV": "maybe"},
        "elastickv does not start this engine: ELASTICKV: 'maybe' is neither on nor off; write 1, on, 0 or off. "
        "Correct that, or unset ELASTICKV to serve without it",
    ),
    "a native part that does not load": (
        "sys.modules['elastickv._core'] = None",
        {"ELASTICKV": "1"},
        "elastickv does not start this engine: ModuleNotFoundError: import of elastickv._core halted; None in "
        "sys.modules. Correct that, or unset ELASTICKV to serve without it",
    ),
}


@pytest.fixture(scope="module")
def refusals() -> dict[str, Child]:
    """What each of them did; two at a time, for each imports vLLM."""
    with ThreadPoolExecutor(2) as threads:
        runs = {
            name: threads.submit(child, f"{spoil}\n{textwrap.dedent(GUARD)}", **environment)
            for name, (spoil, environment, _) in REFUSALS.items()
        }
        return {name: run.result() for name, run in runs.items()}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_lets_no_engine_start(refusals: dict[str, Child], name: str) -> None:
    """Even where vLLM logs what a plug-in raised and goes on."""
    code, out, err = refusals[name]
    assert code == 0, err
    assert set(out) == {"register", "engine", "uni", "multi"}
    for where, found in out.items():
        assert isinstance(found, list), where
        assert found[0] == "EngineRefused", where
        assert found[1] == REFUSALS[name][2], where


def test_without_a_guard_the_process_ends() -> None:
    code, _, err = child(
        """
        sys.modules["vllm.v1.engine.core"] = None
        register()
        print(json.dumps({"served": True}))
        """,
        ELASTICKV="1",
        ELASTICKV_CAPACITY="lots",
    )
    assert code == 12
    assert "ELASTICKV_CAPACITY: 'lots' is not a size" in err
    assert "and the engine cannot be stopped in order" in err

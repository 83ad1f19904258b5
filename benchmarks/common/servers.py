"""Servers for a benchmark, managed and plain, on one device; whatever happens none of them outlives the benchmark."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from benchmarks.common import load, models
from benchmarks.common.engine_kinds import Spec, import_path, kind_of
from benchmarks.common.guard import Guard
from benchmarks.common.schedule import Shape
from elastickv import _core
from elastickv.cli.proof import process_tree
from elastickv.config import Settings, process_environment
from elastickv.demo.engines import Engine
from elastickv.demo.watch import KernelMemory
from elastickv.errors import DeadlineExceeded, EngineRefused
from elastickv.ledger import TenantView, read_device
from elastickv.memory import open_device_ledger

MIB = 1024 * 1024
GIB = 1024 * MIB


class Fleet:
    """The servers of one benchmark. A context manager.

    `capacity`: bytes that the managed ones share; 0: elastickv finds out by itself. `engine`: a key of KINDS.
    `device`: "host" or a GPU's number.
    """

    def __init__(self, engine: str, device: str, model: str, capacity: int, start_s: float = 400.0) -> None:
        self.engine, self.device, self.capacity, self.start_s = engine, device, capacity, start_s
        self.kind = kind_of(engine)
        self._model_name = model
        self._stack = ExitStack()
        self._servers: dict[str, Engine] = {}
        self._count = 0

    def __enter__(self) -> Fleet:
        signal.signal(signal.SIGTERM, _leave)
        with ExitStack() as stack:
            self.place = Path(tempfile.mkdtemp(prefix="elastickv-benchmark-"))
            self._guard = stack.enter_context(Guard(self.place))
            if self.engine == "stand-in":
                self.model = models.Model(self.place, 256, False)
            else:
                self.model = models.prepare(self._model_name, self.place)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            for name in list(self._servers):
                self.stop(name)
            if error is not None and not isinstance(error, SystemExit):
                self._keep_logs()
        finally:
            self._stack.close()

    def _keep_logs(self) -> None:
        """A server that does not start says why in its log, far above the last lines."""
        place = tempfile.mkdtemp(prefix="elastickv-benchmark-logs-")
        for log in self.place.glob("*.log"):
            shutil.copy(log, place)
        print(f"the servers' logs are in {place}", file=sys.stderr)

    @property
    def directory(self) -> Path:
        """Of the ledgers."""
        return self.place / "ledgers"

    def start(self, spec: Spec) -> Engine:
        """Starts a server; does not wait for it."""
        core = self._count
        self._count += 1
        log = self.place / f"{spec.name}-{core}.log"
        server = Engine(
            spec.name,
            self.model.folder,
            log,
            [word for pair in self._options(spec).items() for word in pair],
            self.arguments(spec),
            {**self._environment(spec, core), **spec.environment},
            self.kind.command,
            spec.managed,
        )
        server.start()
        self._servers[spec.name] = server
        if server.process is not None:
            self._guard.add(server.process.pid)
        return server

    def wait_ready(self, *servers: Engine) -> float:
        """Until all of them serve; seconds that took. DeadlineExceeded or EngineRefused with the log's last lines."""
        began = time.monotonic()
        for server in servers:
            server.wait_ready(began + self.start_s)
        return time.monotonic() - began

    def up(self, *specs: Spec) -> list[Engine]:
        """Starts them and waits until all serve.

        On a GPU where the size of a cache is to be found out, one after another, each when the one before serves: no
        start then disturbs another's profile.
        """
        together = self.device == "host" or (self.capacity and not self.kind.profiles)
        groups = [specs] if together else [(spec,) for spec in specs]
        servers: list[Engine] = []
        for group in groups:
            started = [self.start(spec) for spec in group]
            seconds = self.wait_ready(*started)
            print(f"{', '.join(one.name for one in started)}: serving after {seconds:.1f} s", flush=True)
            servers += started
        return servers

    def stop(self, name: str) -> None:
        """Ends a server, if need be by force."""
        server = self._servers.pop(name)
        try:
            server.stop()
        finally:
            self._gone(server)

    def kill(self, name: str) -> Engine:
        """SIGKILL to every process of it; returns at once. Call `reap` afterwards."""
        server = self._servers[name]
        server.signal(signal.SIGKILL)
        return server

    def reap(self, name: str) -> None:
        """Waits for the first process of a server that was killed."""
        server = self._servers.pop(name)
        if server.process is not None:
            server.process.wait(20)
        self._gone(server)

    def _gone(self, server: Engine) -> None:
        if server.process is not None:
            self._guard.remove(server.process.pid)

    def ledger(self) -> _core.Ledger:
        """The device's; there once a managed server has started."""
        device = device_id(self.device)
        arguments = {"directory": str(self.directory), "device": device, "capacity": self.capacity}
        return open_device_ledger(device, Settings.load(arguments=arguments, environ={}))

    def ledger_reader(self, name: str) -> Callable[[], TenantView]:
        """Reads the tenant of that name, cheaply enough to be called every few milliseconds."""
        ledger = self.ledger()
        return lambda: read_device(ledger).tenant(name)

    def kernel_memory(self, server: Engine) -> KernelMemory:
        """What the kernel has allocated for a managed server on the host."""
        kernel = KernelMemory(lambda: processes(server))
        kernel.find()
        return kernel

    def _options(self, spec: Spec) -> dict[str, str]:
        options = {
            "--dir": str(self.directory),
            "--device": "host" if self.device == "host" else "auto",
        }
        if self.capacity:
            options["--capacity"] = str(self.capacity)
        if self.device == "host" and self._model_name == "tiny":
            options["--page"] = str(self.kind.page)
        return options | dict(spec.options)

    def _environment(self, spec: Spec, core: int) -> dict[str, str]:
        # A server that the caller's own settings reach would not be what the result file says.
        own = dict.fromkeys((name for name in process_environment() if name.startswith("ELASTICKV")), "")
        path = os.pathsep.join([*import_path(self.engine), process_environment().get("PYTHONPATH", "")])
        environment = own | {"PYTHONPATH": path.rstrip(os.pathsep)} | dict(self.kind.environment)
        # The capacity is KV memory alone, as a plain engine's is; what measures starting says otherwise.
        environment |= {"ELASTICKV_STATIC": "none"} if spec.managed else dict(self.kind.plain)
        if self.device != "host":
            return environment | {"CUDA_VISIBLE_DEVICES": self.device} | dict(self.kind.on_gpu)
        cores = sorted(os.sched_getaffinity(0))
        return environment | dict(self.kind.on_host(cores[core % len(cores)]))

    def arguments(self, spec: Spec) -> list[str]:
        """Of the server, behind those that every server gets."""
        return self.kind.arguments(spec, spec.kv_bytes or self.capacity, self.model, self.device == "host")

    def requests(self, server: Engine, arrivals: Sequence[float], shape: Shape, seed: int) -> list[load.Request]:
        """One request of that shape to a server for each arrival, with random prompts, in the engine's form."""
        return load.requests(server.url, server.name, arrivals, shape, self.model.vocabulary, seed, form=self.kind.form)


def processes(server: Engine) -> list[int]:
    """Of a server, as they are now."""
    return process_tree(server.process.pid) if server.process is not None else []


def ended(pid: int) -> bool:
    """Every thread of a process has ended, so the kernel has closed its files and taken its memory back.

    A process that nobody has waited for yet is still listed, and so is a first thread that ended before the others.
    """
    try:
        states = [
            (task / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
            for task in Path(f"/proc/{pid}/task").iterdir()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return all(state in "ZX" for state in states)


def device_id(device: str) -> str:
    """The ledger's name of a device: "host", or the GPU's UUID."""
    return "host" if device == "host" else str(_core.open_driver(f"cuda:{device}").device_id)


def try_ready(fleet: Fleet, server: Engine) -> str:
    """Waits for one server: empty, or why it does not serve."""
    try:
        fleet.wait_ready(server)
    except (DeadlineExceeded, EngineRefused) as error:
        return str(error)
    return ""


def plain_twin(spec: Spec, name: str, kv_bytes: int) -> Spec:
    """The same engine without elastickv, with a cache of `kv_bytes`."""
    return replace(spec, name=name, managed=False, kv_bytes=kv_bytes, options={})


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)

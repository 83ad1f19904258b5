"""The idle engine: a thread that answers neighbours, limits and the idle clock while the engine's thread sleeps.

The pool may be changed on the engine's thread only, because what it evicts vLLM must forget at the same moment. An
EngineCoreProc is reached through its own input queue: a no-op message wakes it, and it runs the callbacks that wait
for it to be idle. An engine in the caller's process has no thread; there the thread works itself, between the calls
that the caller makes, under a lock that these calls hold.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreRequestType

from elastickv._core import Pool
from elastickv.errors import ElasticKVError

if TYPE_CHECKING:
    from elastickv.engines.vllm.session import Session

__all__ = ["EngineSteward", "lock_calls"]

_logger = init_logger("vllm.elastickv")

_CALLS: Final = (
    "step",
    "step_with_batch_queue",
    "post_step",
    "add_request",
    "abort_requests",
    "reset_prefix_cache",
    "pause_scheduler",
    "sleep",
    "wake_up",
    "release_kv_cache_memory",
    "collective_rpc",
    "execute_dummy_batch",
)
"""What a caller in the engine's process calls, and what touches the scheduler, the pool or the executor."""

_LEAST_US: Final = 1_000
_BUSY_WAIT_S: Final = 0.5


def lock_calls(engine: Any, lock: Any) -> None:
    """Has the engine's own methods hold `lock`. Called while the engine is being made."""
    for name in _CALLS:
        setattr(engine, name, _locked(getattr(engine, name), lock))


def _locked(method: Callable[..., Any], lock: Any) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return method(*args, **kwargs)

    return call


class EngineSteward:
    """One thread for one engine. start() once, stop() once."""

    def __init__(self, session: Session, native: Pool) -> None:
        self._session = session
        self._native = native
        self._stopping = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elastickv-steward", daemon=True)

    def start(self) -> None:
        """Begins to look after the engine."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """True once the thread has ended; a thread that stops itself counts as ended."""
        self._stopping.set()
        self._done.set()
        self._native.stop_bell()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive() or self._thread is threading.current_thread()

    def _run(self) -> None:
        native = self._native
        seen = native.bell_word()
        while not self._stopping.is_set():
            due = max(native.next_deadline_us(self._session.idle), _LEAST_US)
            rung = native.wait_bell(seen, due)
            seen = native.bell_word()
            if self._stopping.is_set():
                return
            idle = self._session.idle
            if idle and (rung or native.attention() or native.next_deadline_us(True) == 0):
                self._reach()

    def _reach(self) -> None:
        """Has maintain_idle() run where it may, and waits until it has, or until the engine is busy instead."""
        engine = self._session.engine
        if not hasattr(engine, "input_queue"):
            with self._session.lock:
                if self._session.idle and not self._stopping.is_set():
                    self._work(engine)
            return
        callbacks = getattr(engine, "_idle_state_callbacks", None)
        if callbacks is None:  # the engine is still being made
            self._stopping.wait(0.05)
            return
        self._done.clear()
        if self._work not in callbacks:
            callbacks.append(self._work)
        engine.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
        self._done.wait(_BUSY_WAIT_S)

    def _work(self, engine: Any) -> None:
        """On the engine's thread, or under the lock that stands for it."""
        try:
            if not self._stopping.is_set():
                self._session.maintain_idle()
        except ElasticKVError:
            # The engine must not end for what concerns its neighbours; its own next allocation will say more.
            _logger.exception("elastickv could not look after the idle engine")
        finally:
            self._done.set()

"""The worker's part: its memory is the elastic range, and orders to unmap are fenced before the step they came with.

These functions are installed as methods of vLLM's Worker, or around its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from elastickv.engines.footprint import Publisher
from elastickv.engines.vllm import cpu_sleep, footprint, session, watch
from elastickv.engines.vllm.backing import Backing
from elastickv.engines.vllm.scheduler import TICKET
from elastickv.errors import EngineRefused
from elastickv.memory.tenancy import attach_member

__all__ = ["METHODS", "WRAPPERS"]

Method = Callable[..., Any]

_OFF_IN_ENGINE: Final = (
    "elastickv is on in this worker and off in its engine; give both the same environment, "
    "or unset ELASTICKV to serve without it"
)


def _look(worker: Any) -> dict[str, Any]:
    """The rank's device, what it has taken of it, and its attention backends."""
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends

    backends = sorted(backend.get_name() for backend in get_current_attn_backends(worker.vllm_config))
    return {
        "device": footprint.device_of(worker),
        "backends": backends,
        "footprint": footprint.measure(worker),
    }


def _footprint(worker: Any) -> dict[str, Any]:
    """What the rank has besides its cache. From the first time on it is published when it is asked for only."""
    publisher = worker.elastickv_publisher
    publisher.stop()
    return dict(publisher.publish())


def _report(worker: Any) -> dict[str, Any]:
    """Whether this rank's cache lies in the elastic range, and what orders have arrived."""
    backing: Backing | None = getattr(worker, "elastickv", None)
    if backing is None:
        return {"memory": False, "tensors": False, "tickets": 0}
    caches = [cache for cache in worker.model_runner.kv_caches if isinstance(cache, torch.Tensor)]
    lists = [cache for cache in worker.model_runner.kv_caches if isinstance(cache, (list, tuple))]
    caches += [tensor for inner in lists for tensor in inner if isinstance(tensor, torch.Tensor)]
    return {"memory": True, "tensors": backing.holds(caches), **backing.report()}


def _fence(worker: Any, ticket: int) -> None:
    """An order that came by itself, between steps."""
    worker.elastickv.fence(ticket, worker.device)


def _stay_awake(worker: Any) -> None:
    """Another rank could not go to sleep: this one comes back too."""
    if worker.elastickv_sleeper is not None:
        worker.elastickv_sleeper.wake()


METHODS = {
    "elastickv_begin": footprint.begin,
    "elastickv_look": _look,
    "elastickv_footprint": _footprint,
    "elastickv_report": _report,
    "elastickv_fence": _fence,
    "elastickv_stay_awake": _stay_awake,
}
"""Called by the engine through collective_rpc, by these names."""


def _load_model(original: Method) -> Method:
    """Belongs to the tenant before anything is loaded: its static bytes then stay leased until this process ends."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        here = session.newest_here()
        if here is None:  # a process of its own, and an orphan once the engine's has gone
            watch.end_with_parent()
        place = getattr(self.vllm_config, "elastickv_place", None)
        if place is None:
            raise EngineRefused(_OFF_IN_ENGINE)
        self.elastickv_device = place[self.rank]["device"]
        """Its name on the ledger; a MIG instance's differs from what PyTorch says."""
        member = attach_member(place[self.rank])
        if here is not None:
            here.members.append(member)
        publishes = place[self.rank]["publishes"]
        self.elastickv_publisher = Publisher(
            member, lambda: footprint.measure(self), lambda: footprint.glance(self), publishes
        )
        if self.device.type == "cuda":
            self.elastickv_publisher.start()
        self.elastickv_sleeper = cpu_sleep.begin(self)
        with _recording(self):
            return original(self, *args, **kwargs)

    return wrapped


def _reload_weights(original: Method) -> Method:
    """What is packed anew then must be able to sleep too."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _recording(self):
            return original(self, *args, **kwargs)

    return wrapped


def _recording(worker: Any) -> contextlib.AbstractContextManager[None]:
    sleeper: cpu_sleep.Sleeper | None = worker.elastickv_sleeper
    return contextlib.nullcontext() if sleeper is None else sleeper.recording()


def _initialize_from_config(original: Method) -> Method:
    """Attaches before the cache is allocated, and checks after that it was."""

    def wrapped(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        spec = getattr(kv_cache_config, "elastickv", None)
        if spec is None:
            raise EngineRefused(_OFF_IN_ENGINE)
        self.elastickv = Backing(spec)
        result = original(self, kv_cache_config, *args, **kwargs)
        self.elastickv.check_allocated(kv_cache_config.kv_cache_tensors[0].size)
        return result

    return wrapped


def _memory_pool_context(original: Method) -> Method:
    """The elastic range for the tag of the KV cache; vLLM's own choice for every other."""

    def wrapped(self: Any, tag: str) -> contextlib.AbstractContextManager[Any]:
        backing: Backing | None = getattr(self, "elastickv", None)
        if tag == "kv_cache" and backing is not None:
            return backing.allocation()
        context: contextlib.AbstractContextManager[Any] = original(self, tag)
        return context

    return wrapped


def _execute_model(original: Method) -> Method:
    """Fences the order that the step brings, then runs the step."""

    def wrapped(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        ticket = getattr(scheduler_output, TICKET, None)
        if ticket is not None:
            self.elastickv.fence(ticket, self.device)
        return original(self, scheduler_output, *args, **kwargs)

    return wrapped


def _compile_or_warm_up_model(original: Method) -> Method:
    """Has the warm-up write to block 0 only: no other block has memory yet.

    PyTorch's free blocks may be taken from here on, and not before: nothing may be freed while graphs are captured.
    """

    def wrapped(self: Any) -> Any:
        with _writes_to_block_0(self):
            result = original(self)
        backing: Backing | None = getattr(self, "elastickv", None)
        if backing is not None:
            backing.reclaim_from_torch(self.device)
        return result

    return wrapped


@contextlib.contextmanager
def _writes_to_block_0(worker: Any) -> Iterator[None]:
    tables = getattr(worker.model_runner, "block_tables", None)
    if tables is None or not hasattr(tables, "redirect_writes_to_null_block"):
        yield
        return
    before = tables.redirect_writes_to_null_block
    tables.redirect_writes_to_null_block = True
    try:
        yield
    finally:
        tables.redirect_writes_to_null_block = before


def _shutdown(original: Method) -> Method:
    """Unmaps after vLLM has let go."""

    def wrapped(self: Any) -> Any:
        try:
            return original(self)
        finally:
            backing: Backing | None = getattr(self, "elastickv", None)
            if backing is not None:
                backing.close()
            sleeper: cpu_sleep.Sleeper | None = getattr(self, "elastickv_sleeper", None)
            if sleeper is not None:
                sleeper.close()

    return wrapped


WRAPPERS = {
    "load_model": _load_model,
    "reload_weights": _reload_weights,
    "initialize_from_config": _initialize_from_config,
    "_maybe_get_memory_pool_context": _memory_pool_context,
    "execute_model": _execute_model,
    "compile_or_warm_up_model": _compile_or_warm_up_model,
    "shutdown": _shutdown,
}

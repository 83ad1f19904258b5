"""Sleep: all pages of the cache and what vLLM frees go back at once; waking takes its lease before it takes memory.

On a GPU vLLM saves, discards and restores what is its own; on a CPU cpu_sleep.py does. The cache is not saved: vLLM
forgets its contents before it sleeps, and it fills again when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Final

from vllm.logger import init_logger

from elastickv.engines.unmapped import wait_unmapped
from elastickv.engines.vllm import cpu_sleep
from elastickv.errors import LimitExceeded, Unavailable
from elastickv.units import format_size

if TYPE_CHECKING:
    from elastickv.engines.vllm.session import Session

__all__ = ["before_wake", "fell_asleep", "stayed_asleep", "stayed_awake", "woke", "worker_sleep"]

_logger = init_logger("vllm.elastickv")

_GREW: Final = "Memory usage increased after sleeping."
_WEIGHTS: Final = "weights"
_UNDO_S: Final = 600.0


def fell_asleep(session: Session, tags: Collection[str]) -> None:
    """The engine's memory of these tags is gone: gives back the cache's pages and what is not held any more."""
    kept = _give_pages(session)
    session.static_lease.shrink(session.footprints())
    session.describe(f"asleep: {', '.join(sorted(tags))}")
    _logger.info(
        "elastickv: asleep (%s), holding %s and %s of the cache",
        ", ".join(sorted(tags)),
        session.static_lease.describe(),
        format_size(kept),
    )


def _give_pages(session: Session) -> int:
    """Unmaps everything but the null block's page and waits until it is; returns the bytes that are leased then."""
    pool, tenancy = session.pool, session.tenancy
    if pool is None or tenancy is None:
        return 0
    pool.forget(pool.native.give_all())
    session.flush()
    wait_unmapped(pool.native)
    return sum(tenant.leased for tenant in tenancy.tenants.values())


def before_wake(session: Session, tags: Sequence[str] | None, asleep: Collection[str]) -> None:
    """Leases what waking needs, waiting its turn. Unavailable, and the engine sleeps on, if it cannot be had.

    `tags`: what is to be woken, None or nothing: all of it; `asleep`: what sleeps now.
    """
    if not asleep or any(tag not in asleep for tag in tags or ()):
        return  # vLLM does nothing either
    weights = _WEIGHTS in asleep and (not tags or _WEIGHTS in tags)
    try:
        session.static_lease.grow_to_wake(session.footprints(), weights=weights)
    except (Unavailable, LimitExceeded) as error:
        text = f"elastickv: the engine stays asleep: {error.message}; wake it again later"
        raise type(error)(text, **error.attributes) from None


def woke(session: Session, asleep: Collection[str]) -> None:
    """After vLLM has woken what it was asked to; `asleep`: what still sleeps."""
    session.describe(f"asleep: {', '.join(sorted(asleep))}" if asleep else "")
    session.footprints()


def stayed_awake(session: Session) -> None:
    """A rank could not go to sleep. On a CPU nothing is lost: those that did come back, and the engine serves on."""
    if not cpu_sleep.wanted(session.config) or session.executor is None:
        return
    session.executor.collective_rpc("elastickv_stay_awake", timeout=_UNDO_S)
    if not session.was_paused and not session.executor.is_sleeping:
        session.engine.resume_scheduler()


def stayed_asleep(session: Session) -> None:
    """A rank could not wake: only what the ranks have stays leased, and the next try begins there."""
    if cpu_sleep.wanted(session.config):
        session.static_lease.shrink(session.footprints())


def worker_sleep(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM compares the device's free memory before and after; a neighbour that grew meanwhile is no failure."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except AssertionError as error:
            if str(error) != _GREW:
                raise
            _logger.info("elastickv: other processes on the device took more memory than this sleep has freed")
            return None

    return wrapped

"""What one rank's allocator may hand out, and how that changes.

The first rank of an engine decides: it has the pool. The others are told, decision for decision, and come to the same
lists, for they ask at the same points of the same program (channel.py). All of it is the scheduler's thread's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from elastickv._core import Pool

if TYPE_CHECKING:
    from elastickv.engines.sglang.channel import Channel

__all__ = ["Growth", "Left", "Look", "Ration", "Runs"]

Runs = list[tuple[int, int]]
"""Blocks as (first, number) of what follows one another, ascending."""

_LOOK_EVERY_S: Final = 0.005
"""How often the ledger is asked how much more could be had, and the idle clock is read."""

_RETRY_EVERY_S: Final = 0.05
"""As often as a demand is refreshed, or it lapses (memory/asking.py)."""

_ROUNDS: Final = 12
"""Rounds of dropping prefixes for one demand. Each asks for twice as many, so this ends with all of them."""

_WHY_NEED: Final = 0

_Told = TypeVar("_Told")


class Growth(msgspec.Struct, array_like=True):
    """Blocks that were added, and how many more could be."""

    runs: Runs
    growable: int


class Look(msgspec.Struct, array_like=True):
    """A look at what is asked of this engine. `reclaim`: something is, and the engine is `idle` or not.

    `preempt`: a limit that was ordered to hold now needs running requests to go. `retry`: what
    was refused is to be asked for again, or the demand for it lapses.
    """

    growable: int
    reclaim: bool = False
    idle: bool = False
    preempt: bool = False
    ticket: int = 0
    retry: bool = False


class Left(msgspec.Struct, array_like=True):
    """The list of free blocks after a round of giving back. `evict`: blocks whose prefixes go before the next one."""

    runs: Runs
    evict: int
    why: int
    ticket: int


class Ration:
    """One rank's. `pool`: of the rank that decides, None on the others."""

    def __init__(self, pool: Pool | None, channel: Channel, blocks: int, ask: Callable[[int, bool], None]) -> None:
        """`blocks`: that SGLang knows, without block 0. `ask`: has the pool ensure so many (patiently or not)."""
        self.pool = pool
        self.channel = channel
        self.blocks = blocks
        self.held = 0
        """Blocks in SGLang's hands: on its list, in use or cached."""
        self.growable = 0
        """Blocks that could be had besides, when it was last asked."""
        self.ticket = 0
        self.tree: Any = None
        self.is_idle: Callable[[], bool] = lambda: False
        self.is_running: Callable[[], bool] = lambda: False
        self.on_more: Callable[[], None] = lambda: None
        """Called by a look that finds that more could be had than before it, or that a demand has to be made again."""
        self._ask = ask
        self._mask = torch.zeros(blocks + 1, dtype=torch.bool)
        self._allocator: Any = None
        self._lent = (-1, -1)
        self._listed = torch.empty(0, dtype=torch.int64)
        self._preempt = False
        self._look_again = 0.0
        self._idle_due = 0.0
        self._unmet = False
        self._retry_again = 0.0

    def adopt(self, allocator: Any) -> None:
        """The allocator whose list this is."""
        self._allocator = allocator

    def held_ids(self) -> torch.Tensor:
        """Ids of all blocks in SGLang's hands, ascending."""
        return self._mask.nonzero().flatten()

    def _decide(self, kind: str, compute: Callable[[Pool], _Told], told: type[_Told]) -> _Told:
        """What the deciding rank computes, on every rank."""
        if self.pool is None:
            return self.channel.hear(kind, told)
        decision = compute(self.pool)
        self.channel.tell(kind, decision)
        return decision

    # --- growing

    def grow(self, missing: int) -> None:
        """Adds at least so many blocks to the list if they can be had, and mapped, now."""
        running = self.is_running()
        growth = self._decide("grow", lambda pool: self._grown(pool, missing, running), Growth)
        self._add(growth.runs)
        self.growable = growth.growable

    def _grown(self, pool: Pool, missing: int, running: bool) -> Growth:
        self._lend(pool)
        # Where requests run, waiting holds them up, and SGLang finds something else to do. Otherwise it costs nothing.
        self._ask(missing, not running)
        runs = self._clip(pool.take_runs(pool.num_available()))
        gained = sum(n for _, n in runs)
        if gained >= missing:
            return Growth(runs, max(0, self.growable - gained))
        self._unmet = True
        return Growth(runs, self._headroom(pool, gained))

    def _clip(self, runs: Runs) -> Runs:
        """Without the blocks above SGLang's last; with several stripes there are some, so that stripes fill pages."""
        end = self.blocks + 1
        return [(first, min(n, end - first)) for first, n in runs if first < end]

    def _headroom(self, pool: Pool, gained: int = 0) -> int:
        room = pool.num_available() + pool.headroom()
        return max(0, min(room, self.blocks - self.held - gained))

    def _add(self, runs: Runs) -> None:
        for first, n in runs:
            self._mask[first : first + n] = True
            self.held += n
        if runs:
            self._allocator.append(runs)

    # --- giving back

    def look(self) -> int:
        """Between two steps: does what neighbours, limits and the idle clock ask. Returns the newest order's ticket."""
        look = self._decide("look", self._looked, Look)
        more = look.growable > self.growable
        self.growable, self._preempt = look.growable, look.preempt
        if more or look.retry:
            self.on_more()
        self.ticket = max(self.ticket, look.ticket)
        if look.reclaim:
            self._reclaim(look.idle)
        return self.ticket

    def _looked(self, pool: Pool) -> Look:
        now = time.monotonic()
        if not pool.attention() and now < self._look_again:
            return Look(self.growable, preempt=self._preempt, ticket=pool.ticket())
        self._look_again = now + _LOOK_EVERY_S
        self._lend(pool)
        idle = self.is_idle()
        due = idle and now >= self._idle_due and self._due(pool, now)
        preempt = not idle and pool.preempt_blocks() > 0
        room = self._headroom(pool)
        retry = self._unmet and now >= self._retry_again
        if retry:
            self._unmet, self._retry_again = False, now + _RETRY_EVERY_S
        return Look(room, pool.attention() or due, idle, preempt, pool.ticket(), retry)

    def _due(self, pool: Pool, now: float) -> bool:
        left_us = pool.next_deadline_us(True)
        self._idle_due = now + left_us / 1e6
        return left_us == 0

    def _reclaim(self, idle: bool) -> None:
        """Rounds of giving back free blocks, and dropping prefixes where these do not do."""
        factor = 1
        for round_ in range(_ROUNDS):
            last = round_ == _ROUNDS - 1 or self._cached() == 0
            # The rank that decides sorts its list to read it. The others must, too, or they hand out other blocks.
            self._allocator.merge_and_sort_free()
            left = self._decide("left", lambda pool, last=last: self._left(pool, idle, last), Left)  # type: ignore[misc]
            self._shrink(left)
            if last or left.evict == 0:
                return
            tokens = left.evict * factor * self._allocator.page_size
            gone = self.tree.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted // self._allocator.page_size
            if self.pool is not None:
                self.pool.count_evicted(left.why, gone)
            factor *= 2

    def _left(self, pool: Pool, idle: bool, last: bool) -> Left:
        pool.lend(self._allocator.free_blocks(), self._cached())
        self._listed = self._allocator.census()
        runs, evict, why = pool.reclaim(self._listed.numpy(), idle, last)
        self._lent = (-1, -1)
        return Left(runs, evict, why, pool.ticket())

    def _shrink(self, left: Left) -> None:
        before = self._allocator.free_blocks()
        kept = sum(n for _, n in left.runs)
        if kept != before:
            used = self.held - before
            self._forget_free(left.runs)
            self._allocator.replace(left.runs)
            self.held = used + kept
        self.ticket = max(self.ticket, left.ticket)

    def _forget_free(self, runs: Runs) -> None:
        self._mask[self._allocator.census() if self.pool is None else self._listed] = False
        for first, n in runs:
            self._mask[first : first + n] = True

    def _cached(self) -> int:
        if self.tree is None:
            return 0
        return int(self.tree.evictable_size()) // int(self._allocator.page_size)

    def _lend(self, pool: Pool) -> None:
        lent = (self._allocator.free_blocks(), self._cached())
        if lent != self._lent:
            pool.lend(*lent)
            self._lent = lent

    def count_evicted(self, blocks: int) -> None:
        """Prefixes that this engine dropped for its own requests."""
        if self.pool is not None and blocks:
            self.pool.count_evicted(_WHY_NEED, blocks)

    def must_preempt(self) -> bool:
        """Whether a limit that was ordered to hold now needs a running request to go; asked again after each."""
        if self._preempt:
            self._preempt = self._decide("preempt", self._must_preempt, Look).preempt
        return self._preempt

    def _must_preempt(self, pool: Pool) -> Look:
        self._lend(pool)
        return Look(self.growable, preempt=pool.preempt_blocks() > 0)

    def give_all(self) -> int:
        """Gives back every block without a request, the floor's too, and returns the order's ticket.

        For an engine that has forgotten its prefixes and is to hold nothing.
        """
        self._allocator.merge_and_sort_free()  # on every rank: the order of the list must be the same
        left = self._decide("all", self._gave_all, Left)
        self._shrink(left)
        self.growable = 0
        return self.ticket

    def _gave_all(self, pool: Pool) -> Left:
        self._listed = self._allocator.census()
        pool.lend(0, 0)
        pool.release(self._listed.tolist())
        pool.give_all()
        runs = self._clip(pool.take_runs(pool.num_available()))
        self._lent = (-1, -1)
        return Left(runs, 0, _WHY_NEED, pool.ticket())

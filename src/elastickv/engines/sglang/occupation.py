"""Release and resume of memory: leases of what really goes away go back, and come first when it is to come back.

On a GPU SGLang's memory saver frees and takes what is its own, if it is on; on a CPU, where there is none, weights go
to a file (engines/sleeper.py). A call that cannot be granted changes nothing and says why: SGLang's own would end the
engine. While something is not there that a step would touch, no step is run, and requests wait.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

import msgspec

from elastickv.engines.sglang import ranks
from elastickv.engines.sglang.holdings import Holdings
from elastickv.engines.sglang.memory_calls import BUSY
from elastickv.engines.unmapped import wait_unmapped
from elastickv.errors import ElasticKVError, LimitExceeded, Unavailable

if TYPE_CHECKING:
    from elastickv.engines.sglang.session import Session

__all__ = ["Occupation", "Turn"]

_WEIGHTS: Final = "weights"
_CACHE: Final = "kv_cache"
_GRAPHS: Final = "cuda_graph"
_ALL: Final = (_CACHE, _WEIGHTS, _GRAPHS)
"""SGLang's own tags (constants.py of 0.5.23); all of them are meant where a call names none."""

Call = Callable[[list[str]], object]
"""SGLang's own part of it, for some tags."""


class Turn(msgspec.Struct, array_like=True):
    """What the rank that decides says while it waits for a lease. `done`: it has it, or has `refused` to go on."""

    done: bool = False
    refused: str = ""


class Occupation:
    """Of one rank; used by the scheduler's thread. Every rank does the same at the same point."""

    def __init__(self, session: Session, holdings: Holdings) -> None:
        self._session = session
        self._holdings = holdings
        self._gone: list[str] = []
        self._later: list[Callable[[], None]] = []
        self._waiting = False

    @property
    def holds_back(self) -> bool:
        """Whether something is not in memory that a step would touch."""
        return bool(self._gone) and (self._holdings.saver_on or bool(self._own(self._gone)))

    def _own(self, tags: Collection[str]) -> list[str]:
        """Those that this plug-in sees to."""
        return [tag for tag in tags if tag == _WEIGHTS and self._holdings.sleeper is not None]

    # --- when

    def call(self, do: Callable[[], str], answer: Callable[[str], None]) -> str | None:
        """Does it now. With pipeline stages before the next step, and None is returned: a stage hands requests on
        after it has dealt with them, so the next one would be waited for in vain. `answer` gets what `do` returns.
        """
        if int(self._session.scheduler.server_args.pp_size) == 1:
            return do()
        self._later.append(lambda: answer(do()))
        return None

    def do_later(self) -> None:
        """Before a step: what call() has put off."""
        while self._later:
            self._later.pop(0)()

    # --- what

    def release(self, tags: Collection[str], original: Call) -> str:
        """Gives up `tags`, or all. Returns why not, with everything as it was; nothing where it is done."""
        asked = [tag for tag in tags or _ALL if tag not in self._gone]
        if not asked:
            return ""
        if not all(ranks.gather(self._session.release.idle(self._session.scheduler))):
            return BUSY
        sleeper = self._holdings.sleeper
        if self._own(asked) and sleeper is not None and (failed := self._everywhere(sleeper.sleep)):
            if broken := self._everywhere(sleeper.wake):
                raise Unavailable(f"{broken}; and it had to come back because another rank failed: {failed}")
            return failed
        self._let(original, asked)
        self._gone += asked
        if _CACHE in asked:
            self._give_pages()
        self._holdings.shrink(self._gone)
        self._describe()
        return ""

    def resume(self, tags: Collection[str], original: Call) -> str:
        """Takes `tags` back, or all, their lease first. Returns why not: it can be tried again."""
        asked = [tag for tag in tags or _ALL if tag in self._gone]
        if not asked:
            return ""
        if refused := self._lease(weights=not {_WEIGHTS, _GRAPHS}.isdisjoint(asked)):
            return refused
        sleeper = self._holdings.sleeper
        if self._own(asked) and sleeper is not None and (failed := self._everywhere(sleeper.wake)):
            self._holdings.shrink(self._gone)
            return failed
        self._let(original, asked)
        self._gone = [tag for tag in self._gone if tag not in asked]
        if self._gone:
            self._holdings.shrink(self._gone)
        self._holdings.publish(self._gone)
        self._describe()
        return ""

    def _let(self, original: Call, asked: list[str]) -> None:
        own = self._own(asked)
        if rest := [tag for tag in asked if tag not in own]:  # none would mean all of them to SGLang
            original(rest)

    @staticmethod
    def _everywhere(action: Callable[[], None]) -> str:
        """Does it on every rank; why the first one could not, if one could not."""
        mine = ""
        try:
            action()
        except ElasticKVError as error:
            mine = error.message
        return next((text for text in ranks.gather(mine) if text), "")

    # --- leases

    def _lease(self, *, weights: bool) -> str:
        """What comes back is leased, or why not; the other ranks hear what the one that decides has got."""
        reports = ranks.gather(self._holdings.publish(self._gone))
        lease, channel = self._holdings.lease, self._session.channel
        if lease is None:
            while not (turn := channel.hear("wake", Turn)).done:
                self._session.tick()
            return turn.refused
        refused = ""
        self._waiting = True
        try:
            lease.grow_to_wake(reports, weights=weights)
        except (Unavailable, LimitExceeded) as error:
            refused = f"elastickv: the engine stays asleep: {error.message}; wake it again later"
        finally:
            self._waiting = False
        channel.tell("wake", Turn(True, refused))
        return refused

    def while_waiting(self) -> None:
        """What goes on while the rank that decides waits for that lease; the others do the same."""
        if self._waiting:
            self._session.channel.tell("wake", Turn())
            self._session.tick()

    def _give_pages(self) -> None:
        """All pages of the cache go back at once, and are unmapped on return: SGLang has dropped its prefixes."""
        self._session.order_all_back()
        cache = self._session.cache
        if cache is not None:
            wait_unmapped(cache.pool)

    def _describe(self) -> None:
        state = f", asleep: {', '.join(sorted(self._gone))}" if self._gone else ""
        tenancy = self._session.tenancy
        for tenant in tenancy.tenants.values() if tenancy is not None else ():
            tenant.describe(engine=f"sglang {self._session.version}{state}")

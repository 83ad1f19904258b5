"""Refusing: what makes sure that an SGLang which cannot be managed does not start.

SGLang logs what a plug-in raises, and what hooking raises, and serves on without either. So the one class that every
engine needs is wrapped here directly: it is not made where something is missing. So is the check of arguments that the
called process makes before it starts others, for there a refusal ends it at once and in its own words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from elastickv.engines import seams
from elastickv.engines.refusal import refuse as _refuse

__all__ = ["examine", "refuse", "watch"]


def refuse(error: BaseException) -> NoReturn:
    """Lets no engine start in this process, and raises the reason as EngineRefused."""
    _refuse(error, _bar)


def _bar(reason: Exception) -> None:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.server_args import ServerArgs

    def refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise reason

    Scheduler.__init__ = refused
    ServerArgs.check_server_args = refused


def examine(check: Callable[[Any], None]) -> None:
    """Has the arguments of every engine that this process starts looked at first; `check` may raise."""
    from sglang.srt.server_args import ServerArgs

    def make(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def examined(self: Any) -> None:
            check(self)
            original(self)

        return examined

    seams.wrap(ServerArgs, "check_server_args", make)


def watch(before: Callable[[Any], None], after: Callable[[Any], None], failed: Callable[[], None]) -> None:
    """Has every Scheduler that is made in this process looked at: `before` it is, and `after`. Either may raise.

    `failed` is called where making it fails, whoever raised.
    """
    from sglang.srt.managers.scheduler import Scheduler

    original = Scheduler.__init__
    if getattr(original, "_elastickv", False):
        return

    @functools.wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            before(self)
            original(self, *args, **kwargs)
            after(self)
        except BaseException:  # whatever it was goes on; the engine's place on the ledger must not stay
            failed()
            raise

    made._elastickv = True  # type: ignore[attr-defined]
    Scheduler.__init__ = made

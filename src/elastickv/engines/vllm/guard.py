"""Refusing: what makes sure that a vLLM which cannot be managed does not start."""

from __future__ import annotations

from typing import Any, NoReturn

from elastickv.engines.refusal import refusal
from elastickv.engines.refusal import refuse as _refuse

__all__ = ["refusal", "refuse"]


def refuse(error: BaseException) -> NoReturn:
    """Lets no engine start in this process, and raises the reason as EngineRefused."""
    _refuse(error, _bar)


def _bar(reason: Exception) -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    def refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise reason

    EngineCore.__init__ = refused
    Executor.__init__ = refused

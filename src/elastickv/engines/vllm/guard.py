"""Refusing: what makes sure that an engine which cannot be managed does not start.

Everything here works without the rest of the package, which may be what is broken.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

__all__ = ["refuse", "refusal"]


def refusal(error: BaseException) -> Exception:
    """`error` as an EngineRefused whose text says what to do."""
    from elastickv.errors import ElasticKVError, EngineRefused

    if isinstance(error, EngineRefused):
        return error
    reason = error.message if isinstance(error, ElasticKVError) else f"{type(error).__name__}: {error}"
    return EngineRefused(
        f"elastickv does not start this engine: {reason}. Correct that, or unset ELASTICKV to serve without it"
    )


def refuse(error: BaseException) -> NoReturn:
    """Lets no engine start in this process, and raises the reason as EngineRefused.

    Ends the process with EngineRefused's exit code if the guard cannot be put in place.
    """
    text = str(error)
    try:
        reason = refusal(error)
        text = str(reason)
        _bar(reason)
    except BaseException as failure:  # noqa: BLE001 - nothing is left to rely on but the exit code
        sys.stderr.write(f"{text}\nelastickv: and the engine cannot be stopped in order ({failure!r}); exiting\n")
        sys.stderr.flush()
        os._exit(12)
    raise reason from error


def _bar(reason: Exception) -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    def refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise reason

    EngineCore.__init__ = refused
    Executor.__init__ = refused

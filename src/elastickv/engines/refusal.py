"""Refusing: what makes sure that an engine which cannot be managed does not start.

Everything here works without the rest of the package, which may be what is broken.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["EXIT_REFUSED", "refusal", "refuse"]

EXIT_REFUSED = 12
"""EngineRefused's exit code (errors.py)."""


def refusal(error: BaseException) -> Exception:
    """`error` as an EngineRefused whose text says what to do."""
    from elastickv.errors import ElasticKVError, EngineRefused

    if isinstance(error, EngineRefused):
        return error
    reason = error.message if isinstance(error, ElasticKVError) else f"{type(error).__name__}: {error}"
    return EngineRefused(
        f"elastickv does not start this engine: {reason}. Correct that, or unset ELASTICKV to serve without it"
    )


def refuse(error: BaseException, bar: Callable[[Exception], None]) -> NoReturn:
    """Lets no engine start in this process, and raises the reason as EngineRefused.

    `bar` makes every engine's construction raise what it is given; where it fails, the process ends with
    EngineRefused's exit code.
    """
    text = str(error)
    try:
        reason = refusal(error)
        text = str(reason)
        bar(reason)
    except BaseException as failure:  # noqa: BLE001 - nothing is left to rely on but the exit code
        sys.stderr.write(f"{text}\nelastickv: and the engine cannot be stopped in order ({failure!r}); exiting\n")
        sys.stderr.flush()
        os._exit(EXIT_REFUSED)
    raise reason from error

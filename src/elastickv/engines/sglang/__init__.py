"""The SGLang plug-in: `register` is the entry point of the group sglang.srt.plugins.

SGLang calls it in every process that it starts. Switched off, it returns at once and SGLang is as it was. Switched on,
it registers its hooks or leaves a guard behind that stops the engine: SGLang logs a plug-in's failure and goes on, and
an engine that serves unmanaged in silence is worse than one that does not start.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Installs the plug-in if ELASTICKV is on. Raises EngineRefused, and no engine starts here, if that fails."""
    from elastickv.engines.sglang import guard

    try:
        from elastickv.config import is_enabled

        if not is_enabled():
            return
        from elastickv.engines.sglang.install import install

        install()
    except Exception as error:  # noqa: BLE001 - the border to SGLang: whatever went wrong, it must not serve unmanaged
        guard.refuse(error)

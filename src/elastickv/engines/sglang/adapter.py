"""What doctor and run ask before an engine is started."""

from __future__ import annotations

from importlib import metadata
from typing import Final

from elastickv.config import process_environment
from elastickv.engines import seams
from elastickv.engines.base import Adapter, Server
from elastickv.engines.sglang import releases
from elastickv.errors import ElasticKVError

__all__ = ["ADAPTER"]

_DISTRIBUTION: Final = "sglang"
_PLUGIN: Final = "elastickv"
_CHOICE: Final = "SGLANG_PLUGINS"
"""SGLang loads every plug-in where this is unset or empty, and the ones it names where it is set."""


class _Sglang:
    name = "sglang"
    versions = releases.VERSIONS
    server = Server(
        module="sglang.launch_server",
        model_option="--model-path",
        name_option="--served-model-name",
        # Without the latter its memory saver on a GPU forgets the weights.
        sleep_arguments=("--enable-memory-saver", "--enable-weights-cpu-backup"),
        environment=(),
        sleep="/release_memory_occupation",
        wake="/resume_memory_occupation",
        asleep="",
    )

    def installed_version(self) -> str | None:
        try:
            return metadata.version(_DISTRIBUTION)
        except metadata.PackageNotFoundError:
            return None

    def problems(self) -> list[str]:
        version = self.installed_version()
        if version is None:
            return [f"SGLang is not installed here; install sglang {releases.VERSIONS}"]
        points = metadata.entry_points(group="sglang.srt.plugins")
        found = [] if any(point.name == _PLUGIN for point in points) else [_NOT_REGISTERED]
        if self.environment():
            chosen = process_environment().get(_CHOICE)
            found.append(f"{_CHOICE}={chosen!r} keeps the plug-in out; add {_PLUGIN} to it or unset it")
        try:
            seams.check(f"SGLang {version}", releases.find(version).seams)
        except ElasticKVError as error:
            found.append(error.message)
        except ImportError as error:
            found.append(f"SGLang {version} cannot be imported: {error}; repair its installation")
        return found

    def environment(self) -> dict[str, str]:
        chosen = process_environment().get(_CHOICE, "")
        if not chosen or _PLUGIN in (name.strip() for name in chosen.split(",")):
            return {}
        return {_CHOICE: f"{chosen},{_PLUGIN}"}


_NOT_REGISTERED: Final = (
    "SGLang would not load the plug-in: no entry point sglang.srt.plugins:elastickv is installed; "
    "install the elastickv package into this environment"
)

ADAPTER: Final[Adapter] = _Sglang()

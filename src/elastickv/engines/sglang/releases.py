"""The releases of SGLang that are managed."""

from __future__ import annotations

import re
from typing import Final

from elastickv.engines.sglang import release_0_5_16, release_0_5_23
from elastickv.engines.sglang.release import Release
from elastickv.errors import EngineRefused

__all__ = ["VERSIONS", "find"]

_RELEASES: Final = (release_0_5_16.RELEASE, release_0_5_23.RELEASE)

VERSIONS: Final = " or ".join(release.versions for release in _RELEASES)
"""All of them, for people."""


def find(version: str) -> Release:
    """The release of an SGLang of that version. EngineRefused where none is managed."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is not None:
        found = (int(match[1]), int(match[2]), int(match[3]))
        for release in _RELEASES:
            if release.lowest <= found < release.below:
                return release
    raise EngineRefused(
        f"elastickv cannot manage SGLang {version}: it is written for SGLang {VERSIONS}; install such a version, "
        "or unset ELASTICKV to serve without it"
    )

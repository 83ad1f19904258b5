"""Lets SGLang 0.5.16 run beside a newer transformers than the one it asks for (5.12.1).

It registers configurations of its own under names that transformers has taken since, and transformers refuses a second
configuration of one name. Python imports this file at its start where its folder is on the path.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "transformers.models.auto.configuration_auto"


class _Finder(MetaPathFinder, Loader):
    """Finds that one module, once, and lets a configuration be registered anew when it has been loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        mapping: Any = module._LazyConfigMapping
        register = mapping.register
        mapping.register = lambda self, key, value, exist_ok=False: register(self, key, value, exist_ok=True)


sys.meta_path.insert(0, _Finder())

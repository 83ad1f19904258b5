"""The family of errors."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path

import pytest

from elastickv import errors

ROOT = Path(__file__).resolve().parent.parent
FAMILY = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.ElasticKVError)]


@pytest.mark.parametrize("kind", FAMILY)
def test_pickle_keeps_class_text_and_attributes(kind: type[errors.ElasticKVError]) -> None:
    before = kind("lease 2 MiB: the limit is 1 MiB", bytes=2 << 20, limit=1 << 20)
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is kind
    assert str(after) == "lease 2 MiB: the limit is 1 MiB"
    assert after.attributes == {"bytes": 2 << 20, "limit": 1 << 20}


def test_exit_codes_tell_the_classes_apart() -> None:
    codes = {kind.__name__: kind.exit_code for kind in FAMILY}
    assert 0 not in codes.values()
    shared = {name for name, code in codes.items() if list(codes.values()).count(code) > 1}
    assert shared == {"ConfigError", "InvalidArgument"}


def test_every_code_of_the_core_has_its_class() -> None:
    source = (ROOT / "src/core/base/status.cpp").read_text(encoding="utf-8")
    codes = set(re.findall(r'case Code::\w+: return "(\w+)"', source)) - {"ok"}
    assert len(codes) >= 10
    kinds = {code: type(errors.from_code(code, "text")) for code in codes}
    assert errors.ElasticKVError not in kinds.values()
    assert len(set(kinds.values())) == len(codes)


def test_a_code_from_another_version_is_not_lost() -> None:
    error = errors.from_code("melted", "the device is hot")
    assert type(error) is errors.ElasticKVError
    assert str(error) == "melted: the device is hot"


def test_the_picture_in_the_docstring_is_the_family() -> None:
    drawn = dict(re.findall(r"(\w+)\s+(?:exit code )?(\d+)\b", errors.__doc__ or ""))
    assert drawn == {kind.__name__: str(kind.exit_code) for kind in FAMILY}


def test_the_docs_list_every_class_and_exit_code() -> None:
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE))
    assert listed == {kind.__name__: str(kind.exit_code) for kind in FAMILY}

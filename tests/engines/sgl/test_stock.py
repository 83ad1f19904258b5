"""Plain SGLang: what it answers depends on the cache and on nothing else, so comparisons with it can fail."""

from __future__ import annotations

import pytest

from engines.conftest import PlainSGLang
from engines.oracle import differences

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def test_answers_do_not_depend_on_batches_and_cached_prefixes(plain_sglang: PlainSGLang) -> None:
    first, second = plain_sglang.left_alone
    assert sum(second.cached) > sum(first.cached) > 0
    assert first.steps != second.steps
    assert differences(first.tokens, second.tokens) == []


def test_a_corrupted_page_is_seen(plain_sglang: PlainSGLang) -> None:
    assert len(plain_sglang.corrupted.damaged) == 4
    assert differences(plain_sglang.left_alone[0].tokens, plain_sglang.corrupted.tokens) != []


def test_a_page_in_use_without_memory_ends_the_engine(plain_sglang: PlainSGLang) -> None:
    assert "before 'round'" in plain_sglang.unmapped
    assert "crashed with exit code -11" in plain_sglang.unmapped

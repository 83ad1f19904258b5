"""What the requests that wait would take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from elastickv.memory.asking import QUEUE_SEEN

__all__ = ["queued_tokens"]


def queued_tokens(queue: Sequence[Any]) -> int:
    """Tokens of the requests (SGLang's Req) behind the first one, if no prefix of theirs were cached."""
    behind = islice(queue, 1, 1 + QUEUE_SEEN)
    return sum(len(request.origin_input_ids) + len(request.output_ids) for request in behind)

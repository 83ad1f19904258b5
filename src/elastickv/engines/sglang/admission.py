"""What a prefill may count on: memory is leased and mapped before SGLang promises it to a request.

SGLang admits by numbers and allocates later, and an allocation that fails then ends the engine. So what a request
needs at once is secured when it is admitted; what it may need later is only counted.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.prefill_budget import PrefillBudget

__all__ = ["ElasticPrefillBudget"]


class ElasticPrefillBudget(PrefillBudget):  # type: ignore[misc]
    """For one pass over the waiting requests."""

    _chunk_waits = False
    """One that has begun lacks memory. Nobody else begins: SGLang knows of one only, and takes it for a part of every
    batch."""

    def _secured(self, tokens: int) -> bool:
        return bool(self.allocator.admits(self.tree_cache, promised=self.current_offset, tokens=tokens))

    def check_prefill(
        self, *, extend_input_len: int, total_tokens: int, chunk_limit: int | None, **kwargs: Any
    ) -> tuple[bool, int | None]:
        if self._chunk_waits:
            return False, None
        kwargs |= {"extend_input_len": extend_input_len, "total_tokens": total_tokens, "chunk_limit": chunk_limit}
        fits, limit = super().check_prefill(**kwargs)
        if not fits:
            self.allocator.demand(self.tree_cache, promised=self.total_offset, tokens=total_tokens)
            fits, limit = super().check_prefill(**kwargs)
        if not fits:
            return False, None
        at_once = extend_input_len if limit is None else min(extend_input_len, limit)
        return (True, limit) if self._secured(at_once) else (False, None)

    def can_allocate_prefill(self, *, paged_input: int, **kwargs: Any) -> bool:
        if self._chunk_waits:
            return False
        return bool(super().can_allocate_prefill(paged_input=paged_input, **kwargs)) and self._secured(paged_input)

    def available_chunk_tokens(self, chunk_limit: int) -> int | None:
        """The next chunk of a request that has begun; None: it waits. SGLang's own budget lets it go on regardless."""
        room = self.allocator.room(self.tree_cache, promised=self.current_offset, tokens=chunk_limit)
        self._chunk_waits = room < chunk_limit
        return room or None

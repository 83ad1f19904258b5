"""What the harness does inside of SGLang's scheduler: a plug-in of the tests' own, called before every step.

It counts the steps of a round, orders the limits that are to move, and damages what running requests have in the
cache. The first rank alone does so; what it did stands in inside.json, for child.py.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from pathlib import Path
from typing import Any

from moves import Moves


def register() -> None:
    """The entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    job = json.loads((_place() / "job.json").read_text(encoding="ascii"))
    inside = _Inside(job)
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run", inside.before, HookType.BEFORE
    )


def _place() -> Path:
    return Path(os.environ["ENGINE_TEST_PLACE"])


def _first_rank() -> bool:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return (parallel.tp_rank, parallel.pp_rank) == (0, 0)


class _Inside:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.moves = Moves.of(job["moves"])
        self.round = "-1"
        self.steps = 0
        self.damaged: list[int] = []

    def before(self, scheduler: Any, *_: Any, **batches: Any) -> None:
        if not _first_rank() or scheduler.is_fully_idle():
            return
        number = (_place() / "round").read_text(encoding="ascii")
        if number != self.round:
            self.round, self.steps, self.damaged = number, 0, []
        if self.moves:
            self.moves.before(self.steps)
        harm = _HARMS[self.job["damage"][int(number)]]
        if self.steps == self.job["damage_at"] and harm:
            self.damaged = _used(scheduler)[: self.job["damage_blocks"]]
            for buffer in _buffers(scheduler):
                for page in self.damaged:
                    harm(buffer[page * scheduler.page_size : (page + 1) * scheduler.page_size])
        self.steps += 1
        moved = self.moves.ordered if self.moves else 0
        text = json.dumps({"steps": self.steps, "damaged": self.damaged, "moved": moved})
        (_place() / "inside.new").write_text(text, encoding="ascii")
        (_place() / "inside.new").replace(_place() / "inside.json")


def _used(scheduler: Any) -> list[int]:
    """The pages of running requests, in order and without repeats, the padding page apart."""
    table = scheduler.req_to_token_pool.req_to_token
    pages: dict[int, None] = {}
    for request in scheduler.running_batch.reqs:
        slots = table[request.kv.req_pool_idx, : len(request.origin_input_ids)].tolist()
        pages.update(dict.fromkeys(slot // scheduler.page_size for slot in slots))
    pages.pop(0, None)
    return list(pages)


def _buffers(scheduler: Any) -> list[Any]:
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    return [*pool.k_buffer, *pool.v_buffer]


def _corrupt(rows: Any) -> None:
    rows.fill_(0.25)


def _unmap(rows: Any) -> None:
    """Takes the operating system's pages away that these rows lie on; the next access to one is a fault."""
    libc = ctypes.CDLL(None, use_errno=True)
    for row in rows:
        first = row.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = row.data_ptr() + row.numel() * row.element_size() - first
        if libc.munmap(ctypes.c_void_p(first), ctypes.c_size_t(length)) != 0:
            raise OSError(ctypes.get_errno(), f"munmap of {length} bytes")


_HARMS = {"none": None, "corrupt": _corrupt, "unmap": _unmap}

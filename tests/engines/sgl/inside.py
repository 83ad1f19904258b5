"""What the harness does inside of SGLang's scheduler: a plug-in of the tests' own, called before every step.

It counts the steps of a round, orders the limits that are to move, and damages what running requests have in the
cache: of a managed engine through its own pool, of a plain one behind its back. The first rank alone does so; what it
did stands in inside.json, for child.py.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
from pathlib import Path
from typing import Any, Final

from moves import Moves

_UNSTRIDED: Final = "torch_rows"
_UNMAP_S: Final = 60.0


def register() -> None:
    """The entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    job = json.loads((_place() / "job.json").read_text(encoding="ascii"))
    inside = _Inside(job)
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run", inside.before, HookType.BEFORE
    )
    if "kv_lora_rank" in json.loads(Path(job["model"], "config.json").read_text(encoding="utf-8")):
        _read_latent_rows()
    if _UNSTRIDED in job["engine"].values():
        _register_unstrided()


def _register_unstrided() -> None:
    """PyTorch's attention under a name that is not among those that are known to take rows with a stride."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    register_attention_backend(_UNSTRIDED)(ATTENTION_BACKENDS["torch_native"])


def _read_latent_rows() -> None:
    """SGLang sends a backend that it has no rule for down triton's way, whose kernels a CPU cannot run.

    PyTorch's attention reads a latent row as it lies in the pool, in every kind of step.
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry, AttnForwardMethod

    AttentionBackendRegistry.register("torch_native", lambda *_: AttnForwardMethod.MLA)


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
        self.running: list[int] = []

    def before(self, scheduler: Any, *_: Any, **batches: Any) -> None:
        if not _first_rank() or scheduler.is_fully_idle():
            return
        number = (_place() / "round").read_text(encoding="ascii")
        if number != self.round:
            self.round, self.steps, self.damaged, self.running = number, 0, [], []
        harm = self.job["damage"][int(number)]
        if self.moves and harm != "unmap":  # an order's look at the list would find the lie before an access does
            self.moves.before(self.steps)
        if self._damages_now(scheduler, harm):
            self.damaged = _damage(scheduler, harm, self.job["damage_blocks"])
        self.steps += 1
        if self.job["probe"] == "running":
            self.running.append(len(scheduler.running_batch.reqs))
        moved = self.moves.ordered if self.moves else 0
        text = json.dumps({"steps": self.steps, "damaged": self.damaged, "moved": moved, "probed": self.running})
        (_place() / "inside.new").write_text(text, encoding="ascii")
        (_place() / "inside.new").replace(_place() / "inside.json")

    def _damages_now(self, scheduler: Any, harm: str) -> bool:
        """Memory is taken away where the next step can be nothing but one of requests that run, which reads all they
        have: one for a prompt might touch new pages alone."""
        if harm != "unmap":
            return bool(self.steps == self.job["damage_at"])
        due = self.job["damage_at"] >= 0 and self.steps >= self.job["damage_at"] and not self.damaged
        last = scheduler.last_batch
        decoding = last is not None and last.forward_mode.is_decode() and scheduler.chunked_req is None
        return bool(due and decoding and not scheduler.waiting_queue)


def _used(scheduler: Any) -> list[int]:
    """The pages of running requests, in order and without repeats, the padding page apart."""
    table = scheduler.req_to_token_pool.req_to_token
    pages: dict[int, None] = {}
    for request in scheduler.running_batch.reqs:
        row = request if hasattr(request, "req_pool_idx") else request.kv  # 0.5.16 has it with the request
        slots = table[row.req_pool_idx, : len(request.origin_input_ids)].tolist()
        pages.update(dict.fromkeys(slot // scheduler.page_size for slot in slots))
    pages.pop(0, None)
    return list(pages)


def _buffers(scheduler: Any) -> list[Any]:
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    return list(pool.kv_buffer) if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]


def _damage(scheduler: Any, harm: str, most: int) -> list[int]:
    """Damages up to so many pages of running requests; returns which."""
    if harm == "none":
        return []
    pages = _used(scheduler)[:most]
    if harm == "unmap" and hasattr(scheduler.token_to_kv_pool_allocator, "ration"):
        _give_away(scheduler)
        return pages
    for buffer in _buffers(scheduler):
        for page in pages:
            _HARMS[harm](buffer[page * scheduler.page_size : (page + 1) * scheduler.page_size])
    return pages


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


_HARMS = {"corrupt": _corrupt, "unmap": _unmap}


def _give_away(scheduler: Any) -> None:
    """What the plug-in must never do: its pool is told that nothing is in use, and unmaps every page itself.

    SGLang's list and sums stay as they are, so nothing but the access to such a page can show it.
    """
    from elastickv.engines.sglang import session

    engine, ration = session.current(), scheduler.token_to_kv_pool_allocator.ration
    ration.pool.release(ration.held_ids().tolist())
    ration.pool.give_all()
    engine._fence(ration.pool.ticket())
    until = time.monotonic() + _UNMAP_S
    while ration.pool.stats()["transit"]:
        if time.monotonic() > until:
            raise TimeoutError(f"pages were not unmapped within {_UNMAP_S} s: {ration.pool.stats()}")
        time.sleep(0.001)
        ration.pool.poll()

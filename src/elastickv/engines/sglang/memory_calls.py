"""The hooks around SGLang's release and resume of memory, in its scheduler and in the process that has been asked.

SGLang's answer to these calls has no room for a failure. Its field for a request's id, which is empty, carries the
text from the scheduler to the process that was asked, and there it is raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any, Final

import msgspec

from elastickv.errors import Unavailable

__all__ = ["BUSY", "next_batch", "release_answered", "released", "resume_answered", "resumed", "saver"]

BUSY: Final = "elastickv: the engine stays awake: requests run or wait; release its memory when it is idle"
"""Why a release was refused, where it may be granted a moment later."""

_PATIENCE_S: Final = 5.0
_PAUSE_S: Final = 0.05

Method = Callable[..., Any]


def released(original: Method, updater: Any, request: Any) -> Any:
    """Around SchedulerWeightUpdaterManager.release_memory_occupation."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput

    return _answer(original, updater, request, "release", ReleaseMemoryOccupationReqOutput)


def resumed(original: Method, updater: Any, request: Any) -> Any:
    """Around SchedulerWeightUpdaterManager.resume_memory_occupation."""
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

    return _answer(original, updater, request, "resume", ResumeMemoryOccupationReqOutput)


def _answer(original: Method, updater: Any, request: Any, what: str, answer: type) -> Any:
    from elastickv.engines.sglang import session

    here = session.current()
    scheduler, occupation = here.scheduler, here.engaged_occupation()

    def let(tags: Collection[str]) -> Any:
        return original(updater, msgspec.structs.replace(request, tags=list(tags)))

    def do() -> str:
        text: str = getattr(occupation, what)(request.tags or (), let)
        return text

    send = getattr(scheduler, "send_control_output", scheduler.ipc_channels.send_to_tokenizer.send_output)
    text = occupation.call(do, lambda text: send(answer(rid=text or None), request))
    return None if text is None else answer(rid=text or None)


def next_batch(original: Method, scheduler: Any, *args: Any, **batches: Any) -> Any:
    """Around Scheduler.get_next_batch_to_run."""
    from sglang.srt.managers.schedule_batch import NextBatchPlan

    from elastickv.engines.sglang import session

    occupation = session.current().engaged_occupation()
    occupation.do_later()
    if occupation.holds_back:
        running = batches["running_batch"] if "running_batch" in batches else args[0]
        return NextBatchPlan(batch_to_run=None, running_batch=running)
    return original(scheduler, *args, **batches)


async def release_answered(original: Method, manager: Any, request: Any, http_request: Any = None) -> None:
    """Instead of TokenizerControlMixin.release_memory_occupation, which throws the answers away. Unavailable.

    A request may be on its last step, or be one that only asks for the engine's health: so it is asked for a while.
    """
    manager.auto_create_handle_loop()
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            _raise(await manager.release_memory_occupation_communicator(request))
            return
        except Unavailable as error:
            if error.message != BUSY or time.monotonic() >= until:
                raise
        await asyncio.sleep(_PAUSE_S)


async def resume_answered(original: Method, manager: Any, request: Any, http_request: Any = None) -> None:
    """Instead of TokenizerControlMixin.resume_memory_occupation, likewise."""
    manager.auto_create_handle_loop()
    _raise(await manager.resume_memory_occupation_communicator(request))


def _raise(answers: list[Any]) -> None:
    for answer in answers:
        if answer.rid:
            raise Unavailable(answer.rid)


def saver(original: Method, enable: bool) -> Any:
    """Around TorchMemorySaverAdapter.create: where there is no GPU, elastickv itself does what it is asked for."""
    import torch

    return original(enable=enable and torch.cuda.is_available())

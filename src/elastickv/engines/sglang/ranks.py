"""The ranks of one engine: which device each is on, and what they must all know before there is a cache.

SGLang has its process group by then. What travels is plain data of this engine's own processes.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch.distributed as dist
from sglang.srt.runtime_context import get_parallel

from elastickv import _core
from elastickv.config import Settings
from elastickv.engines.sglang.channel import Channel
from elastickv.engines.sglang.links import Lobby
from elastickv.errors import EngineRefused
from elastickv.memory import RankGeometry

__all__ = ["aligned", "channel", "expected", "from_first", "gather"]

_T = TypeVar("_T")


def _size() -> int:
    return int(get_parallel().tp_size) * int(get_parallel().pp_size)


def _group() -> Any:
    return get_parallel().world_group.cpu_group


def gather(mine: _T) -> list[_T]:
    """Every rank's, by rank."""
    if _size() == 1:
        return [mine]
    found: list[Any] = [None] * _size()
    dist.all_gather_object(found, mine, group=_group())
    return found


def from_first(mine: _T) -> _T:
    """What the first rank has, on every rank."""
    if _size() == 1:
        return mine
    box: list[Any] = [mine]
    dist.broadcast_object_list(box, src=get_parallel().world_group.ranks[0], group=_group())
    found: _T = box[0]
    return found


def channel(rank: int) -> Channel:
    """What the first rank tells the others through, and the others hear; every rank calls it at the same point."""
    if _size() == 1:
        return Channel()
    if rank != 0:
        return Lobby.enter(from_first(""))
    with Lobby() as lobby:
        from_first(lobby.address)
        return lobby.wait(_size() - 1)


def expected(settings: Settings, kind: str) -> tuple[int, list[str]]:
    """This rank's number, and the device of every rank, of the type `kind`.

    EngineRefused where it is not the one that was asked for.
    """
    rank = int(get_parallel().pp_rank) * int(get_parallel().tp_size) + int(get_parallel().tp_rank)
    devices = gather(_own_device(kind))
    for device in devices:
        if settings.device not in ("auto", device) and not settings.device.isdecimal():
            raise EngineRefused(
                f"elastickv was told to manage {settings.device}, and this engine runs on {device}; "
                "correct ELASTICKV_DEVICE or leave it out"
            )
    return rank, devices


def _own_device(kind: str) -> str:
    if kind == "cpu":
        return "host"
    if kind != "cuda":
        raise EngineRefused(f"elastickv cannot manage a device of the type {kind}; it manages cpu and cuda")
    import torch

    return _core.open_driver(f"cuda:{torch.cuda.current_device()}").device_id


def aligned(geometry: RankGeometry, blocks: int, page: int) -> int:
    """`blocks`, or the next number at which every stripe of the rank begins on a page border."""
    if geometry.spans == 1:
        return blocks
    step = page // math.gcd(page, geometry.block_bytes)
    return -(-blocks // step) * step

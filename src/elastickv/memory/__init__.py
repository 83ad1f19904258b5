"""Elastic memory, free of engines: a Cache in the process that schedules, a RankMemory in each that owns memory."""

from elastickv.memory.cache import Cache
from elastickv.memory.capacity import device_page, open_device_ledger
from elastickv.memory.device import BlockCache, Device, Membership, open_device
from elastickv.memory.geometry import PoolGeometry, RankGeometry, align_blocks
from elastickv.memory.rank import RankMemory, RankSpec
from elastickv.memory.steward import Steward
from elastickv.memory.tenancy import Tenancy

__all__ = [
    "BlockCache",
    "Cache",
    "Device",
    "Membership",
    "PoolGeometry",
    "RankGeometry",
    "RankMemory",
    "RankSpec",
    "Steward",
    "Tenancy",
    "align_blocks",
    "device_page",
    "open_device",
    "open_device_ledger",
]

"""A process with a cache on the GPU, driven by lines on stdin and answering with lines on stdout. Run as a file.

    tenant.py DIRECTORY NAME CAPACITY BLOCKS BLOCK_BYTES

Commands: `alloc N [SECONDS]` (asks until it is given or the time is over), `free cached|free`, `fill VALUE`,
`sum`, `fault` (touches a block after its memory has gone), `mapped`, `end`. Each is answered by one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

import elastickv
from elastickv.memory import BlockCache


class Tenant:
    def __init__(self, directory: str, name: str, capacity: str, blocks: str, block_bytes: str) -> None:
        self.lost: list[int] = []
        self.ids: list[int] = []
        device = elastickv.open_device("0", capacity=int(capacity), directory=directory)
        torch.cuda.init()
        self.cache: BlockCache = device.join(name, idle_release=0.2, stock=0).cache(
            num_blocks=int(blocks), block_bytes=int(block_bytes), on_evict=self.lost.extend
        )
        self.blocks = torch.from_dlpack(self.cache).view(int(blocks), int(block_bytes))

    def alloc(self, count: str, seconds: str = "5") -> dict[str, Any]:
        until, began, tries = time.monotonic() + float(seconds), time.monotonic(), 0
        while (got := self.cache.alloc(int(count))) is None and time.monotonic() < until:
            tries += 1
        self.ids += got or []
        return {"got": len(got or []), "seconds": time.monotonic() - began, "tries": tries}

    def free(self, how: str) -> dict[str, Any]:
        self.cache.free(self.ids, cached=how == "cached")
        self.ids = []
        return {}

    def fill(self, value: str) -> dict[str, Any]:
        for block in self.ids:
            self.blocks[block].fill_(int(value))
        torch.cuda.synchronize()
        return {}

    def sum(self) -> dict[str, Any]:
        total = sum(int(self.blocks[block].sum(dtype=torch.int64)) for block in self.ids)
        return {"sum": total, "lost": len(self.lost)}

    def mapped(self) -> dict[str, Any]:
        self.cache.check_integrity()
        return {"mapped": self.cache.mapped_bytes, "lost": len(self.lost), **self.cache.stats()}

    def fault(self) -> dict[str, Any]:
        block = self.ids[-1]
        self.free("free")
        until = time.monotonic() + 10
        while self.cache.mapped_bytes > self.blocks.shape[1] and time.monotonic() < until:
            time.sleep(0.01)
        before = self.cache.mapped_bytes
        try:
            value = int(self.blocks[block].sum(dtype=torch.int64))
        except RuntimeError as error:
            return {"fault": str(error).splitlines()[0], "mapped": before}
        return {"fault": None, "value": value, "mapped": before}


def main() -> None:
    tenant = Tenant(*sys.argv[1:6])
    print(json.dumps({"ready": tenant.cache.mapped_bytes}), flush=True)
    for line in sys.stdin:
        word, *arguments = line.split()
        if word == "end":
            return
        print(json.dumps(getattr(tenant, word)(*arguments)), flush=True)


if __name__ == "__main__":
    main()

"""Where weights lie while they are not in memory: a file without a name, on a disk.

It is gone with the process that made it, whatever ends that. What is written stays in the kernel's page cache for as
long as nobody needs the memory, so reading it back soon costs a copy and no disk.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from elastickv.errors import AccessDenied, DeadlineExceeded, Unavailable
from elastickv.units import format_size

__all__ = ["Region", "WeightFile", "choose_directory"]

_PIECE: Final = 32 * 1024 * 1024
"""Bytes between two looks at the clock."""

_ALIGN: Final = 4096
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FALLBACK: Final = Path("/var/tmp")


class Region(NamedTuple):
    """A place in the file, bytes."""

    offset: int
    size: int


def choose_directory(given: Path | None) -> Path:
    """`given`, or the first of the temporary directories that is on a disk.

    Unavailable if it is a file system in memory: what is written there frees nothing.
    """
    candidates = [given] if given is not None else [Path(tempfile.gettempdir()), _FALLBACK]
    for place in candidates:
        if _file_system(place) not in _IN_MEMORY:
            return place
    names = " and ".join(str(place) for place in candidates)
    raise Unavailable(
        f"weights that are written to {names} would stay in memory ({_file_system(candidates[0])}); "
        "name a directory on a disk with ELASTICKV_SLEEP_DIR"
    )


def _file_system(place: Path) -> str:
    """The type of the file system that `place` is on; empty where the kernel does not tell."""
    try:
        device = place.stat().st_dev
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    kinds = [line.partition(" - ")[2].split()[0] for line in mounts.splitlines() if line.split()[2] == wanted]
    return kinds[-1] if kinds else ""


class WeightFile:
    """Bytes by region. Not thread-safe. A region is for one size and may be given up and used again."""

    def __init__(self, directory: Path) -> None:
        """AccessDenied or Unavailable, and nothing is left, if no file can be made there."""
        self._directory = directory
        try:
            self._file = tempfile.TemporaryFile(buffering=0, dir=directory)  # noqa: SIM115 - closed by close()
        except OSError as error:
            kind = AccessDenied if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else Unavailable
            raise kind(
                f"cannot make a file for weights in {directory}: {error.strerror}; "
                "name a directory on a disk with ELASTICKV_SLEEP_DIR"
            ) from None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    @property
    def size(self) -> int:
        """Bytes that the file reaches."""
        return self._end

    def reserve(self, size: int) -> Region:
        """Room for `size` bytes, taken from the disk at once. Unavailable, with nothing changed, if it is full."""
        spare = self._free.get(size)
        if spare:
            return Region(spare.pop(), size)
        region = Region(self._end, size)
        if size:
            with self._explained("taking room for", size):
                os.posix_fallocate(self._file.fileno(), region.offset, size)
        self._end += -(-size // _ALIGN) * _ALIGN
        return region

    def forget(self, region: Region) -> None:
        """The region may be used for something else of its size."""
        self._free.setdefault(region.size, []).append(region.offset)

    def write(self, region: Region, data: memoryview, until: float) -> None:
        """Writes all of `data`. DeadlineExceeded after `until` (time.monotonic()), Unavailable if the disk fails."""
        self._copy(region, data, until, os.pwrite, "writing")

    def read(self, region: Region, into: memoryview, until: float) -> None:
        """Fills `into`, with the same errors."""
        self._copy(region, into, until, _read_into, "reading")

    def close(self) -> None:
        """Gives the room on the disk back. May be called twice."""
        self._file.close()

    def _copy(
        self,
        region: Region,
        data: memoryview,
        until: float,
        call: Callable[[int, memoryview, int], int],
        what: str,
    ) -> None:
        done = 0
        while done < region.size:
            if time.monotonic() >= until:
                raise DeadlineExceeded(
                    f"{what} weights in {self._directory} was not done in time: {format_size(done)} of "
                    f"{format_size(region.size)}; is the disk too slow?"
                )
            with self._explained(what, region.size):
                moved = call(self._file.fileno(), data[done : done + _PIECE], region.offset + done)
            if not moved:
                raise Unavailable(f"{what} weights in {self._directory} ended after {format_size(done)}; was it cut?")
            done += moved

    @contextmanager
    def _explained(self, what: str, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = "free some room" if error.errno in _FULL else "see to the disk"
            raise Unavailable(
                f"{what} {format_size(size)} of weights in {self._directory} failed: {error.strerror}; {advice}, "
                "or name another directory with ELASTICKV_SLEEP_DIR",
                bytes=size,
            ) from None


def _read_into(descriptor: int, into: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [into], offset)

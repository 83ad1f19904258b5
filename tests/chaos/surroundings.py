"""Faults of what a ledger stands on: full disks, denied locks, closed files. Each works in a directory of its own."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import shutil
import signal
import struct
from multiprocessing.connection import Connection
from pathlib import Path

from elastickv import _core
from elastickv.errors import DeadlineExceeded, ElasticKVError

CAPACITY = 16 * 1024 * 1024
CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


def attempt(directory: Path, deadline_ms: int = 2000) -> ElasticKVError | None:
    """Makes a ledger and joins it; what was answered instead."""
    try:
        _core.Ledger.open(str(directory), "host", capacity=CAPACITY, deadline_ms=deadline_ms).join("one")
    except ElasticKVError as error:
        return error
    return None


def judge(directory: Path, refused: ElasticKVError | None, wanted: str) -> str:
    """ "ok" when it was refused with a text about `wanted`, nothing misleads, and it works once the cause is gone."""
    if refused is None:
        return "it worked although it could not"
    if wanted not in str(refused):
        return f"the text does not say {wanted!r}: {refused}"
    left = sorted(path.name for path in directory.iterdir())
    if "host.ledger" in left or any(".new." in name for name in left):
        return f"left behind: {left}"
    again = attempt(directory)
    return "ok" if again is None else f"it does not work afterwards: {again}"


def file_size_limit(directory: Path) -> str:
    """The process may write no file that large."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    refused = attempt(directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return judge(directory, refused, "File too large")


def full_disk(directory: Path) -> str:
    """A real file system without room, where this user may mount one; it vanishes with this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(directory)
    if libc.unshare(CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        return "skipped: a full disk needs the right to mount"
    if libc.mount(b"tmpfs", path, b"tmpfs", 0, b"size=8k,mode=0700") != 0:
        return "skipped: a full disk needs the right to mount"
    refused = attempt(directory)
    if libc.mount(b"tmpfs", path, b"tmpfs", 32, b"size=4m,mode=0700") != 0:  # MS_REMOUNT: somebody makes room
        return f"the disk could not be enlarged: {os.strerror(ctypes.get_errno())}"
    return judge(directory, refused, "No space left on device")


def injected(directory: Path, point: str, wanted: str) -> str:
    """A step of creating a ledger fails once."""
    _core.set_fault(point, "fail")
    refused = attempt(directory, 200)
    _core.clear_faults()
    return judge(directory, refused, wanted)


def denied_lock(directory: Path) -> str:
    """Somebody sits on the directory's lock."""
    with (directory / ".lock").open("w") as held:
        os.fchmod(held.fileno(), 0o600)
        fcntl.fcntl(held, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        refused = attempt(directory, 200)
    if not isinstance(refused, DeadlineExceeded):
        return f"answered {refused!r}"
    return judge(directory, refused, "was not free within 200 ms")


def denied_file(directory: Path) -> str:
    """The file's mode lets others in: nobody uses it until that is mended."""
    if (made := attempt(directory)) is not None:
        return str(made)
    file = directory / "host.ledger"
    file.chmod(0o644)
    refused = attempt(directory)
    file.chmod(0o600)
    if refused is None or "mode 0644" not in str(refused):
        return f"answered {refused!r}"
    again = attempt(directory)
    return "ok" if again is None else str(again)


CASES = {
    "file_size_limit": file_size_limit,
    "full_disk": full_disk,
    "denied_lock": denied_lock,
    "denied_file": denied_file,
    "injected_full_disk": lambda directory: injected(directory, "files.allocate", "No space left on device"),
    "injected_no_descriptor": lambda directory: injected(directory, "files.open", "Too many open files"),
    "injected_no_file": lambda directory: injected(directory, "files.create", "No space left on device"),
    "injected_lock": lambda directory: injected(directory, "files.lock", "was not free within 200 ms"),
    "injected_link": lambda directory: injected(directory, "ledger.create.before_publish", "Permission denied"),
}


def main(name: str, directory: Path, pipe: Connection) -> None:
    """The process: one case, in a fresh directory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    directory.mkdir(mode=0o700)
    try:
        pipe.send(("answer", CASES[name](directory)))
    finally:
        shutil.rmtree(directory, ignore_errors=True)

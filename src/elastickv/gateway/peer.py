"""Whose a TCP connection on this machine is: the kernel names the owner of every socket in /proc/net."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import Final

__all__ = ["owner_of"]

_PROC: Final = Path("/proc/net")
_LOCAL, _REMOTE, _UID, _INODE = 1, 2, 7, 9
"""Columns, see proc_net_tcp in the kernel's documentation."""
Address = tuple[str, int]


def owner_of(peer: Address, own: Address) -> int | None:
    """The user id that made the socket at `peer`'s end of a connection, whose other end is at `own`.

    None where it is not of this machine, or closed: a closed socket has no owner any more, and the kernel says root.
    Reads a table of all connections: to be called in a thread.
    """
    first = _listed(peer, own)
    return first if first is not None and first == _listed(peer, own) else None  # it may close between two columns


def _listed(peer: Address, own: Address) -> int | None:
    for table, mapped in (("tcp", False), ("tcp6", True)):
        try:
            wanted = [_hexadecimal(peer, mapped=mapped), _hexadecimal(own, mapped=mapped)]
            lines = (_PROC / table).read_text(encoding="ascii").splitlines()[1:]
        except (OSError, ValueError):
            continue  # no such addresses in this table, or no IPv6 at all
        for line in lines:
            fields = line.split()
            if fields[_LOCAL : _REMOTE + 1] == wanted and fields[_INODE] != "0":
                return int(fields[_UID])
    return None


def _hexadecimal(address: Address, *, mapped: bool) -> str:
    """As the kernel prints it: words of four bytes in the machine's order. `mapped`: as an address of IPv6."""
    ip = ipaddress.ip_address(address[0])
    if mapped and ip.version == 4:
        ip = ipaddress.ip_address(f"::ffff:{ip}")
    if (ip.version == 6) is not mapped:
        raise ValueError(f"{ip} is in the other table")
    packed = ip.packed
    words = [int.from_bytes(packed[i : i + 4], sys.byteorder) for i in range(0, len(packed), 4)]
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"

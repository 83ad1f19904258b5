"""Sizes and times as people write them. No other module reads or writes units.

Sizes become a whole number of bytes, times become seconds. A wrong text raises InvalidArgument, whose text holds
what was being read, the value, and the forms that are accepted.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from elastickv.errors import InvalidArgument

__all__ = [
    "MAX_SIZE",
    "format_seconds",
    "format_size",
    "parse_seconds",
    "parse_seconds_or_never",
    "parse_size",
    "parse_size_or_none",
]

MAX_SIZE: Final = 2**63 - 1
"""The largest size that is accepted, in bytes."""

SIZE_FORMS: Final = (
    "bytes (1000000), KiB, MiB, GiB, TiB (512MiB, 1.5GiB), k, m, g, t (the same: 2g is 2GiB), kB, MB, GB, TB"
)
SECONDS_FORMS: Final = "seconds (2s, 0.5s), milliseconds (20ms), minutes (5m), hours (1h)"

_NO_SIZE: Final = frozenset({"none", "unlimited"})
_NO_TIME: Final = frozenset({"never"})
_NUMBER: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", re.ASCII)
_SIZE_UNITS: Final = {
    "": 1,
    "b": 1,
    **{unit: 1 << (10 * (power + 1)) for power, unit in enumerate("kmgtp")},
    **{f"{unit}ib": 1 << (10 * (power + 1)) for power, unit in enumerate("kmgtp")},
    **{f"{unit}b": 1000 ** (power + 1) for power, unit in enumerate("kmgtp")},
}
_TIME_UNITS: Final = {
    "us": Decimal("0.000001"),
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
    "h": Decimal(3600),
}
_BINARY_NAMES: Final = ("KiB", "MiB", "GiB", "TiB", "PiB")


def parse_size(text: str, what: str = "size") -> int:
    """Bytes of a size such as "1.5GiB", "512MiB", "2g" or "1000000"; a fraction of a byte is rounded down."""
    return _size(text, what, SIZE_FORMS)


def parse_size_or_none(text: str, what: str = "size") -> int | None:
    """As parse_size, and None for "none" or "unlimited"."""
    if text.strip().lower() in _NO_SIZE:
        return None
    return _size(text, what, f"{SIZE_FORMS}, none")


def format_size(size: int | None, *, decimals: int = 2) -> str:
    """A size for people: "0 bytes", "512 MiB", "1.5 GiB", "1.37 GiB" (`decimals` at most); None is "none"."""
    if size is None:
        return "none"
    sign, size = ("-", -size) if size < 0 else ("", size)
    if size < 1024:
        return f"{sign}{size} bytes"
    power = min((size.bit_length() - 1) // 10, len(_BINARY_NAMES))
    value = f"{size / (1 << (10 * power)):.{decimals}f}"
    value = value.rstrip("0").rstrip(".") if "." in value else value
    return f"{sign}{value} {_BINARY_NAMES[power - 1]}"


def parse_seconds(text: str, what: str = "time", *, default_unit: str = "s") -> float:
    """Seconds of a time such as "2", "0.5s", "20ms" or "5m"; a bare number counts in `default_unit` ("s" or "ms")."""
    return _seconds(text, what, default_unit, "")


def parse_seconds_or_never(text: str, what: str = "time", *, default_unit: str = "s") -> float | None:
    """As parse_seconds, and None for "never"."""
    if text.strip().lower() in _NO_TIME:
        return None
    return _seconds(text, what, default_unit, ", never")


def format_seconds(seconds: float | None) -> str:
    """A time for people: "2 s", "20 ms", "never"."""
    if seconds is None:
        return "never"
    if 0 < seconds < 1:
        return f"{seconds * 1000:g} ms"
    return f"{seconds:g} s"


def _size(text: str, what: str, forms: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidArgument(f"{what}: {text!r} is not a size; write {forms}", what=what, value=text)
    exact = Decimal(match[1]) * unit
    size = int(exact)
    if unit == 1 and exact != size:
        raise InvalidArgument(f"{what}: {text!r} is not a whole number of bytes", what=what, value=text)
    if size > MAX_SIZE:
        raise InvalidArgument(
            f"{what}: {text!r} is more than the largest size, {format_size(MAX_SIZE)}", what=what, value=text
        )
    return size


def _seconds(text: str, what: str, default_unit: str, more_forms: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    factor = _TIME_UNITS.get(match[2].lower() or default_unit) if match else None
    if match is None or factor is None:
        bare = "a number of seconds (2), " if default_unit == "s" else "a number of milliseconds (20), "
        forms = f"{bare}{SECONDS_FORMS}{more_forms}"
        raise InvalidArgument(f"{what}: {text!r} is not a time; write {forms}", what=what, value=text)
    return float(Decimal(match[1]) * factor)

"""Sizes and times, as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv import units
from elastickv.errors import InvalidArgument

FORMS = "bytes (1000000), KiB, MiB, GiB, TiB (512MiB, 1.5GiB), k, m, g, t (the same: 2g is 2GiB), kB, MB, GB, TB"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000000", 1_000_000),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        (" 2 g ", 2 << 30),
        ("2G", 2 << 30),
        ("64k", 65536),
        ("1TB", 10**12),
        ("3 kB", 3000),
        ("7b", 7),
        ("0.3KiB", 307),
        (str(2**63 - 1), 2**63 - 1),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "+1", "1,5GiB", "1e9", "12 bananas", "0x10", "1.5.5m", "\u0661", "1 2", "none"]
)
def test_what_is_no_size_is_named_with_the_forms(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        units.parse_size(text, "floor")
    assert str(caught.value) == f"floor: {text!r} is not a size; write {FORMS}"


def test_sizes_that_are_out_of_range() -> None:
    with pytest.raises(InvalidArgument, match=r"^size: '8388608TiB' is more than the largest size, 8192 PiB$"):
        units.parse_size("8388608TiB")
    with pytest.raises(InvalidArgument, match=r"^size: '1\.5' is not a whole number of bytes$"):
        units.parse_size("1.5")


@pytest.mark.parametrize("text", ["none", "None", " unlimited "])
def test_no_size_where_it_is_allowed(text: str) -> None:
    assert units.parse_size_or_none(text) is None


def test_no_size_is_offered_where_it_is_allowed() -> None:
    with pytest.raises(InvalidArgument) as caught:
        units.parse_size_or_none("nil", "limit")
    assert str(caught.value) == f"limit: 'nil' is not a size; write {FORMS}, none"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "none"),
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (3 << 29, "1.5 GiB"),
        (1_470_000_000, "1.37 GiB"),
        (-(1 << 20), "-1 MiB"),
        (100 << 20, "100 MiB"),
    ],
)
def test_format_size(size: int | None, text: str) -> None:
    assert units.format_size(size) == text


@given(st.integers(0, 2**62))
def test_what_is_written_reads_back_within_a_hundredth(size: int) -> None:
    again = units.parse_size(units.format_size(size).replace(" bytes", ""))
    assert abs(again - size) <= size * 0.005 + 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("2", 2.0), ("0.5", 0.5), ("2s", 2.0), ("20ms", 0.02), ("5m", 300.0), ("1h", 3600.0)]
)
def test_parse_seconds(text: str, seconds: float) -> None:
    assert units.parse_seconds(text) == seconds


def test_a_bare_number_counts_in_the_unit_of_the_setting() -> None:
    assert units.parse_seconds("20", default_unit="ms") == 0.02
    assert units.parse_seconds_or_never("never") is None


def test_what_is_no_time_is_named_with_the_forms() -> None:
    with pytest.raises(InvalidArgument) as caught:
        units.parse_seconds("soon", "--timeout")
    assert str(caught.value) == (
        "--timeout: 'soon' is not a time; write a number of seconds (2), seconds (2s, 0.5s), milliseconds (20ms), "
        "minutes (5m), hours (1h)"
    )
    with pytest.raises(InvalidArgument, match=r"a number of milliseconds \(20\), .*, never$"):
        units.parse_seconds_or_never("soon", default_unit="ms")


@pytest.mark.parametrize(("seconds", "text"), [(None, "never"), (2.0, "2 s"), (0.02, "20 ms"), (0.0, "0 s")])
def test_format_seconds(seconds: float | None, text: str) -> None:
    assert units.format_seconds(seconds) == text

"""would_fit() against a table by hand, and against what a ledger then really grants."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv import _core
from elastickv.errors import InvalidArgument
from elastickv.fit import MAX_TENANTS, would_fit
from elastickv.ledger import DeviceView, TenantView, Usage, read_device

MIB = 1 << 20
sizes = st.integers(min_value=0, max_value=40)


def row(name: str, **values: Any) -> TenantView:
    """A tenant's row with nothing in it but what is said."""
    blank: dict[str, Any] = dict.fromkeys(TenantView.__dataclass_fields__, 0)
    blank |= {"name": name, "engine": "", "layout": "", "alive": True, "weight": 1, "usage": Usage()}
    return TenantView(**{**blank, "limit_wanted": None, "limit_held": None, **values})


def device(*tenants: TenantView, capacity: int = 100, unmanaged: int = 0) -> DeviceView:
    return DeviceView("host", capacity, unmanaged, 1, tenants)


@pytest.mark.parametrize(
    ("static", "floor", "verdict", "missing"),
    [
        (10, 0, "now", 0),
        (20, 5, "now", 0),
        (21, 0, "after_give_back", 0),
        (0, 45, "after_give_back", 0),
        (46, 0, "after_requests", 1),
        (50, 0, "after_requests", 5),
        (51, 0, "never", 6),
    ],
)
def test_by_hand(static: int, floor: int, verdict: str, missing: int) -> None:
    busy = row("busy", leased=40, static_bytes=10, floor=20, usage=Usage(used=15, cached=15, mapped_free=10))
    idle = row("idle", leased=5, floor=10)
    gone = row("gone", alive=False, floor=50)
    fit = would_fit(device(busy, idle, gone, capacity=110, unmanaged=10 + 20), static=static, floor=floor)
    assert (fit.free, fit.reclaimable, fit.most) == (20, 25, 50)
    assert (fit.verdict, fit.missing) == (verdict, missing)
    assert fit.fits is (verdict in ("now", "after_give_back"))


def test_a_full_table_takes_nobody() -> None:
    fit = would_fit(device(*(row(f"t{i}") for i in range(MAX_TENANTS))), static=1)
    assert (fit.verdict, fit.most) == ("never", 0)


def test_the_share_goes_by_weight() -> None:
    fit = would_fit(device(row("one", static_bytes=20, weight=3)), static=20, weight=1)
    assert fit.share == 15


@pytest.mark.parametrize(("static", "floor", "weight"), [(-1, 0, 1), (0, -1, 1), (0, 0, 0)])
def test_nonsense_is_refused(static: int, floor: int, weight: int) -> None:
    with pytest.raises(InvalidArgument, match="would it fit"):
        would_fit(device(), static, floor, weight)


@given(others=st.lists(st.tuples(sizes, sizes, sizes), max_size=4), static=sizes, floor=sizes)
def test_now_and_never_are_what_the_ledger_does(
    tmp_path_factory: pytest.TempPathFactory, others: list[tuple[int, int, int]], static: int, floor: int
) -> None:
    folder = tmp_path_factory.mktemp("fit")
    ledger = _core.Ledger.open(str(folder / "ledgers"), "host", 64 * MIB)
    members = []
    for number, (lease, fixed, promised) in enumerate(others):
        try:
            member = ledger.join(f"t{number}", floor=promised * MIB)
        except InvalidArgument:
            continue
        members.append(member)
        member.lease(lease * MIB)
        member.lease_static(fixed * MIB)
    fit = would_fit(read_device(ledger), static * MIB, floor * MIB)
    try:
        newcomer = ledger.join("new", floor=floor * MIB)
    except InvalidArgument:
        assert fit.verdict == "never"
    else:
        assert newcomer.lease_static(max(static, floor) * MIB) is (fit.verdict == "now")
        newcomer.close()
    for member in members:
        member.close()

"""Who is put to sleep or ended, decided from values alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from elastickv.gateway.policy import Action, Standing, decide, waiting
from elastickv.gateway.spec import ModelSpec
from elastickv.gateway.states import State
from elastickv.ledger import Counters, DeviceView, Histogram, Histograms, TenantView, Usage

NONE = Histogram((), 0.0)


def tenant(name: str, held: int = 10, *, demand: int = 0, age_s: float = 1.0, floor: int = 0) -> TenantView:
    values: dict[str, Any] = dict.fromkeys(TenantView.__dataclass_fields__, 0)
    values |= {
        "name": name,
        "alive": True,
        "engine": "",
        "layout": "",
        "leased": held,
        "floor": floor,
        "demand": demand,
        "demand_age_ns": int(age_s * 1e9),
        "usage": Usage(),
        "counters": Counters(),
        "histograms": Histograms(NONE, NONE, NONE),
    }
    return TenantView(**values)


def device(*tenants: TenantView) -> dict[str, DeviceView]:
    return {"host": DeviceView("host", 100, 0, 1, tenants)}


def standing(name: str, idle: float = 100.0, state: State = State.READY, **keys: Any) -> Standing:
    return Standing(ModelSpec(name, "x", **keys), state, 100.0, idle, True, (name,))


QUIET = device(tenant("a"), tenant("b"))
PRESSED = device(tenant("a"), tenant("b"), tenant("c", demand=50))


def test_nobody_sleeps_while_nobody_waits() -> None:
    assert decide([standing("a"), standing("b")], QUIET) == []


def test_the_longest_idle_one_goes_for_whoever_waits() -> None:
    models = [standing("a", 20.0), standing("b", 30.0), standing("c", 0.0, State.WAKING)]
    assert decide(models, PRESSED) == [Action("b", "sleep", "c waits for memory of host")]


@pytest.mark.parametrize(
    "change",
    [
        {"idle": 0.5},
        {"in_state": 1.0},
        {"state": State.ASLEEP},
        {"state": State.STARTING},
        {"can_sleep": False},
        {"tenants": ("elsewhere",)},
        {"tenants": ("c",)},
        {"spec": ModelSpec("a", "x", sleep="never")},
        {"spec": ModelSpec("a", "x", sleep="idle", sleep_after=1000.0)},
    ],
    ids=str,
)
def test_who_is_left_alone_even_so(change: dict[str, Any]) -> None:
    assert decide([standing("a")], PRESSED) != []
    assert decide([replace(standing("a"), **change)], PRESSED) == []


def test_a_wait_of_a_moment_is_no_pressure() -> None:
    assert waiting(device(tenant("c", demand=5, age_s=0.1))) == {"host": []}
    assert waiting(device(tenant("c", demand=5, age_s=0.5))) == {"host": ["c"]}


def test_who_holds_no_more_than_its_floor_has_nothing_to_give() -> None:
    pressed = device(tenant("a", 10, floor=10), tenant("c", demand=50))
    assert decide([standing("a")], pressed) == []


def test_idle_models_go_by_their_own_times() -> None:
    napping = standing("a", 61.0, sleep="idle", sleep_after=60.0)
    assert decide([napping], QUIET) == [Action("a", "sleep", "no request for 60 s")]
    assert decide([replace(napping, idle=59.0)], QUIET) == []
    ending = standing("b", 601.0, State.ASLEEP, stop_after=600.0)
    assert decide([ending], QUIET) == [Action("b", "stop", "no request for 600 s")]
    assert decide([replace(ending, state=State.STARTING)], QUIET) == []


def test_one_model_gets_one_order() -> None:
    both = standing("a", 1000.0, stop_after=600.0)
    assert [action.what for action in decide([both], PRESSED)] == ["stop"]

"""Which models are put to sleep or ended, and when. Pure functions: no clock, no input or output."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from elastickv.gateway.spec import ModelSpec
from elastickv.gateway.states import State
from elastickv.ledger import DeviceView
from elastickv.units import format_seconds

__all__ = ["Action", "Standing", "decide", "waiting"]

WAITS_S: Final = 0.3
"""A tenant that has waited so long for bytes will not get them from caches: these go back within milliseconds."""

REST_S: Final = 1.0
"""A model without a request for so long may be put to sleep for somebody else's sake."""

AWAKE_S: Final = 3.0
"""... unless it has been ready for less than this: two models that take turns must get something done in between."""


@dataclass(frozen=True)
class Standing:
    """One model, as the policy sees it. Times are seconds."""

    spec: ModelSpec
    state: State
    in_state: float
    idle: float
    """Since a request came or ended; 0 while there is one."""
    can_sleep: bool
    tenants: tuple[str, ...]


@dataclass(frozen=True)
class Action:
    """What is to be done with a model, and why."""

    name: str
    what: Literal["sleep", "stop"]
    reason: str


def waiting(devices: Mapping[str, DeviceView]) -> dict[str, list[str]]:
    """By device, the tenants that wait for memory and have done so for a while."""
    return {
        device: [t.name for t in view.living if t.demand and t.demand_age_ns >= WAITS_S * 1e9]
        for device, view in devices.items()
    }


def decide(standings: Sequence[Standing], devices: Mapping[str, DeviceView]) -> list[Action]:
    """What is due now. For the sake of those who wait, one model for each device at a time: the longest idle one."""
    actions = [action for standing in standings if (action := _by_time(standing)) is not None]
    taken = {action.name for action in actions}
    for device, names in waiting(devices).items():
        if names:
            holders = _holders(devices[device])
            resting = [s for s in standings if s.spec.name not in taken and _may_go(s, names, holders)]
            if resting:
                chosen = max(resting, key=lambda standing: standing.idle)
                taken.add(chosen.spec.name)
                actions.append(Action(chosen.spec.name, "sleep", f"{_listed(names)} waits for memory of {device}"))
    return actions


def _by_time(standing: Standing) -> Action | None:
    spec, idle = standing.spec, standing.idle
    if spec.stop_after is not None and idle >= spec.stop_after and standing.state in (State.READY, State.ASLEEP):
        return Action(spec.name, "stop", f"no request for {format_seconds(spec.stop_after)}")
    if spec.sleep == "idle" and idle >= spec.sleep_after and standing.state is State.READY and standing.can_sleep:
        return Action(spec.name, "sleep", f"no request for {format_seconds(spec.sleep_after)}")
    return None


def _may_go(standing: Standing, waiting: Collection[str], holders: Collection[str]) -> bool:
    return (
        standing.spec.sleep == "pressure"
        and standing.state is State.READY
        and standing.can_sleep
        and standing.idle >= REST_S
        and standing.in_state >= AWAKE_S
        and not set(standing.tenants) & set(waiting)
        and bool(set(standing.tenants) & set(holders))
    )


def _holders(view: DeviceView) -> set[str]:
    """Those that hold something above their floor: only that can go to somebody else."""
    return {tenant.name for tenant in view.living if tenant.held > tenant.floor}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)

"""Figures from samples. A request that failed has an infinite latency: it weighs on every figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks by a straight line; infinite where the upper one is. ValueError without values."""
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(values)} values; give 0 to 100, and one value or more")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    if place == low:
        return ordered[low]
    below, above = ordered[low], ordered[low + 1]
    return above if math.isinf(above) else below + (above - below) * (place - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, mean, P99 and both ends; empty without values."""
    if not values:
        return {}
    return {
        "median": percentile(values, 50),
        "mean": sum(values) / len(values),
        "p99": percentile(values, 99),
        "least": min(values),
        "most": max(values),
    }


def ratio(over: float | None, under: float | None) -> float | None:
    """over / under; None where one is missing, both are infinite or both are 0."""
    if over is None or under is None:
        return None
    if under == 0:
        return None if over == 0 else math.inf
    if math.isinf(under):
        return None if math.isinf(over) else 0.0
    return over / under


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> float | None:
    """The median of the ratios of neighbouring rounds: what slows the machine for a while slows both of a pair."""
    found = [one for a, b in zip(over, under, strict=True) if (one := ratio(a, b)) is not None]
    return statistics.median(found) if found else None

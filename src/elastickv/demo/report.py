"""The demo's closing table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from elastickv.demo.traffic import Served
from elastickv.demo.watch import Watch, queued_by_static_split
from elastickv.units import format_size

__all__ = ["summary", "table"]


def table(served: Sequence[Served], watch: Watch, engines: Sequence[str], budget: int) -> Table:
    """One row a model: requests, tokens, its peak and what part of the budget that was."""
    out = Table(title="two models, one memory", title_justify="left")
    for heading in ("MODEL", "REQUESTS", "FAILED", "TOKENS SERVED", "PEAK", "OF BUDGET"):
        out.add_column(heading, justify="left" if heading == "MODEL" else "right")
    for name in engines:
        mine = [one for one in served if one.engine == name]
        peak = watch.peaks.get(name, 0)
        out.add_row(
            name,
            str(len(mine)),
            str(sum(bool(one.error) for one in mine)),
            str(sum(one.completion_tokens for one in mine)),
            format_size(peak),
            f"{100 * peak / budget:.0f} %",
        )
    return out


def summary(served: Sequence[Served], watch: Watch, engines: Sequence[str], budget: int, token_bytes: int) -> list[str]:
    """The lines under the table."""
    queued = queued_by_static_split(served, engines, budget, token_bytes)
    kept = "at every sample" if watch.over_budget == 0 else f"EXCEPT at {watch.over_budget} samples"
    return [
        f"budget {format_size(budget)}; the sum stayed within it {kept} of {watch.samples} "
        f"(peak {format_size(watch.peak_sum)} by the ledger, {format_size(watch.peak_kernel)} by the kernel)",
        f"a static half-and-half split would have made {queued} of {len(served)} requests wait for memory",
    ]

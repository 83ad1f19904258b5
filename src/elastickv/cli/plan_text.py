"""A plan for people and for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastickv.cli.bars import short
from elastickv.planning import Model, Plan
from elastickv.units import format_size

__all__ = ["as_dict", "render"]


def render(plan: Plan, device: str, *, ranks: int) -> RenderableType:
    """Two tables, a verdict and what to change."""
    each = f", each of {ranks} ranks on a device of its own" if ranks > 1 else ""
    head = Text(f"{device}: {format_size(plan.capacity)}{each}", style="bold")
    return Group(head, _memory(plan), Text(""), _tokens(plan), Text(""), *_verdict(plan))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("  MODEL", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _memory(plan: Plan) -> Table:
    table = _table("WEIGHTS", "GRAPHS", "FLOOR", "A TOKEN", "LONGEST REQUEST")
    for model in plan.models:
        token = round(model.shape.token_bytes)
        sizes = (model.weights, model.allowance, model.floor, token, model.request)
        table.add_row(f"  {model.name}", *(short(size) for size in sizes))
    return table


def _tokens(plan: Plan) -> Table:
    table = _table("BLOCK", "TOKENS", "LONGEST", "AT FLOOR", "AT MOST")
    for model in plan.models:
        tokens = (model.length, model.tokens_within(model.floor), model.tokens_within(plan.most(model)))
        block = short(model.shape.block_bytes), str(model.shape.block_tokens)
        table.add_row(f"  {model.name}", *block, *(f"{count:,}" for count in tokens))
    return table


def _verdict(plan: Plan) -> list[Text]:
    if plan.fits:
        spare = format_size(plan.capacity - plan.needed)
        return [Text(f"They fit: {format_size(plan.needed)} are needed, {spare} are left over for whoever needs them.")]
    lines = [Text(f"They do not fit: {format_size(plan.needed)} are needed, {format_size(plan.capacity)} are there.")]
    if plan.sets:
        lines.append(Text("At the same time can be up:"))
        lines += [Text(f"  {' + '.join(names)}") for names in plan.sets]
    else:
        lines.append(Text("None of them can be up, not even alone."))
    if plan.advice:
        lines.append(Text("What would help:"))
        lines += [Text(f"  {advice.text}") for advice in plan.advice]
    return lines


def as_dict(plan: Plan, device: str, page_bytes: int) -> dict[str, Any]:
    """Plain values; sizes in bytes."""
    return {
        "device": device,
        "capacity": plan.capacity,
        "page_bytes": page_bytes,
        "fits": plan.fits,
        "needed": plan.needed,
        "sets": [list(names) for names in plan.sets],
        "models": [_model(plan, model) for model in plan.models],
        "advice": [
            {"what": advice.what, "text": advice.text, "models": list(advice.models), "size": advice.size}
            for advice in plan.advice
        ],
    }


def _model(plan: Plan, model: Model) -> dict[str, Any]:
    shape = model.shape
    most = plan.most(model)
    return {
        "name": model.name,
        "weights": model.weights,
        "allowance": model.allowance,
        "static": model.static,
        "floor": model.floor,
        "block_tokens": shape.block_tokens,
        "block_bytes": shape.block_bytes,
        "spans": max(stage.spans for stage in shape.stages),
        "page_cost": model.page_cost,
        "token_bytes": shape.token_bytes,
        "state_bytes": shape.state_bytes,
        "fixed_blocks": shape.fixed_blocks,
        "max_model_len": model.length,
        "request_bytes": model.request,
        "request_blocks": shape.blocks_of(model.length),
        "tokens_at_floor": model.tokens_within(model.floor),
        "most_bytes": most,
        "tokens_at_most": model.tokens_within(most),
    }

"""What an engine holds besides its cache: weights, and an allowance for everything that is known only once it runs.

An engine leases weights and allowance before it loads, and trues the lease up once it has run the model and captured
its graphs. The plan counts with the same sum, so both come from here.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ALLOWANCE_BASE", "ALLOWANCE_PART", "allowance", "static_bytes"]

ALLOWANCE_BASE: Final = 1536 * 1024 * 1024
"""Bytes on a GPU whatever the model: context, libraries' workspaces, graphs of small batches. An estimate, above what
small models take; it is given back when the engine trues its lease up."""

ALLOWANCE_PART: Final = 0.05
"""Part of the weights on top of it on a GPU: activations and graphs grow with the model. An estimate likewise."""


def allowance(weights: int, *, on_gpu: bool) -> int:
    """Bytes of one rank for graphs, activations and workspaces, given the bytes of its weights.

    0 on the host: there an engine's other memory is the process's own, and the ledger knows nothing of it.
    """
    return ALLOWANCE_BASE + int(weights * ALLOWANCE_PART) if on_gpu else 0


def static_bytes(weights: int, *, on_gpu: bool) -> int:
    """Bytes of one rank that its lease for weights and everything else but the cache begins with."""
    return weights + allowance(weights, on_gpu=on_gpu)

"""What a model needs before it is started: weights, bytes a token, blocks and pages, and which models fit together.

Pure arithmetic over files: a configuration, a checkpoint's headers. No engine and no GPU is asked.

    architecture    config.json -> layers by kind
    states          layers that keep a state per sequence
    checkpoint      the checkpoint's files -> bytes of weights on each rank
    static          what an engine holds besides its cache
    blocks          layers -> tokens and bytes of a block, spans, groups
    sharing         several models on one device: who fits, with whom, and what to change
"""

from __future__ import annotations

from elastickv.planning.architecture import Architecture, Kind, Layer, architecture_of, read_architecture
from elastickv.planning.blocks import CacheShape, Serving, cache_shape
from elastickv.planning.checkpoint import Checkpoint, read_checkpoint
from elastickv.planning.sharing import Advice, Model, Plan, plan_device
from elastickv.planning.static import allowance, static_bytes

__all__ = [
    "Advice",
    "Architecture",
    "CacheShape",
    "Checkpoint",
    "Kind",
    "Layer",
    "Model",
    "Plan",
    "Serving",
    "allowance",
    "architecture_of",
    "cache_shape",
    "plan_device",
    "read_architecture",
    "read_checkpoint",
    "static_bytes",
]

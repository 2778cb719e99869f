"""Presets of `train`: sets of flags that belong together. A preset only fills in what nothing else gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NETWORK_RATE = 3e-3
"""Learning rate of a policy's network that is trained beside a model that stays as it is."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "retention": dict(
        policy="retention", slots=(256,), length=2048, rows=1, steps=300, learning_rate=NETWORK_RATE, weight_decay=0.0,
        schedule="stable", horizon=512.0, recent=32, held_out=2,
    ),
    "joint": dict(
        policy="retention-layer", distill=True, slots=(256,), length=2048, rows=1, steps=400, learning_rate=1e-4,
        segment=256, bptt_segments=2, horizon=512.0, recent=32, held_out=2,
    ),
    "dms": dict(
        policy="dms", slots=(256,), ratio=8.0, window=64, length=2048, rows=1, steps=400,
        learning_rate=NETWORK_RATE, weight_decay=0.0, schedule="constant", held_out=2,
    ),
}  # fmt: skip
"""By name, values of flags.

  retention  a retention head beside a model that stays as it is; the cheapest, since nothing is read backwards
  joint      model and retention head together, through a bounded state, with the model's own full cache as teacher
  dms        a head for delayed eviction beside a model that stays as it is, whose full cache is the teacher
"""

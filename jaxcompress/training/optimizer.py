"""The optimizer that this library trains small decoders with."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon


def warmup_stable_decay(peak: float, steps: int, *, warmup: int = 100, decay: float = 0.3) -> optax.Schedule:
    """Linear warmup, a plateau, and a linear decay to zero over the last `decay` of the steps."""
    tail = int(steps * decay)
    plateau = max(steps - warmup - tail, 0)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, tail),
        ],
        [warmup, warmup + plateau],
    )


def muon_for_decoder(
    schedule: optax.Schedule, *, clip: float = 1.0, weight_decay: float = 0.05
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the layers' matrices, Adam for embeddings and norms, clipped by global norm.

    The matrices of all layers are stacked, [L, in, out]; each is orthogonalised on its own, and its update is scaled
    to the root mean square of Adam's (Liu et al. 2025), so that one learning rate serves both.
    """

    def matrices(params: Any) -> Any:
        def spec(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
            stacked = "layers" in jax.tree_util.keystr(path) and leaf.ndim == 3
            return MuonDimensionNumbers(reduction_axis=1, output_axis=2) if stacked else None

        return jax.tree_util.tree_map_with_path(spec, params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        muon(
            schedule,
            weight_decay=weight_decay,
            adam_b2=0.95,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        ),
    )

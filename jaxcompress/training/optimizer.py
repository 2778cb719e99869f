"""Optimizers and learning-rate schedules for decoders."""

from __future__ import annotations

from typing import Any

import jax

from jaxcompress._extras import extra
from jaxcompress.inputs.scalars import whole

with extra("train"):
    import optax
    from optax.contrib import MuonDimensionNumbers, muon


def warmup_within(warmup: int, steps: int) -> int:
    """The steps of a warmup as far as they fit: at most all steps but the last, so that the peak is reached.

    Raises:
      ValueError: no steps, or a number that is not whole.
    """
    return min(whole(warmup, "warmup"), whole(steps, "steps", least=1) - 1)


def warmup_stable_decay(peak: float, steps: int, *, warmup: int = 100, decay: float = 0.3) -> optax.Schedule:
    """Linear warmup, a plateau, and a linear decay to zero over the last `decay` of the steps, none of them warmup.

    The warmup is cut as by `warmup_within`.
    """
    warmup = warmup_within(warmup, steps)
    tail = min(int(steps * decay), steps - warmup)
    plateau = steps - warmup - tail
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

    The matrices of all layers are stacked, [L, in, out], or [L, X, in, out] of experts; each is orthogonalised on its
    own, and its update is scaled to the root mean square of Adam's (Liu et al. 2025), so that one learning rate serves
    both.
    """

    def matrices(params: Any) -> Any:
        def spec(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
            name = jax.tree_util.keystr(path)
            stacked = "layers" in name and "bias" not in name and leaf.ndim in (3, 4)
            return MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1) if stacked else None

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


def adamw_for_decoder(
    schedule: optax.Schedule, *, clip: float = 1.0, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), clipped by global norm. Norms, biases and sinks have no weight decay."""

    def decays(params: Any) -> Any:
        matrix = lambda path, leaf: not any(part in jax.tree_util.keystr(path) for part in ("scale", "bias", "sinks"))
        return jax.tree_util.tree_map_with_path(matrix, params)

    return optax.chain(
        optax.clip_by_global_norm(clip), optax.adamw(schedule, b2=0.95, weight_decay=weight_decay, mask=decays)
    )


def warmup_cosine(peak: float, steps: int, *, warmup: int = 100, end: float = 0.1) -> optax.Schedule:
    """Linear warmup (see `warmup_within`), then half a cosine down to `end` times the peak at the last step."""
    warmup = warmup_within(warmup, steps)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, steps, end_value=end * peak)


def warmup_constant(peak: float, steps: int, *, warmup: int = 100) -> optax.Schedule:
    """Linear warmup (see `warmup_within`), then constant at the peak."""
    warmup = warmup_within(warmup, steps)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)], [warmup])


OPTIMIZERS = {"adamw": adamw_for_decoder, "muon": muon_for_decoder}
"""Optimizers by name. Each is called with a schedule, `clip` and `weight_decay`."""

SCHEDULES = {"cosine": warmup_cosine, "stable": warmup_stable_decay, "constant": warmup_constant}
"""Schedules by name. Each is called with the peak, the number of steps and `warmup`."""

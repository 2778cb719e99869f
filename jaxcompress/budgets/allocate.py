"""How a total of slots is shared among layers and heads: capacities for `init_state`, one per layer or per kv head.

Everything is counted in slots, and totals are exact: a slot more for one layer or head is a slot less for another.
Heads of different capacity need a policy of scope `kv_head`. These are pure functions of numbers;
`jaxcompress.budgets.calibration` measures what a model needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxcompress.inputs.scalars import number, whole
from jaxcompress.state.select import keep_top

PerLayer = tuple[int, ...]
"""Slots of each layer."""

PerHead = tuple[tuple[int, ...], ...]
"""Slots of each kv head of each layer."""


def pyramid(mean: int, layers: int, beta: int | float = 20, least: int = 1) -> PerLayer:
    """Fewer slots from layer to layer, in equal steps (PyramidKV, Cai et al. 2024, section 3.2); mean * layers in all.

    The last layer gets mean / beta, the first as much more than the mean as the last gets less. Fractions are rounded
    by largest remainder, so that the total is exact and no layer gets more than the one before it.

    Args:
      mean: slots per layer on average.
      beta: at least 1; 1 gives every layer the same.
      least: what the last layer gets at the least.

    Raises:
      ValueError: no layers, a beta below 1, a mean below `least`, or what is no such number.
    """
    _check_beta(beta)
    _check(mean, layers, least, "layers")
    low = max(Fraction(mean) / Fraction(beta), Fraction(least))
    step = 2 * (mean - low) / max(layers - 1, 1)
    return _rounded([mean + step * Fraction(layers - 1 - 2 * layer, 2) for layer in range(layers)])


def pyramid_official(mean: int, layers: int, tokens: int, window: int = 8, beta: int = 20) -> PerLayer:
    """The rule of PyramidKV's code (KVCache-Factory `pyramidkv_utils.py`), which shares what is left beside a window.

    Written for a prompt of known length that is selected from once. Its quirks are kept: the step is rounded down, so
    that the total may exceed mean * layers by a little; a prompt of less than 2 * (mean - window) tokens gives every
    layer the same, mean or the prompt's length, whichever is less. One layer gets the mean (the code divides by zero).

    Args:
      mean: slots per layer, the window included.
      tokens: length of the prompt; no layer gets more.
      window: the newest tokens, which every layer keeps.

    Raises:
      ValueError: no layers or tokens, a mean that is not more than the window, or what is no whole number.
    """
    tokens, window, beta = whole(tokens, "tokens", least=1), whole(window, "window"), whole(beta, "beta", least=1)
    _check(mean, layers, window + 1, "layers")
    if tokens < mean:
        return (tokens,) * layers
    if tokens < 2 * (mean - window) or layers == 1:
        return (mean,) * layers
    low = (mean - window) // beta
    high = 2 * (mean - window) - low
    if high >= tokens - window:
        high, low = tokens - window, 2 * (mean - window) - (tokens - window)
    return tuple(high - layer * ((high - low) // (layers - 1)) + window for layer in range(layers))


def pyramid_even(mean: int | float, layers: int, tokens: int, window: int = 64, beta: int = 20) -> PerLayer:
    """The rule of kvpress 0.5.5 (`pyramidkv_press.py`), which keeps the mean, the window inside it, up to rounding.

    Its quirks are kept: halves are rounded to even; every layer gets the mean where the last would get less than the
    window; one layer gets nearly twice the mean.

    Args:
      mean: slots per layer; kvpress has tokens * (1 - compression_ratio) here, which need not be whole.
      tokens: length of the prompt; no layer gets more than `tokens - window`, unless all get the mean.

    Raises:
      ValueError: no layers or tokens, a mean that is not above 0, a beta below 1, or what is no such number.
    """
    tokens, window = whole(tokens, "tokens", least=1), whole(window, "window")
    _check_beta(beta)
    if whole(layers, "the number of layers") < 1 or number(mean, "a mean of slots") <= 0:
        raise ValueError(f"a mean above 0 is shared by 1 layer or more, not a mean of {mean} by {layers} layers")
    low = mean / beta
    high = 2 * mean - low
    if high >= tokens - window:
        high, low = tokens - window, 2 * mean - (tokens - window)
    if not tokens >= high >= low >= window:
        return (max(1, round(mean)),) * layers
    return tuple(round(high - layer * (high - low) / max(layers - 1, 1)) for layer in range(layers))


def proportional(weights: Any, mean: int, least: int = 1) -> PerLayer | PerHead:
    """Slots in proportion to weights; the total is exactly mean times their number, rounded by largest remainder.

    A layer or head that would get less than `least` gets `least`; the others share the rest in proportion. Equal
    remainders are rounded up in order, so that of equal weights the earlier never gets less. Weights from the
    literature:

      HeadKV (Fu et al. 2024)  1 - 1 / beta + scores / scores.mean() / beta
      D2O (Wan et al. 2024)    what falls with the variance of the attention that a layer's tokens receive

    Args:
      weights: [L] or [L, K], finite, none below 0, not all 0.
      mean: slots on average.
      least: at least so many each.

    Returns:
      `PerLayer` for weights [L], `PerHead` for [L, K].

    Raises:
      ValueError: weights of another shape or sign, or a mean below `least`.
    """
    array = np.asarray(weights, np.float64)
    if array.ndim not in (1, 2) or not np.isfinite(array).all() or (array < 0).any() or not array.any():
        raise ValueError(
            f"weights are [L] or [L, K], finite, at least 0 and not all 0; given were {_shortened(array)} of shape "
            f"{list(array.shape)}"
        )
    _check(mean, array.size, least, "layers" if array.ndim == 1 else "heads")
    return _shared(array, mean, least) if array.ndim == 1 else _per_head(array, mean, least)


def from_scores(scores: Float[Array, "L B K N"], mean: int, least: int = 1) -> PerHead:
    """Head budgets by competition: how many of the best mean * L * K scores of a row are each head's own.

    A threshold over all layers and heads shares slots so (KVzip, Kim et al. 2025, "pair" level). This runs on the host,
    since shapes depend on the capacities: programs are compiled for this split. With several rows every head gets its
    mean share, rounded, since the rows of a batch have one shape.

    Args:
      scores: higher is kept, inf for sure, -inf for what is not there.
      mean: slots per head on average.

    Raises:
      ValueError: a mean below `least`, or no scores: all are -inf.
    """
    layers, batch, heads, n = scores.shape
    if jnp.isneginf(scores).all():
        raise ValueError(f"slots cannot be shared by scores {list(scores.shape)} that are all -inf: nothing is there")
    _check(mean, layers * heads, least, "heads")
    positions = jnp.where(jnp.isneginf(scores), -1, jnp.arange(n, dtype=jnp.int32))  # older tokens win ties
    flat = lambda x: x.transpose(1, 0, 2, 3).reshape(batch, 1, -1)
    best = np.asarray(keep_top(flat(scores), flat(positions), mean * layers * heads))
    return _per_head(best.reshape(batch, layers, heads, n).sum((0, 3)), mean, least)


def retrieval_split(retrieval: np.ndarray, slots: int, streaming: int) -> PerHead:
    """Retrieval heads get `slots`, the others `streaming` (DuoAttention, Xiao et al. 2024).

    Args:
      retrieval: [L, K] bool, True for heads that look far back (see `jaxcompress.budgets.calibration.retrieval_heads`).
      slots: for each of them.
      streaming: for each of the others: sinks and recent tokens.

    Raises:
      ValueError: not [L, K], or fewer than 1 slot for anyone.
    """
    heads = np.asarray(retrieval)
    if heads.ndim != 2 or heads.dtype != bool:
        raise ValueError(f"retrieval is [L, K] bool, not {list(heads.shape)} {heads.dtype}")
    slots, streaming = whole(slots, "slots", least=1), whole(streaming, "streaming", least=1)
    return tuple(tuple(slots if head else streaming for head in layer) for layer in heads.tolist())


def total(slots: PerLayer | PerHead) -> int:
    """All slots together."""
    return int(np.sum(slots))


def _check_beta(beta: float | int) -> None:
    if number(beta, "beta") < 1:
        raise ValueError(f"beta is how many times the mean exceeds the last layer's slots: at least 1, not {beta}")


def _check(mean: int, count: int, least: int, what: str) -> None:
    for given, name in ((mean, "a mean of slots"), (count, f"the number of {what}"), (least, "least")):
        whole(given, name)
    if count < 1:
        raise ValueError(f"slots are shared by at least 1 of the {what}, not {count}")
    if least < 1 or mean < least:
        raise ValueError(
            f"{count} {what} with {least} slots or more each need a mean of at least {max(least, 1)}, {mean} was given"
            if least >= 1
            else f"everyone needs at least 1 slot, least={least} was given"
        )


def _shared(weights: np.ndarray, mean: int, least: int) -> PerLayer:
    flat = [Fraction(weight) for weight in weights.tolist()]
    return _rounded(_at_least(flat, mean * len(flat), least))


def _per_head(weights: np.ndarray, mean: int, least: int) -> PerHead:
    given, heads = _shared(weights.ravel(), mean, least), weights.shape[1]
    return tuple(given[at : at + heads] for at in range(0, len(given), heads))


def _at_least(weights: Sequence[Fraction], total: int, least: int) -> list[Fraction]:
    """Shares of the total in proportion to weights; where that is less than `least`, `least`."""
    lifted = [False] * len(weights)
    while True:
        rest = sum((w for w, up in zip(weights, lifted, strict=True) if not up), Fraction(0))
        left = Fraction(total - least * sum(lifted))
        shares = [Fraction(least) if up else w * left / rest for w, up in zip(weights, lifted, strict=True)]
        short = [share < least for share in shares]
        if not any(short):
            return shares
        lifted = [a or b for a, b in zip(lifted, short, strict=True)]


def _rounded(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole numbers with the same sum: rounded down, and what is left goes to the largest remainders."""
    down = [share.numerator // share.denominator for share in shares]
    left = int(sum(shares)) - sum(down)
    order = sorted(range(len(down)), key=lambda i: (down[i] - shares[i], i))
    for i in order[:left]:
        down[i] += 1
    return tuple(down)


def _shortened(array: np.ndarray) -> str:
    return np.array2string(array, threshold=8, precision=3)

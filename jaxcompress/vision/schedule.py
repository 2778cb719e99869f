"""After which layers tokens leave, and how many each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxcompress.inputs.scalars import Number, number
from jaxcompress.models.llava import LlavaConfig
from jaxcompress.vision.choose import check_budget
from jaxcompress.vision.layer_view import PruneRule
from jaxcompress.vision.method import Method, PruneStep

DEPTH = 32
"""Layers of the decoders for which numbers were published (LLaVA-1.5-7B)."""


def spread_over(published: Sequence[int], layers: int) -> tuple[int, ...]:
    """The published layers of 32 in a decoder of another depth: at the same share of it, distinct, and not the last."""
    if layers >= DEPTH:
        return tuple(published)
    found = sorted({min(round(layer * layers / DEPTH), layers - 2) for layer in published})
    return tuple(layer for layer in found if layer >= 0)


def falling(tokens: int, n: int, steps: int) -> tuple[int, ...]:
    """From `tokens` to n in so many steps, by the same factor each time.

    Raises:
      ValueError: n is not in 0..tokens.
    """
    check_budget(n, tokens, "visual tokens")
    if n == tokens or not steps:
        return (n,) * steps
    left = [max(n, round(tokens * (max(n, 1) / tokens) ** ((i + 1) / steps))) for i in range(steps)]
    return (*left[:-1], n)


def prune_steps_to(rule: PruneRule, layers: Sequence[int], tokens: int, n: int) -> tuple[PruneStep, ...]:
    """One rule after these layers, until n tokens are left."""
    return tuple(
        PruneStep(layer, keep, rule) for layer, keep in zip(layers, falling(tokens, n, len(layers)), strict=True)
    )


def method_for_mean(config: LlavaConfig, make: Callable[[int], Method], mean: Number, crops: int = 1) -> Method:
    """The method with the largest final number whose mean over layers is no more than `mean`.

    Papers that drop in several layers report that mean.

    Raises:
      ValueError: the layers before the first cut alone hold more, or a mean that is no number.
    """
    mean, total = number(mean, "the mean number of visual tokens"), config.tower.num_patches * crops
    fits = None
    low, high = 1, total
    while low <= high:
        middle = (low + high) // 2
        method = _try(config, make, middle, crops)
        if method is not None and method.mean_tokens(config, crops) <= mean:
            fits, low = method, middle + 1
        else:
            high = middle - 1
    if fits is None:
        least = _try(config, make, 1, crops)
        held = "" if least is None else f"; with 1 token at the end it is {least.mean_tokens(config, crops):.1f}"
        raise ValueError(f"no final number of visual tokens has a mean of {mean} over layers{held}")
    return fits


def _try(config: LlavaConfig, make: Callable[[int], Method], n: int, crops: int) -> Method | None:
    try:
        method = make(n)
        method.tokens_per_layer(config, crops)
    except ValueError:
        return None
    return method

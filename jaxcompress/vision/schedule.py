"""Schedules: the layers after which tokens leave, and the number of tokens that leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxcompress.inputs.scalars import Number, number
from jaxcompress.models.llava import LlavaConfig
from jaxcompress.vision.choose import check_budget
from jaxcompress.vision.layer_view import PruneRule
from jaxcompress.vision.method import Method, PruneStep

DEPTH = 32
"""Number of decoder layers in the papers (LLaVA-1.5-7B)."""


def spread_over(published: Sequence[int], layers: int) -> tuple[int, ...]:
    """Scales the published layers (of 32) to fewer: same relative depth, distinct, never the last layer.

    Deeper decoders drop tokens after the same layers as published, as released code does.
    """
    if layers >= DEPTH:
        return tuple(published)
    found = sorted({min(round(layer * layers / DEPTH), layers - 2) for layer in published})
    return tuple(layer for layer in found if layer >= 0)


def falling(tokens: int, n: int, steps: int) -> tuple[int, ...]:
    """Token counts from `tokens` to n in `steps` steps, each by the same factor.

    Raises:
      ValueError: n is not in 0..tokens.
    """
    check_budget(n, tokens, "visual tokens")
    if n == tokens or not steps:
        return (n,) * steps
    left = [max(n, round(tokens * (max(n, 1) / tokens) ** ((i + 1) / steps))) for i in range(steps)]
    return (*left[:-1], n)


def check_steps(layers: Sequence[int], tokens: int, n: int) -> None:
    """Raises ValueError where n of `tokens` visual tokens cannot be left after the last of these layers."""
    check_budget(n, tokens, "visual tokens")
    if not layers and n < tokens:
        raise ValueError(
            f"{n} of {tokens} visual tokens cannot be left between the layers of a decoder that has only one; use a "
            "method that acts in the tower"
        )


def prune_steps_to(rule: PruneRule, layers: Sequence[int], tokens: int, n: int) -> tuple[PruneStep, ...]:
    """Applies one rule after these layers; n tokens are left after the last.

    Raises:
      ValueError: n is not in 0..tokens, or tokens have to leave and there are no layers.
    """
    check_steps(layers, tokens, n)
    return tuple(
        PruneStep(layer, keep, rule) for layer, keep in zip(layers, falling(tokens, n, len(layers)), strict=True)
    )


def method_for_mean(config: LlavaConfig, make: Callable[[int], Method], mean: Number, crops: int = 1) -> Method:
    """The method with the largest final number of tokens whose mean over layers is at most `mean`.

    Papers that drop tokens in several layers report this mean.

    Raises:
      ValueError: every number that the method can leave has a greater mean, or `mean` is not a number.
    """
    mean, total = number(mean, "the mean number of visual tokens"), config.tokens_per_crop * crops
    # Not every number can be reached, so there is nothing to bisect. The mean is never below the final number.
    for n in range(min(int(mean), total), 0, -1):
        method = _try(config, make, n, crops)
        if method is not None and method.mean_tokens(config, crops) <= mean:
            return method
    found = ((n, _try(config, make, n, crops)) for n in range(1, total + 1))
    least = next(((n, method.mean_tokens(config, crops)) for n, method in found if method is not None), None)
    held = "" if least is None else f"; with {least[0]} at the end, the fewest that can be left, it is {least[1]:.1f}"
    raise ValueError(f"no final number of visual tokens has a mean of {mean} over layers{held}")


def _try(config: LlavaConfig, make: Callable[[int], Method], n: int, crops: int) -> Method | None:
    try:
        method = make(n)
        method.tokens_per_layer(config, crops)
    except ValueError:
        return None
    return method

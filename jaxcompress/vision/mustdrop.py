"""MustDrop whole: vision-encoding, prefilling and decoding stage, each alone and together (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.llava import LlavaConfig
from jaxcompress.vision import prune_rules
from jaxcompress.vision.choose import check_budget
from jaxcompress.vision.dual_attention import LAYERS, THRESHOLDS
from jaxcompress.vision.encoders import all_patches, mustdrop_encoder, mustdrop_threshold_encoder
from jaxcompress.vision.layer_view import PruneRule, renumber_after
from jaxcompress.vision.method import Method, PruneStep
from jaxcompress.vision.output_aware import OutputAware
from jaxcompress.vision.schedule import prune_steps_to, spread_over
from jaxcompress.vision.windows import WINDOW


def window_of(grid: int) -> int:
    """The side of the windows that merge: 3 as published if such tile the grid, else the nearest that do; 1 if none."""
    fits = [w for w in range(2, grid + 1) if not grid % w]
    return min(fits, key=lambda w: abs(w - WINDOW)) if fits else 1


def merging_windows(n: int, share: float = 0.25) -> Callable[[LlavaConfig], tuple[int, int]]:
    """(config) -> (side, how many merge): a share of the windows, but never so many that fewer than n are left."""

    def count(config: LlavaConfig) -> tuple[int, int]:
        window, grid = window_of(config.tower.grid), config.tower.grid
        if window == 1:
            return 1, 0
        many = (grid // window) ** 2
        return window, min(int(many * share), max(config.tower.num_patches - n, 0) // (window**2 - 1))

    return count


def encoding(n: int, share: float = 0.25) -> Method:
    """The first stage alone: windows merge until n tokens are left, as nearly as whole windows allow, never fewer."""

    def count(config: LlavaConfig) -> tuple[int, int]:
        check_budget(n, config.tower.num_patches, "patches")
        return merging_windows(n, 1.0)(config)

    def left(config: LlavaConfig) -> int:
        window, many = count(config)
        return config.tower.num_patches - many * (window**2 - 1)

    return Method("mustdrop-encode", mustdrop_encoder(count, keys=False), left)


def prefilling(n: int, *, protect: bool = False, compact: bool = False) -> Method:
    """The second stage alone: after layers 2, 6, 10 and 14 of 32 patches go, until n are left."""
    rule: PruneRule = prune_rules.mustdrop if protect else prune_rules.mustdrop_without_key_tokens
    rule = renumber_after(rule) if compact else rule

    def steps(config: DecoderConfig, tokens: int) -> tuple[PruneStep, ...]:
        return prune_steps_to(rule, spread_over(LAYERS, config.num_layers), tokens, n)

    return Method("mustdrop-prefill", all_patches, prune_steps=steps, asks=True)


def decoding() -> Method:
    """The third stage alone: nothing goes before words are written."""
    return Method("mustdrop-decode", all_patches, decode_policy=OutputAware)


def mustdrop(n: int, *, share: float = 0.25, compact: bool = False) -> Method:
    """All three stages, with exact numbers: a share of the windows merges, then n patches stay, key tokens first.

    Args:
      share: of the windows, as far as no fewer than n tokens are left.
      compact: positions numbered anew at every stage, as in the released code; by default tokens stay where they were.
    """
    count = merging_windows(n, share)

    def left(config: LlavaConfig) -> int:
        window, many = count(config)
        return config.tower.num_patches - many * (window**2 - 1)

    second = prefilling(n, protect=True, compact=compact)
    # A policy that goes by positions knows no patches where these are numbered anew.
    whole_method = Method("mustdrop", mustdrop_encoder(count, keys=True), left, second.prune_steps, asks=True)
    return whole_method if compact else whole_method._replace(decode_policy=OutputAware)


def above_thresholds(average: int = 192, *, window: int = WINDOW) -> Method:
    """All stages by the published thresholds, with fixed shapes: what goes leaves its place empty.

    Args:
      average: whose thresholds, 192, 128 or 64.

    Raises:
      ValueError: none were published for this number.
    """
    if average not in THRESHOLDS:
        raise ValueError(f"thresholds were published for {sorted(THRESHOLDS)} tokens, not {average}")
    rule = prune_rules.mustdrop_above(THRESHOLDS[average])

    def steps(config: DecoderConfig, tokens: int) -> tuple[PruneStep, ...]:
        return tuple(PruneStep(layer, tokens, rule) for layer in spread_over(LAYERS, config.num_layers))

    encode = mustdrop_threshold_encoder(window=window, keys=True)
    return Method("mustdrop-thresholds", encode, prune_steps=steps, asks=True, decode_policy=OutputAware)

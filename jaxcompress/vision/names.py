"""Methods by name, for command lines and tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise

from jaxcompress.inputs.scalars import Number, whole
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.llava import LlavaConfig
from jaxcompress.vision import encoders, fastv, fitprune, mustdrop, prune_rules, sparsevlm, uniform
from jaxcompress.vision.choose import check_budget
from jaxcompress.vision.dart import LAYER as DART_LAYER
from jaxcompress.vision.layer_view import PruneRule
from jaxcompress.vision.method import Method, PruneStep
from jaxcompress.vision.schedule import DEPTH, check_steps, method_for_mean, prune_steps_to, spread_over
from jaxcompress.vision.text_raters import text_raters


def _encoder(
    name: str, encode: Callable[[int], encoders.Encode], reach: Callable[[LlavaConfig, int], object] | None = None
) -> Callable[[int], Method]:
    """Methods in the tower, as (n) -> the method. `reach` raises ValueError where it cannot leave n of a crop."""

    def make(n: int) -> Method:
        def left(config: LlavaConfig) -> int:
            check_budget(n, encoders.check_patches_only(config), "patches")
            if reach is not None:
                reach(config, n)
            return n

        return Method(name, encode(n), left)

    return make


def _cells(config: LlavaConfig, n: int) -> object:
    return uniform.cells(config.tower.grid, config.tower.grid, n)


def _merges(config: LlavaConfig, n: int) -> object:
    return encoders.tome_counts(config.tower.num_patches, n, config.feature_layers)


def _once(name: str, rule: PruneRule, before: int) -> Callable[[int], Method]:
    """Prunes once, before a layer of 32."""

    def steps(config: DecoderConfig, tokens: int, n: int) -> tuple[PruneStep, ...]:
        return prune_steps_to(rule, spread_over((before - 1,), config.num_layers), tokens, n)

    return lambda n: Method(name, encoders.all_patches, prune_steps=lambda config, tokens: steps(config, tokens, n))


def _sparsevlm(
    name: str, rule: PruneRule, reach: Callable[[int, int], object] | None = None
) -> Callable[[int], Method]:
    """Methods whose raters prune after several layers. `reach` raises ValueError where a step cannot leave so many."""

    def make(n: int) -> Method:
        def steps(config: DecoderConfig, tokens: int) -> tuple[PruneStep, ...]:
            found = prune_steps_to(rule, spread_over(sparsevlm.LAYERS, config.num_layers), tokens, n)
            if reach is not None:
                for before, after in pairwise((tokens, *(step.keep for step in found))):
                    reach(before, after)
            return found

        return Method(name, encoders.all_patches, prune_steps=steps, raters=text_raters, asks=True)

    return make


def _fitprune(n: int) -> Method:
    """The authors' recipe for 70 %, stretched over another depth, number of patches or final number."""

    def steps(config: DecoderConfig, tokens: int) -> tuple[PruneStep, ...]:
        recipe, depth = fitprune.RECIPES[70], config.num_layers
        layers = range(depth - 1)
        check_steps(layers, tokens, n)
        if not layers:
            return ()
        shares = [sum(recipe[: round((layer + 1) * DEPTH / depth)]) / sum(recipe[: (depth - 1) * DEPTH // depth])
                  for layer in layers]  # fmt: skip
        left = [tokens - round(min(share, 1.0) * (tokens - n)) for share in shares]
        left[-1] = n
        # Layers in which nothing goes need no step.
        before = [tokens, *left[:-1]]
        counts = zip(layers, left, before, strict=True)
        return tuple(PruneStep(layer, keep, prune_rules.fitprune) for layer, keep, was in counts if keep < was)

    return Method("fitprune", encoders.all_patches, prune_steps=steps, asks=True)


_NAMED: dict[str, Callable[[int], Method]] = {
    "random": _encoder("random", lambda n: encoders.top_patches(encoders.random_score(0), n)),
    "stride": _encoder("stride", lambda n: encoders.fixed_patches(lambda grid, n: uniform.stride(grid * grid, n), n)),
    "grid": _encoder(
        "grid", lambda n: encoders.fixed_patches(lambda grid, n: uniform.centres(grid, grid, n), n), _cells
    ),
    "pool": _encoder("pool", encoders.pooling_encoder, _cells),
    "tome": _encoder("tome", encoders.tome_encoder, _merges),
    "fastervlm": _encoder("fastervlm", lambda n: encoders.top_patches(encoders.class_score, n)),
    "visionzip": _encoder("visionzip", encoders.visionzip_encoder),
    "prumerge": _encoder("prumerge", encoders.prumerge_encoder),
    "prumerge+": _encoder("prumerge+", partial(encoders.prumerge_encoder, stepped=True)),
    "cdpruner": _encoder("cdpruner", encoders.cdpruner_encoder),
    "fastv": _once("fastv", prune_rules.fastv, fastv.LAYER),
    "fastv-window": _once("fastv-window", prune_rules.window_fastv, fastv.LAYER),
    "fastv-random": _once("fastv-random", prune_rules.random, fastv.LAYER),
    "dart": _once("dart", prune_rules.dart_pruning, DART_LAYER),
    "sparsevlm": _sparsevlm("sparsevlm", prune_rules.sparsevlm_recycling, prune_rules.kept_beside_clusters),
    "sparsevlm+": _sparsevlm("sparsevlm+", prune_rules.sparsevlm_plus),
    "fitprune": _fitprune,
    "mustdrop": mustdrop.mustdrop,
    "mustdrop-compact": partial(mustdrop.mustdrop, compact=True),
    "mustdrop-encode": mustdrop.encoding,
    "mustdrop-prefill": mustdrop.prefilling,
}
WITHOUT_NUMBER = ("full", "mustdrop-decode", "mustdrop-thresholds")
"""Methods that keep everything in the prompt, or what thresholds say."""
NAMES = (*WITHOUT_NUMBER[:1], *_NAMED, *WITHOUT_NUMBER[1:])
"""Names that `get_method` knows."""


def get_method(name: str, keep: Number | None = None) -> Method:
    """The method of a name, with published defaults.

    Args:
      keep: visual tokens that are left in the end: of each crop, for methods in the tower; of all crops of a picture
        together, for methods in the decoder. `full` and `mustdrop-decode` keep all and take none; `mustdrop-thresholds`
        takes the mean over layers for which its thresholds were published, 192, 128 or 64.

    Raises:
      ValueError: an unknown name, or a number that is missing, too much, or below 1. Whether it fits a model is checked
        where the model is known.
    """
    return _named(name, None if keep is None else whole(keep, f"keep, the visual tokens that stay with {name},"))


@lru_cache(maxsize=None, typed=True)
def _named(name: str, keep: int | None) -> Method:
    if name == "full":
        return _without(name, keep, Method(name, encoders.all_patches))
    if name == "mustdrop-decode":
        return _without(name, keep, mustdrop.decoding())
    if name == "mustdrop-thresholds":
        return mustdrop.above_thresholds(192 if keep is None else keep)
    if name not in _NAMED:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(NAMES)}")
    if keep is None or keep < 1:
        raise ValueError(f"{name} needs to know how many visual tokens stay: keep=64, not {keep}")
    return _NAMED[name](keep)._replace(name=name)


def get_method_for_mean(config: LlavaConfig, name: str, mean: Number, crops: int = 1) -> Method:
    """The method that keeps `mean` visual tokens, the mean over the decoder's layers: how papers count.

    Raises:
      ValueError: the method takes no number; see also `get_method` and `jaxcompress.vision.schedule.method_for_mean`.
    """
    if name in WITHOUT_NUMBER:
        raise ValueError(f"{name} leaves no number of visual tokens to choose, so none for a mean")
    if name != "mustdrop":
        return method_for_mean(config, lambda n: get_method(name, n), mean, crops)
    # As few windows merge as leave the decoder's first layers room.
    for share in (0.25, 0.5, 0.75):
        try:
            return method_for_mean(config, partial(mustdrop.mustdrop, share=share), mean, crops)
        except ValueError:
            continue
    return method_for_mean(config, partial(mustdrop.mustdrop, share=1.0), mean, crops)


def _without(name: str, keep: int | None, method: Method) -> Method:
    if keep is not None:
        raise ValueError(f"{name} keeps every visual token of the prompt; leave keep out")
    return method

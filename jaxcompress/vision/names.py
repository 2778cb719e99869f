"""Methods by name, for command lines and tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

from jaxcompress.inputs.scalars import Number, whole
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.llava import LlavaConfig
from jaxcompress.vision import encoders, fastv, fitprune, mustdrop, prefills, sparsevlm, uniform
from jaxcompress.vision.dart import LAYER as DART_LAYER
from jaxcompress.vision.method import Cut, CutRule, Method
from jaxcompress.vision.raters import rating
from jaxcompress.vision.schedule import DEPTH, cuts_down_to, for_average, spread_over


def _encoder(name: str, encode: Callable[[int], encoders.Encode]) -> Callable[[int], Method]:
    return lambda n: Method(name, encode(n), lambda config: n)


def _once(name: str, rule: CutRule, before: int) -> Callable[[int], Method]:
    """Cut once, before a layer of 32."""

    def cuts(config: DecoderConfig, tokens: int, n: int) -> tuple[Cut, ...]:
        return cuts_down_to(rule, spread_over((before - 1,), config.num_layers), tokens, n)

    return lambda n: Method(name, encoders.whole, cuts=lambda config, tokens: cuts(config, tokens, n))


def _often(name: str, rule: CutRule, layers: tuple[int, ...], *, rates: bool = False) -> Callable[[int], Method]:
    def make(n: int) -> Method:
        cuts = lambda config, tokens: cuts_down_to(rule, spread_over(layers, config.num_layers), tokens, n)
        return Method(name, encoders.whole, cuts=cuts, rates=rating if rates else None)

    return make


def _fitprune(n: int) -> Method:
    """The authors' recipe for 70 %, stretched over another depth, number of patches or final number."""

    def cuts(config: DecoderConfig, tokens: int) -> tuple[Cut, ...]:
        recipe, depth = fitprune.RECIPES[70], config.num_layers
        layers = range(depth - 1)
        shares = [sum(recipe[: round((layer + 1) * DEPTH / depth)]) / sum(recipe[: (depth - 1) * DEPTH // depth])
                  for layer in layers]  # fmt: skip
        left = [tokens - round(min(share, 1.0) * (tokens - n)) for share in shares]
        left[-1] = n
        # Layers in which nothing goes need no cut.
        before = [tokens, *left[:-1]]
        return tuple(Cut(layer, keep, prefills.fitprune) for layer, keep, was in zip(layers, left, before, strict=True)
                     if keep < was)  # fmt: skip

    return Method("fitprune", encoders.whole, cuts=cuts)


_NAMED: dict[str, Callable[[int], Method]] = {
    "random": _encoder("random", lambda n: encoders.chosen(encoders.by_chance(0), n)),
    "stride": _encoder("stride", lambda n: encoders.at_places(lambda grid, n: uniform.stride(grid * grid, n), n)),
    "grid": _encoder("grid", lambda n: encoders.at_places(lambda grid, n: uniform.centres(grid, grid, n), n)),
    "pool": _encoder("pool", encoders.pooled),
    "tome": _encoder("tome", encoders.in_tower),
    "fastervlm": _encoder("fastervlm", lambda n: encoders.chosen(encoders.by_class, n)),
    "visionzip": _encoder("visionzip", encoders.zipped),
    "prumerge": _encoder("prumerge", encoders.prumerged),
    "prumerge+": _encoder("prumerge+", partial(encoders.prumerged, stepped=True)),
    "cdpruner": _encoder("cdpruner", encoders.spread),
    "fastv": _once("fastv", prefills.fastv, fastv.LAYER),
    "fastv-window": _once("fastv-window", prefills.window_fastv, fastv.LAYER),
    "fastv-random": _once("fastv-random", prefills.random, fastv.LAYER),
    "dart": _once("dart", prefills.rule_of_dart, DART_LAYER),
    "sparsevlm": _often("sparsevlm", prefills.recycling, sparsevlm.LAYERS, rates=True),
    "sparsevlm+": _often("sparsevlm+", prefills.sparsevlm_plus, sparsevlm.LAYERS, rates=True),
    "fitprune": _fitprune,
    "mustdrop": mustdrop.mustdrop,
    "mustdrop-compact": partial(mustdrop.mustdrop, compact=True),
    "mustdrop-encode": mustdrop.encoding,
    "mustdrop-prefill": mustdrop.prefilling,
}
NAMES = ("full", *_NAMED, "mustdrop-decode", "mustdrop-thresholds")
"""Names that `get_method` knows."""


def get_method(name: str, keep: Number | None = None) -> Method:
    """The method of a name, with published defaults.

    Args:
      keep: visual tokens of each picture (or of all its crops together, for methods in the decoder) that are left in
        the end. `full` and `mustdrop-decode` keep all and take none; `mustdrop-thresholds` takes the mean over layers
        for which its thresholds were published, 192, 128 or 64.

    Raises:
      ValueError: an unknown name, or a number that is missing, too much, or below 1. Whether it fits a model is checked
        where the model is known.
    """
    return _named(name, None if keep is None else whole(keep, f"keep, the visual tokens that stay with {name},"))


@lru_cache(maxsize=None, typed=True)
def _named(name: str, keep: int | None) -> Method:
    if name == "full":
        return _without(name, keep, Method(name, encoders.whole))
    if name == "mustdrop-decode":
        return _without(name, keep, mustdrop.decoding())
    if name == "mustdrop-thresholds":
        return mustdrop.above_thresholds(192 if keep is None else keep)
    if name not in _NAMED:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(NAMES)}")
    if keep is None or keep < 1:
        raise ValueError(f"{name} needs to know how many visual tokens stay: keep=64, not {keep}")
    return _NAMED[name](keep)._replace(name=name)


def named_for_average(name: str, average: Number, config: LlavaConfig, crops: int = 1) -> Method:
    """The method that keeps `average` tokens over the decoder's layers, the way papers count.

    Raises:
      ValueError: see `get_method` and `jaxcompress.vision.schedule.for_average`.
    """
    if name != "mustdrop":
        return for_average(lambda n: get_method(name, n), average, config, crops)
    # As few windows merge as leave the decoder's first layers room.
    for share in (0.25, 0.5, 0.75):
        try:
            return for_average(partial(mustdrop.mustdrop, share=share), average, config, crops)
        except ValueError:
            continue
    return for_average(partial(mustdrop.mustdrop, share=1.0), average, config, crops)


def _without(name: str, keep: int | None, method: Method) -> Method:
    if keep is not None:
        raise ValueError(f"{name} keeps every visual token of the prompt; leave keep out")
    return method

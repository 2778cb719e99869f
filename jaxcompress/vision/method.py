"""What a method is: where it acts and how many it keeps.

A method may act in three places, each of which may be left out:

  encode   in the tower or at its end: fewer visual tokens reach the decoder
  cuts     after some of the decoder's layers, while the prompt is read
  policy   while words are written

How many are left after each of them follows from shapes alone, so that a whole method is one compiled program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.read_block import HiddenBlock
from jaxcompress.models.rope import RopeConfig
from jaxcompress.models.vit import Pixels
from jaxcompress.policies.full import Full
from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.vision.choose import best, check_budget, marks, standing, take


class Encoded(NamedTuple):
    """The visual tokens of a picture, as the decoder gets them.

    Attributes:
      visual: [B, M, E].
      place: [B, M] int32, the patch in raster order at which each stands, crop after crop; -1 for none.
      size: [B, M], how many patches each stands for; 0 where there is none.
      key: [B, M] bool, what later stages may not drop.
    """

    visual: Float[Array, "B M E"]
    place: Int[Array, "B M"]
    size: Float[Array, "B M"]
    key: Bool[Array, "B M"]


class Given(NamedTuple):
    """What the rules of all layers know.

    Attributes:
      words: which words rate patches, [B, W], of the W tokens of a row that are no patches; all by default.
      key: [B, M], which visual tokens may not go.
      rope: of the decoder.
    """

    words: Bool[Array, "B W"]
    key: Bool[Array, "B M"]
    rope: RopeConfig


CutRule = Callable[[Given, HiddenBlock, AttentionInputs, int], HiddenBlock]
"""(what is given, tokens after a layer, what its attention compared, how many visual tokens stay) -> the rest."""


class Cut(NamedTuple):
    """Visual tokens leave after a layer (counted from 0) until `keep` are left, by a rule.

    A rule with fixed shapes for an adaptive number keeps as many as before and empties places.
    """

    layer: int
    keep: int
    rule: CutRule


class Method(NamedTuple):
    """One way to keep fewer visual tokens. Hashable: a static argument under jit.

    Attributes:
      name: for tables.
      encode: (model, pixels of single crops) -> their tokens.
      encoded: (config) -> how many tokens of each crop `encode` leaves.
      cuts: (config, visual tokens before the first layer) -> where the decoder drops, in order.
      rates: which words rate: (embeddings, how many tokens are words) -> [B, W]; None: all.
      writing: (first, last) position of visual tokens -> policy while words are written; by default all stay.
    """

    name: str
    encode: Callable[[Llava, Pixels], Encoded]
    encoded: Callable[[LlavaConfig], int] = lambda config: config.tower.num_patches
    cuts: Callable[[DecoderConfig, int], tuple[Cut, ...]] = lambda config, tokens: ()
    rates: Callable[[HiddenBlock, int], Bool[Array, "B W"]] | None = None
    writing: Callable[[int, int], Policy] = lambda first, last: Full()

    def counts(self, config: LlavaConfig, crops: int = 1) -> tuple[int, ...]:
        """How many visual tokens each layer of the decoder attends to: what the KV cache holds of them."""
        return self.held(config.decoder, self.encoded(config) * crops)

    def held(self, config: DecoderConfig, tokens: int) -> tuple[int, ...]:
        """The same of so many visual tokens before the first layer."""
        cuts = {cut.layer: cut.keep for cut in self.cuts(config, tokens)}
        out = []
        for layer in range(config.num_layers):
            out.append(tokens)
            tokens = cuts.get(layer, tokens)
        return tuple(out)

    def average(self, config: LlavaConfig, crops: int = 1) -> float:
        """Visual tokens per layer, the mean: what papers call the number retained."""
        counts = self.counts(config, crops)
        return sum(counts) / len(counts)


def then(first: Method, second: Method, name: str) -> Method:
    """Both: the encoding of the first, the cuts of the second, and while words are written what either does."""
    writing = first.writing if second.writing is Method._field_defaults["writing"] else second.writing
    return second._replace(name=name, encode=first.encode, encoded=first.encoded, writing=writing)


class Look(NamedTuple):
    """What a rule may see of a layer: which tokens are patches, which are words after them, and who attends to whom.

    Attributes:
      patches: [B, M], where the visual tokens are in the row, ascending.
      there: [B, M] bool, which of them are left.
      words: [B, W], where the others are.
      after: [B, W] bool, which of those are words that follow the last visual token.
    """

    block: HiddenBlock
    shown: AttentionInputs
    patches: Int[Array, "B M"]
    there: Bool[Array, "B M"]
    words: Int[Array, "B W"]
    after: Bool[Array, "B W"]

    @classmethod
    def at(cls, given: Given, block: HiddenBlock, shown: AttentionInputs) -> Look:
        w = given.words.shape[1]
        m = block.patch.shape[1] - w
        patches, words = standing(block.patch >= 0, m), standing(block.patch < 0, w)
        present = block.positions >= 0
        there = take(present & (block.patch >= 0), patches)
        last = jnp.where(there, patches, -1).max(1, keepdims=True)
        return cls(block, shown, patches, there, words, take(present, words) & (words > last))

    def of_patches(self, x: Array) -> Array:
        """Of numbers [B, ..., T] for each token, those of the patches: [B, ..., M]."""
        index = self.patches.reshape(x.shape[0], *[1] * (x.ndim - 2), -1)
        return jnp.take_along_axis(x, index, axis=-1)

    def from_words(self) -> Float[Array, "B H W M"]:
        """Attention of words to patches."""
        return self.of_patches(self.shown.rows(self.words))

    def from_patches(self) -> Float[Array, "B H M M"]:
        """Attention of patches to patches."""
        return self.of_patches(self.shown.rows(self.patches))

    def from_last(self) -> Float[Array, "B H M"]:
        """Attention of the last word to patches."""
        return self.of_patches(self.shown.rows(self.block.positions.argmax(1)[:, None]))[:, :, 0]

    def keep(self, scores: Float[Array, "B M"], n: int, protected: Bool[Array, "B M"] | None = None) -> HiddenBlock:
        """All words, and the n patches with the highest scores, in their order and at their positions.

        Args:
          protected: stay whatever their score, as far as there are not more than n.
        """
        check_budget(n, scores.shape[1], "visual tokens")
        scores = jnp.where(self.there, scores.astype(jnp.float32), -jnp.inf)
        if protected is not None:
            scores = jnp.where(protected & self.there, jnp.inf, scores)
        return self.only(best(scores, n))

    def only(self, kept: Int[Array, "B n"]) -> HiddenBlock:
        """All words, and the patches at these places among the patches."""
        total = self.block.patch.shape[1]
        stays = marks(take(self.patches, kept), total) | marks(self.words, total)
        return self.block.take(standing(stays, self.words.shape[1] + kept.shape[1]))

    def empty(self, stays: Bool[Array, "B M"]) -> HiddenBlock:
        """As many tokens as before, where patches that do not stay are padding: nobody attends to them."""
        rows = jnp.arange(stays.shape[0])[:, None]
        leaves = self.there & ~stays
        gone = jnp.zeros(self.block.patch.shape, bool).at[rows, self.patches].set(leaves)
        return self.block._replace(positions=jnp.where(gone, -1, self.block.positions))


def ranked(scores: Callable[[Given, Look], Float[Array, "B M"]], *, protect: bool = False) -> CutRule:
    """The rule that keeps the best by a score; with `protect` key tokens stay."""

    def rule(given: Given, block: HiddenBlock, shown: AttentionInputs, n: int) -> HiddenBlock:
        look = Look.at(given, block, shown)
        protected = take(given.key, jnp.maximum(look.of_patches(block.patch), 0)) if protect else None
        return look.keep(scores(given, look), n, protected)

    return rule


def emptied(scores: Callable[[Given, Look], Float[Array, "B M"]]) -> CutRule:
    """The same choice as `ranked`, but what goes leaves its place empty: nobody attends to it, and shapes stay."""

    def rule(given: Given, block: HiddenBlock, shown: AttentionInputs, n: int) -> HiddenBlock:
        look = Look.at(given, block, shown)
        of = jnp.where(look.there, scores(given, look).astype(jnp.float32), -jnp.inf)
        return look.empty(marks(best(of, n), of.shape[1]))

    return rule


def renumbered(rule: CutRule) -> CutRule:
    """The rule, after which tokens stand close together again, as in released code that numbers from 0 anew."""

    def again(given: Given, block: HiddenBlock, shown: AttentionInputs, n: int) -> HiddenBlock:
        return compact(rule(given, block, shown, n))

    return again


def compact(block: HiddenBlock) -> HiddenBlock:
    """Positions 0, 1, 2, ... for the tokens that are left."""
    there = block.positions >= 0
    nth = jnp.cumsum(there, axis=1, dtype=jnp.int32) - 1
    return block._replace(positions=jnp.where(there, nth, -1))

"""What a pruning rule sees between two layers of the decoder, and rules made from scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.models.read_block import HiddenBlock
from jaxcompress.models.rope import RopeConfig
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.vision.choose import check_budget, indices_of, mask_of, rank_of, take, top_indices


class PruneContext(NamedTuple):
    """What the rules of all layers know.

    Attributes:
      raters: [B, W], which of a row's W words rate patches; a word is a token that is no patch.
      key: [B, M], which of the M visual tokens are key tokens, which go last.
      rope: of the decoder.
      patches: of each crop of the picture; None: all visual tokens are one crop.
    """

    raters: Bool[Array, "B W"]
    key: Bool[Array, "B M"]
    rope: RopeConfig
    patches: int | None = None


PruneRule = Callable[[PruneContext, HiddenBlock, AttentionInputs, int], HiddenBlock]
"""(context, tokens after a layer, what its attention compared, how many visual tokens stay) -> the tokens left."""


class LayerView(NamedTuple):
    """The tokens after a layer, split into patches and words.

    Attributes:
      block: all tokens.
      attention: what the layer's attention compared.
      patch_index: [B, M], where the visual tokens are in the row, ascending.
      present: [B, M] bool, which of them are not empty places.
      word_index: [B, W], where the words are in the row, ascending.
      follows: [B, W] bool, which words stand after the last visual token.
    """

    block: HiddenBlock
    attention: AttentionInputs
    patch_index: Int[Array, "B M"]
    present: Bool[Array, "B M"]
    word_index: Int[Array, "B W"]
    follows: Bool[Array, "B W"]

    @classmethod
    def at(cls, context: PruneContext, block: HiddenBlock, attention: AttentionInputs) -> LayerView:
        return cls(block, attention, *split(block, context.raters.shape[1]))

    def at_patches(self, x: Array) -> Array:
        """Numbers of all tokens [B, ..., T] -> those of the patches, [B, ..., M]."""
        index = self.patch_index.reshape(x.shape[0], *[1] * (x.ndim - 2), -1)
        return jnp.take_along_axis(x, index, axis=-1)

    def word_attention(self) -> Float[Array, "B H W M"]:
        """Attention probabilities of words to patches."""
        return self.at_patches(self.attention.rows(self.word_index))

    def patch_attention(self) -> Float[Array, "B H M M"]:
        """Attention probabilities of patches to patches."""
        return self.at_patches(self.attention.rows(self.patch_index))

    def last_word_attention(self) -> Float[Array, "B H M"]:
        """Attention probabilities of the last word to patches."""
        return self.at_patches(self.attention.rows(self.block.positions.argmax(1)[:, None]))[:, :, 0]

    def keep_top(self, scores: Float[Array, "B M"], n: int, protected: Bool[Array, "B M"] | None = None) -> HiddenBlock:
        """All words, and the n patches with the highest scores, in their order and at their positions.

        Args:
          protected: patches that stay before all others. If they are more than n, those with the highest scores stay.

        Raises:
          ValueError: n is negative or above M.
        """
        check_budget(n, scores.shape[1], "visual tokens")
        scores = self.of_present(scores)
        if protected is not None:
            scores = jnp.where(protected & self.present, 1.0, -1.0) * scores.shape[1] - rank_of(scores)
        return self.keep(top_indices(scores, n))

    def of_present(self, scores: Float[Array, "B M"]) -> Float[Array, "B M"]:
        """Scores as float32, -inf for empty places."""
        return jnp.where(self.present, scores.astype(jnp.float32), -jnp.inf)

    def keep(self, kept: Int[Array, "B n"]) -> HiddenBlock:
        """All words, and these of the patches."""
        total = self.block.patch.shape[1]
        stays = mask_of(take(self.patch_index, kept), total) | mask_of(self.word_index, total)
        return self.block.take(indices_of(stays, self.word_index.shape[1] + kept.shape[1]))

    def vacate(self, stays: Bool[Array, "B M"]) -> HiddenBlock:
        """As many tokens as before. Patches that do not stay become padding, which nothing attends to."""
        rows = jnp.arange(stays.shape[0])[:, None]
        leaves = self.present & ~stays
        gone = jnp.zeros(self.block.patch.shape, bool).at[rows, self.patch_index].set(leaves)
        return self.block._replace(positions=jnp.where(gone, -1, self.block.positions))

    def key_tokens(self, context: PruneContext) -> Bool[Array, "B M"]:
        """Which of the patches are key tokens."""
        return take(context.key, jnp.maximum(self.at_patches(self.block.patch), 0))


def split(
    block: HiddenBlock, words: int
) -> tuple[Int[Array, "B M"], Bool[Array, "B M"], Int[Array, "B W"], Bool[Array, "B W"]]:
    """`patch_index`, `present`, `word_index` and `follows` of a `LayerView`.

    Args:
      words: how many tokens of a row are no patches, padding included.
    """
    patches, others = indices_of(block.patch >= 0, block.patch.shape[1] - words), indices_of(block.patch < 0, words)
    exists = block.positions >= 0
    present = take(exists & (block.patch >= 0), patches)
    last = jnp.where(present, patches, -1).max(1, keepdims=True)
    return patches, present, others, take(exists, others) & (others > last)


Scores = Callable[[PruneContext, LayerView], Float[Array, "B M"]]
"""(context, view) -> a score for each patch; patches with higher scores stay."""


def top_scored(scores: Scores, *, protect: bool = False) -> PruneRule:
    """The rule that keeps the patches with the highest scores; with `protect` key tokens come first."""

    def rule(context: PruneContext, block: HiddenBlock, attention: AttentionInputs, n: int) -> HiddenBlock:
        view = LayerView.at(context, block, attention)
        return view.keep_top(scores(context, view), n, view.key_tokens(context) if protect else None)

    return rule


def top_scored_in_place(scores: Scores) -> PruneRule:
    """The same choice as `top_scored`, but a patch that goes leaves an empty place, so that shapes stay."""

    def rule(context: PruneContext, block: HiddenBlock, attention: AttentionInputs, n: int) -> HiddenBlock:
        view = LayerView.at(context, block, attention)
        of = view.of_present(scores(context, view))
        return view.vacate(mask_of(top_indices(of, n), of.shape[1]))

    return rule


def renumber_after(rule: PruneRule) -> PruneRule:
    """The rule, after which positions are numbered from 0 without gaps, as released code does."""

    def renumbered(context: PruneContext, block: HiddenBlock, attention: AttentionInputs, n: int) -> HiddenBlock:
        return renumber(rule(context, block, attention, n))

    return renumbered


def renumber(block: HiddenBlock) -> HiddenBlock:
    """Positions 0, 1, 2, ... for the tokens that are left."""
    exists = block.positions >= 0
    nth = jnp.cumsum(exists, axis=1, dtype=jnp.int32) - 1
    return block._replace(positions=jnp.where(exists, nth, -1))

"""Rules by which visual tokens leave between the layers of the decoder."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcompress.models.read_block import HiddenBlock
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.vision import sparsevlm, uniform
from jaxcompress.vision.choose import best, best_first, check_budget, marks, order, others, take, top
from jaxcompress.vision.dart import dart
from jaxcompress.vision.dual_attention import dual_attention, passes, relevance
from jaxcompress.vision.fastv import by_window, last_word
from jaxcompress.vision.fitprune import cross_attention, importance, self_attention
from jaxcompress.vision.method import CutRule, Given, Look, compact, emptied, ranked
from jaxcompress.vision.windows import square, window_table


def _last_word(given: Given, look: Look) -> Array:
    return last_word(look.from_last())


def _last_word_by_window(given: Given, look: Look) -> Array:
    scores = jnp.where(look.there, _last_word(given, look), -1.0)
    side = square(scores.shape[1])
    fits = [w for w in range(2, side) if side % w == 0]
    if not fits:
        raise ValueError(f"no windows tile a grid of {side} x {side} patches")
    return by_window(scores, window_table(side, side, side // fits[0] if len(fits) > 1 else fits[0]))


def _dual(given: Given, look: Look) -> Array:
    return relevance(*dual_attention(look.from_words(), look.after, look.there))


def _fitprune(given: Given, look: Look) -> Array:
    cross = cross_attention(look.from_words(), look.after)
    return importance(cross, self_attention(look.from_patches(), look.there))


def _rated(given: Given, look: Look) -> Array:
    return sparsevlm.rated(look.from_words(), given.words & look.after)


def rated_plus(given: Given, look: Look) -> Array:
    """SparseVLM+: corrected for RoPE, by the heads that look at the picture most."""
    rates = given.words & look.after
    rows, at = look.from_words(), take(look.block.positions, look.words)
    d = look.shown.queries.shape[-1]
    rows = sparsevlm.without_gravity(rows, at, take(look.block.positions, look.patches), given.rope, d)
    return sparsevlm.rated(sparsevlm.of_best_heads(rows, rates, look.there), rates)


def _by_chance(given: Given, look: Look) -> Array:
    return uniform.random_scores(0, look.of_patches(look.block.patch))


fastv = ranked(_last_word)
fastv_emptied = emptied(_last_word)
window_fastv = ranked(_last_word_by_window)
mustdrop = ranked(_dual, protect=True)
mustdrop_without_keys = ranked(_dual)
fitprune = ranked(_fitprune)
sparsevlm_plus = ranked(rated_plus)
random = ranked(_by_chance)


def mustdrop_above(thresholds: tuple[float, float]) -> CutRule:
    """The published thresholds with fixed shapes: what goes leaves its place empty."""

    def rule(given: Given, block: HiddenBlock, shown: AttentionInputs, n: int) -> HiddenBlock:
        look = Look.at(given, block, shown)
        stays = passes(*dual_attention(look.from_words(), look.after, look.there), thresholds)
        return look.empty(stays | take(given.key, jnp.maximum(look.of_patches(block.patch), 0)))

    return rule


def rule_of_dart(given: Given, block: HiddenBlock, shown: AttentionInputs, n: int) -> HiddenBlock:
    """DART: no attention at all."""
    look = Look.at(given, block, shown)
    norm = jnp.abs(shown.keys.astype(jnp.float32)).sum((2, 3))
    patch_norm = jnp.where(look.there, take(norm, look.patches), -jnp.inf)
    patches, words = take(block.hidden, look.patches), take(block.hidden, look.words)
    return look.only(dart(patches, words, patch_norm, take(norm, look.words), look.after, n).kept)


def recycling(given: Given, block: HiddenBlock, shown: AttentionInputs, n: int) -> HiddenBlock:
    """SparseVLM v1.5: n visual tokens are left, clusters of what goes among them, and positions are numbered anew."""
    look = Look.at(given, block, shown)
    total = look.there.shape[1]
    return _recycled(look, _rated(given, look), kept_beside_clusters(total, n), None)


def kept_beside_clusters(total: int, n: int) -> int:
    """How many of `total` patches stay as they are, so that n are left with the clusters of those that go.

    Raises:
      ValueError: n above total, or below what the clusters alone are.
    """
    check_budget(n, total, "visual tokens")
    if n == total:
        return total
    for kept in range(n, -1, -1):
        if kept + sparsevlm.recycled(total - kept)[1] == n:
            return kept
    least = sparsevlm.recycled(total)[1]
    raise ValueError(f"{total} visual tokens cannot become {n}: clusters of all that goes are {least}")


def fixed(kept: int, noise: Float[Array, "B m"] | None = None) -> CutRule:
    """SparseVLM v1.5 with a number of patches that stay as they are, clusters not counted."""

    def rule(given: Given, block: HiddenBlock, shown: AttentionInputs, n: int) -> HiddenBlock:
        look = Look.at(given, block, shown)
        return _recycled(look, _rated(given, look), kept, noise)

    return rule


def _recycled(look: Look, scores: Float[Array, "B M"], kept: int, noise: Array | None) -> HiddenBlock:
    total = scores.shape[1]
    if kept == total:
        return compact(look.block)
    index = best(scores, kept)
    gone = others(index, total)
    many, clusters = sparsevlm.recycled(total - kept)
    recycled = take(gone, best_first(take(scores, gone), many))
    hidden = take(look.block.hidden, take(look.patches, recycled))
    done = sparsevlm.cluster(hidden, clusters, noise=noise)
    return after_patches(look, index, done.x, take(recycled, done.centres))


def after_patches(
    look: Look, kept: Array, more: Float[Array, "B c E"], stand_for: Array, present: Bool[Array, "B c"] | None = None
) -> HiddenBlock:
    """All words and the kept patches, with other tokens after the last patch; positions numbered anew.

    Args:
      kept: [B, n], among the patches, ascending.
      more: what comes after them.
      stand_for: [B, c], the patch among the patches that each of these is in the middle of.
      present: which of these there are.
    """
    block, (b, c) = look.block, stand_for.shape
    total = block.patch.shape[1]
    last = take(look.patches, jnp.full((b, 1), look.patches.shape[1] - 1))
    patch = take(block.patch, take(look.patches, stand_for))
    at = jnp.zeros((b, c), jnp.int32) if present is None else jnp.where(present, 0, -1)
    joined = HiddenBlock(
        jnp.concatenate([block.hidden, more.astype(block.hidden.dtype)], axis=1),
        jnp.concatenate([block.positions, at], axis=1),
        jnp.concatenate([block.patch, patch], axis=1),
    )
    stays = marks(take(look.patches, kept), total) | marks(look.words, total)
    # The new tokens sort right behind the last patch.
    place = jnp.concatenate(
        [jnp.broadcast_to(2 * jnp.arange(total), (b, total)), jnp.broadcast_to(2 * last + 1, (b, c))], 1
    )
    stays = jnp.concatenate([stays, jnp.ones((b, c), bool)], axis=1)
    n = look.words.shape[1] + kept.shape[1] + c
    sequence = jnp.argsort(jnp.where(stays, place, 4 * total), axis=1, stable=True)[:, :n]
    return compact(joined.take(sequence.astype(jnp.int32)))


def by_rank(scale: float, bias: float, noise: Float[Array, "B m"] | None = None) -> CutRule:
    """SparseVLM v1 with fixed shapes: as many patches stay as the rank of the raters' attention says, and what goes is
    recycled; places that are left over are empty. The number of visual tokens grows by the places for clusters."""

    def rule(given: Given, block: HiddenBlock, shown: AttentionInputs, n: int) -> HiddenBlock:
        look = Look.at(given, block, shown)
        total = look.there.shape[1]
        rates = given.words & look.after
        rows = look.from_words()
        scores = jnp.where(look.there, sparsevlm.rated(rows, rates), -jnp.inf)
        width = look.there.sum(1)
        budget = sparsevlm.rank_budget(rows, rates, look.there, scale, bias)
        ranking = order(scores)
        stays = top(scores, budget, look.there)
        goes = width - budget
        many = jnp.asarray([sparsevlm.recycled(g)[0] if g else 0 for g in range(total + 1)])[goes]
        count = jnp.asarray([sparsevlm.recycled(g)[1] if g else 0 for g in range(total + 1)])[goes]
        most, clusters = sparsevlm.recycled(total)
        # What goes, best first: it follows what stays in the order of scores.
        start = budget[:, None] + jnp.arange(most)
        recycled = take(ranking, jnp.minimum(start, total - 1))
        there = jnp.arange(most) < many[:, None]
        hidden = take(block.hidden, take(look.patches, recycled))
        extra = None if noise is None else jnp.pad(noise, [(0, 0), (0, most - noise.shape[1])])
        done = sparsevlm.cluster(hidden, clusters, present=there, count=jnp.maximum(count, 1), noise=extra)
        emptied = look._replace(block=look.empty(stays))
        every = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), stays.shape)
        real = jnp.arange(clusters) < count[:, None]
        return after_patches(emptied, every, done.x, take(recycled, done.centres), real)

    return rule

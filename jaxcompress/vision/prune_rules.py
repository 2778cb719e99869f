"""Rules by which visual tokens leave between the layers of the decoder."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcompress.models.read_block import HiddenBlock
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.vision import sparsevlm, uniform
from jaxcompress.vision.choose import (
    check_budget,
    complement,
    mask_of,
    ranked_indices,
    ranking,
    take,
    top_indices,
    top_mask,
)
from jaxcompress.vision.dart import dart
from jaxcompress.vision.dual_attention import dual_attention, passes, relevance
from jaxcompress.vision.fastv import by_window, last_word
from jaxcompress.vision.fitprune import cross_attention, importance, self_attention
from jaxcompress.vision.layer_view import LayerView, PruneContext, PruneRule, renumber, top_scored, top_scored_in_place
from jaxcompress.vision.windows import square, window_table


def _last_word(context: PruneContext, view: LayerView) -> Array:
    return last_word(view.last_word_attention())


def _last_word_by_window(context: PruneContext, view: LayerView) -> Array:
    """Every crop has windows of its own."""
    scores = jnp.where(view.present, _last_word(context, view), -1.0)
    total = scores.shape[1]
    crop = context.patches or total
    if total % crop:
        raise ValueError(
            f"windows lie in whole crops of {crop} patches, and {total} visual tokens are no whole crops: give every "
            "patch and no newlines, or use fastv"
        )
    side = square(crop)
    fits = [w for w in range(2, side) if side % w == 0]
    if not fits:
        raise ValueError(f"no windows tile a grid of {side} x {side} patches; use fastv")
    table = window_table(side, side, side // fits[0] if len(fits) > 1 else fits[0])
    return by_window(scores, np.concatenate([table + first for first in range(0, total, crop)]))


def _dual(context: PruneContext, view: LayerView) -> Array:
    return relevance(*dual_attention(view.word_attention(), view.follows, view.present))


def _fitprune(context: PruneContext, view: LayerView) -> Array:
    cross = cross_attention(view.word_attention(), view.follows)
    return importance(cross, self_attention(view.patch_attention(), view.present))


def _rater_scores(context: PruneContext, view: LayerView) -> Array:
    return sparsevlm.rater_scores(view.word_attention(), context.raters & view.follows)


def sparsevlm_plus_scores(context: PruneContext, view: LayerView) -> Array:
    """SparseVLM+ scores: attention corrected for RoPE, from the heads that attend to the picture most."""
    raters = context.raters & view.follows
    rows, at = view.word_attention(), take(view.block.positions, view.word_index)
    d = view.attention.queries.shape[-1]
    rows = sparsevlm.without_gravity(rows, at, take(view.block.positions, view.patch_index), context.rope, d)
    return sparsevlm.rater_scores(sparsevlm.of_best_heads(rows, raters, view.present), raters)


def _random(context: PruneContext, view: LayerView) -> Array:
    return uniform.random_scores(0, view.at_patches(view.block.patch))


fastv = top_scored(_last_word)
fastv_in_place = top_scored_in_place(_last_word)
window_fastv = top_scored(_last_word_by_window)
mustdrop = top_scored(_dual, protect=True)
mustdrop_without_key_tokens = top_scored(_dual)
fitprune = top_scored(_fitprune)
sparsevlm_plus = top_scored(sparsevlm_plus_scores)
random = top_scored(_random)


def mustdrop_above(thresholds: tuple[float, float]) -> PruneRule:
    """MustDrop's published threshold rule with fixed shapes: a dropped token leaves an empty place."""

    def rule(context: PruneContext, block: HiddenBlock, attention: AttentionInputs, n: int) -> HiddenBlock:
        view = LayerView.at(context, block, attention)
        stays = passes(*dual_attention(view.word_attention(), view.follows, view.present), thresholds)
        return view.vacate(stays | view.key_tokens(context))

    return rule


def dart_pruning(context: PruneContext, block: HiddenBlock, attention: AttentionInputs, n: int) -> HiddenBlock:
    """DART, which needs no attention scores."""
    view = LayerView.at(context, block, attention)
    norm = jnp.abs(attention.keys.astype(jnp.float32)).sum((2, 3))
    patches, words = take(block.hidden, view.patch_index), take(block.hidden, view.word_index)
    patch_norm, word_norm = take(norm, view.patch_index), take(norm, view.word_index)
    return view.keep(dart(patches, words, patch_norm, word_norm, view.follows, n, there=view.present).kept)


def sparsevlm_recycling(context: PruneContext, block: HiddenBlock, attention: AttentionInputs, n: int) -> HiddenBlock:
    """SparseVLM v1.5: n visual tokens are left, including clusters of dropped tokens. Positions are renumbered."""
    view = LayerView.at(context, block, attention)
    total = view.present.shape[1]
    return _recycled(view, _rater_scores(context, view), kept_beside_clusters(total, n), None)


def kept_beside_clusters(total: int, n: int) -> int:
    """Number of `total` patches to keep, so that kept patches and clusters of the dropped ones sum to n.

    Raises:
      ValueError: n is above total, or below the number of clusters alone.
    """
    check_budget(n, total, "visual tokens")
    if n == total:
        return total
    for kept in range(n, -1, -1):
        if kept + sparsevlm.recycled(total - kept)[1] == n:
            return kept
    least = sparsevlm.recycled(total)[1]
    raise ValueError(f"{total} visual tokens cannot become {n}: clusters of all that goes are {least}")


def sparsevlm_fixed(kept: int, noise: Float[Array, "B m"] | None = None) -> PruneRule:
    """SparseVLM v1.5 with a fixed number of kept patches; clusters are not counted."""

    def rule(context: PruneContext, block: HiddenBlock, attention: AttentionInputs, n: int) -> HiddenBlock:
        view = LayerView.at(context, block, attention)
        return _recycled(view, _rater_scores(context, view), kept, noise)

    return rule


def _recycled(view: LayerView, scores: Float[Array, "B M"], kept: int, noise: Array | None) -> HiddenBlock:
    total, scores = scores.shape[1], view.of_present(scores)
    if kept == total:
        return renumber(view.block)
    index = top_indices(scores, kept)
    gone = complement(index, total)
    many, clusters = sparsevlm.recycled(total - kept)
    recycled = take(gone, ranked_indices(take(scores, gone), many))
    hidden, there = take(view.block.hidden, take(view.patch_index, recycled)), take(view.present, recycled)
    count = jnp.minimum(there.sum(1), clusters)
    done = sparsevlm.cluster(hidden, clusters, present=there, count=jnp.maximum(count, 1), noise=noise)
    real = jnp.arange(clusters) < count[:, None]
    return after_patches(view, index, done.x, take(recycled, done.centres), real)


def after_patches(
    view: LayerView,
    kept: Array,
    more: Float[Array, "B c E"],
    stand_for: Array,
    present: Bool[Array, "B c"] | None = None,
) -> HiddenBlock:
    """All words and the kept patches, with more tokens after the last patch. Positions are renumbered.

    Args:
      kept: [B, n], indices of kept patches among the patches, ascending.
      more: tokens to put after the patches.
      stand_for: [B, c], index among the patches of the central patch of each token in `more`.
      present: which tokens of `more` are present.
    """
    block, (b, c) = view.block, stand_for.shape
    total = block.patch.shape[1]
    last = take(view.patch_index, jnp.full((b, 1), view.patch_index.shape[1] - 1))
    patch = take(block.patch, take(view.patch_index, stand_for))
    at = jnp.zeros((b, c), jnp.int32) if present is None else jnp.where(present, 0, -1)
    joined = HiddenBlock(
        jnp.concatenate([block.hidden, more.astype(block.hidden.dtype)], axis=1),
        jnp.concatenate([block.positions, at], axis=1),
        jnp.concatenate([block.patch, patch], axis=1),
    )
    stays = mask_of(take(view.patch_index, kept), total) | mask_of(view.word_index, total)
    # The new tokens sort directly after the last patch.
    place = jnp.concatenate(
        [jnp.broadcast_to(2 * jnp.arange(total), (b, total)), jnp.broadcast_to(2 * last + 1, (b, c))], 1
    )
    stays = jnp.concatenate([stays, jnp.ones((b, c), bool)], axis=1)
    n = view.word_index.shape[1] + kept.shape[1] + c
    sequence = jnp.argsort(jnp.where(stays, place, 4 * total), axis=1, stable=True)[:, :n]
    return renumber(joined.take(sequence.astype(jnp.int32)))


def sparsevlm_by_rank(scale: float, bias: float, noise: Float[Array, "B m"] | None = None) -> PruneRule:
    """SparseVLM v1 with fixed shapes.

    The rank of the raters' attention decides the number of kept patches. Dropped patches are recycled. Unused places
    are empty. The number of visual tokens grows by the places for clusters.
    """

    def rule(context: PruneContext, block: HiddenBlock, attention: AttentionInputs, n: int) -> HiddenBlock:
        view = LayerView.at(context, block, attention)
        total = view.present.shape[1]
        raters = context.raters & view.follows
        rows = view.word_attention()
        scores = view.of_present(sparsevlm.rater_scores(rows, raters))
        width = view.present.sum(1)
        budget = sparsevlm.rank_budget(rows, raters, view.present, scale, bias)
        ranked = ranking(scores)
        stays = top_mask(scores, budget, view.present)
        goes = width - budget
        many = jnp.asarray([sparsevlm.recycled(g)[0] if g else 0 for g in range(total + 1)])[goes]
        count = jnp.asarray([sparsevlm.recycled(g)[1] if g else 0 for g in range(total + 1)])[goes]
        most, clusters = sparsevlm.recycled(total)
        # Dropped patches, best first: they follow the kept patches in the order of scores.
        start = budget[:, None] + jnp.arange(most)
        recycled = take(ranked, jnp.minimum(start, total - 1))
        there = jnp.arange(most) < many[:, None]
        hidden = take(block.hidden, take(view.patch_index, recycled))
        extra = None if noise is None else jnp.pad(noise, [(0, 0), (0, most - noise.shape[1])])
        done = sparsevlm.cluster(hidden, clusters, present=there, count=jnp.maximum(count, 1), noise=extra)
        emptied = view._replace(block=view.vacate(stays))
        every = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), stays.shape)
        real = jnp.arange(clusters) < count[:, None]
        return after_patches(emptied, every, done.x, take(recycled, done.centres), real)

    return rule

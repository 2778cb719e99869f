"""ToMe: merging tokens between the attention and the MLP of every layer (Bolya et al. 2023, "Token Merging").

Tokens are split into two sets. Each token of the first set finds its most similar token in the second, and the r most
similar pairs merge. Similarity is the cosine of the keys, averaged over heads. A merged token of size s counts s times
in later attention (`proportional=True` of `VisionTower.run_layers`). The method needs this unless the model is
retrained (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxcompress.models.patches import Patches
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.vision.choose import check_budget, complement, cosine, ranked_indices, take, top_indices
from jaxcompress.vision.merging import Merging, merge


def bipartite(
    metric: Float[Array, "B N D"], r: int, *, class_token: bool = False, distill_token: bool = False
) -> Merging:
    """Merges the r most similar pairs of an even and an odd token (section 3, "Bipartite Soft Matching").

    The result has the even tokens that stay, then the odd tokens. As in the authors' code, without a class token the
    remaining even tokens are in order of similarity. A distillation token keeps its place.

    Args:
      r: number of merges; capped at half of the tokens that are not special.
      class_token, distill_token: whether the first even and the first odd token is special. A special token does not
        merge into another, and nothing merges into the distillation token.

    Raises:
      ValueError: r is negative.
    """
    if r < 0:
        raise ValueError(f"{r} pairs cannot merge; give 0 or more")
    b, total, _ = metric.shape
    r = min(r, max(total - class_token - distill_token, 0) // 2)
    even, odd = jnp.arange(0, total, 2), jnp.arange(1, total, 2)
    everything = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (b, total))
    if not r:
        nothing = jnp.zeros((b, 0), jnp.int32)
        return Merging(everything, nothing, nothing)
    like = cosine(metric[:, ::2], metric[:, 1::2])
    if class_token:
        like = like.at[:, 0].set(-jnp.inf)
    if distill_token:
        like = like.at[:, :, 0].set(-jnp.inf)
    order = ranked_indices(like.max(-1), even.shape[0])
    source, stays = order[:, :r], order[:, r:]
    if class_token:
        stays = jnp.sort(stays, axis=1)
    target = take(like.argmax(-1), source).astype(jnp.int32)
    first, second = even[stays], jnp.broadcast_to(odd, (b, odd.shape[0]))
    if not distill_token:
        kept, at = jnp.concatenate([first, second], axis=1), target + first.shape[1]
    else:
        kept = jnp.concatenate([first[:, :1], second[:, :1], first[:, 1:], second[:, 1:]], axis=1)
        at = jnp.where(target == 0, 1, target + first.shape[1])
    return Merging(kept.astype(jnp.int32), even[source].astype(jnp.int32), at)


def every_kth(metric: Float[Array, "B N D"], k: int) -> Merging:
    """Keeps every kth token; all others merge into the most similar kept token. The last N mod k tokens are dropped.

    This is the authors' `kth_bipartite_soft_matching`.

    Raises:
      ValueError: k is below 2, or there are fewer than k tokens.
    """
    b, total, _ = metric.shape
    if not 2 <= k <= total:
        raise ValueError(f"every {k}th of {total} tokens cannot stay; give k from 2 to {total}")
    place = jnp.arange(total // k * k)
    return _into_nearest(metric, jnp.broadcast_to(place[k - 1 :: k], (b, total // k)), place.shape[0])


def at_random(metric: Float[Array, "B N D"], r: int, key: Key[Array, ""], *, special: int = 0) -> Merging:
    """Merges r random tokens into the most similar of the others: the baseline of the ablation (table 1d).

    The whole batch shares one draw, so a row's result does not depend on its index. Special tokens do not merge, and
    nothing merges into them.
    """
    b, total, _ = metric.shape
    check_budget(r, total - special - 1)
    draws = jnp.where(jnp.arange(total) < special, jnp.inf, jax.random.uniform(key, (total,)))
    kept = jnp.broadcast_to(top_indices(draws[None], total - r), (b, total - r))
    return _into_nearest(metric, kept, total, special)


def _into_nearest(metric: Array, kept: Array, total: int, special: int = 0) -> Merging:
    gone = complement(kept, total)
    like = cosine(take(metric, gone), take(metric, kept))
    like = jnp.where(kept[:, None] < special, -jnp.inf, like)
    return Merging(kept.astype(jnp.int32), gone, like.argmax(-1).astype(jnp.int32))


def schedule(layers: int, r: int | Sequence[int], inflect: float = 0.0) -> tuple[int, ...]:
    """Merges per layer: r everywhere, linearly falling (`inflect` -1) or growing (1), or a list.

    A list that is too short is padded with zeros. For any `inflect`, the total is about layers * r.
    """
    if not isinstance(r, int):
        r = tuple(r)
        return (r + (0,) * (layers - len(r)))[:layers]
    low = int(r * (1 - inflect))
    step = (2 * r - 2 * low) / (layers - 1) if layers > 1 else 0.0
    return tuple(int(low + step * layer) for layer in range(layers))


def tome(counts: Sequence[int], special: int) -> Callable[[Patches, AttentionInputs, int], Patches]:
    """ToMe for `VisionTower.run_layers(..., reduce=tome(schedule(12, 8), 1), proportional=True)`.

    Args:
      counts: merges per layer (see `schedule`).
      special: number of special tokens of the tower.
    """

    def reduce(patches: Patches, attention: AttentionInputs, layer: int) -> Patches:
        if not counts[layer]:
            return patches
        how = bipartite(
            attention.keys.astype(jnp.float32).mean(2),
            counts[layer],
            class_token=special > 0,
            distill_token=special > 1,
        )
        return merged(patches, how)

    return reduce


def merged(patches: Patches, how: Merging) -> Patches:
    """A tower's tokens after a merge."""
    x, size = merge(patches.hidden, patches.size, how)
    return patches.become(x, size, how.into(patches.size.shape[1]))

"""Video: patches that do not change from one frame to the next merge into one token.

A patch that is similar to the patch in the same place one frame before merges into it. Merges chain: a run of frames
without change leaves one token, their mean, at the place and time of the run's first patch. Similarity is the cosine of
neighbouring frames' tokens. Either exactly r patches merge, the most similar ones; or all patches that reach a
threshold merge and leave empty places.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.state.vectors import unit
from jaxcompress.vision.choose import EPS, check_budget, indices_of, take, top_mask
from jaxcompress.vision.merging import Merging


def stillness(x: Float[Array, "B F N E"]) -> Float[Array, "B F N"]:
    """Cosine of each patch to the patch in the same place one frame before; -inf in the first frame."""
    x = unit(x.astype(jnp.float32), EPS)
    like = jnp.einsum("bfne,bfne->bfn", x[:, 1:], x[:, :-1], precision="highest")
    return (
        jnp.concatenate([jnp.full_like(like[:, :1], -jnp.inf), like], axis=1)
        if x.shape[1] > 1
        else jnp.full(x.shape[:3], -jnp.inf)
    )


def first_of_run(goes: Bool[Array, "B F N"]) -> Int[Array, "B F N"]:
    """First frame of each patch's run. A patch that goes joins the run of the patch one frame before."""
    frame = jnp.arange(goes.shape[1], dtype=jnp.int32)[:, None]
    return jax.lax.cummax(jnp.where(goes, -1, frame), axis=1)


def merge_frames(like: Float[Array, "B F N"], r: int) -> Merging:
    """Merges exactly r patches, the most similar to the frame before. For tokens [B, F * N, E], frame after frame.

    Raises:
      ValueError: r is negative or more than (F - 1) * N.
    """
    b, frames, patches = like.shape
    check_budget(r, (frames - 1) * patches, "patches of later frames")
    total = frames * patches
    later = jnp.broadcast_to(jnp.arange(total) >= patches, (b, total))
    goes = top_mask(like.reshape(b, total), r, later)
    kept = indices_of(~goes, total - r)
    gone = indices_of(goes, r)
    into = run_starts(goes.reshape(like.shape))
    nth = jnp.cumsum(~goes, axis=1, dtype=jnp.int32) - 1  # index into the result, for tokens that stay
    return Merging(kept, gone, take(nth, take(into, gone)))


def run_starts(goes: Bool[Array, "B F N"]) -> Int[Array, "B FN"]:
    """For each token, frame after frame, the first token of its run; the input of `merge_in_place`."""
    b, _, patches = goes.shape
    return (first_of_run(goes) * patches + jnp.arange(patches, dtype=jnp.int32)).reshape(b, -1)

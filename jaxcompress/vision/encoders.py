"""Methods that drop or merge tokens in the vision tower or after its last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.patches import Patches, Pixels
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.recurrence.softmax import unmasked
from jaxcompress.vision import uniform
from jaxcompress.vision.cdpruner import diverse
from jaxcompress.vision.choose import check_budget, complement, ranked_indices, take, top_indices
from jaxcompress.vision.merging import grouped, merge
from jaxcompress.vision.method import Encoded
from jaxcompress.vision.prumerge import prumerge, stepped_order
from jaxcompress.vision.tome import tome
from jaxcompress.vision.visionzip import SPLITS, visionzip
from jaxcompress.vision.windows import THRESHOLD, key_count, key_tokens, spatial, spatial_above

Encode = Callable[[Llava, Pixels], Encoded]


def all_patches(model: Llava, pixels: Pixels) -> Encoded:
    """Keeps every patch."""
    patches, _ = model.run_tower(pixels)
    return project_patches(model, patches)


def see(model: Llava, pixels: Pixels) -> tuple[Patches, AttentionInputs]:
    """The tower's tokens as the projector gets them, and the attention inputs of the last layer that ran."""
    return model.tower.run_layers(model.tower.embed(pixels), range(model.config.feature_layers))


def last_layer_attention(model: Llava, patches: Patches, attention: AttentionInputs) -> AttentionInputs:
    """Attention inputs of the tower's last layer, even if the projector gets the tokens of the layer before it."""
    config = model.config
    if config.feature_layers == config.tower.num_layers:
        return attention
    return model.tower.run_layers(patches, range(config.feature_layers, config.tower.num_layers))[1]


def class_token_attention(attention: AttentionInputs, special: int) -> Float[Array, "B H N"]:
    """Attention of the class token to each patch. Without a class token: the mean over all tokens (as in VisionZip).

    Empty places have no part in the mean.
    """
    b, total = attention.bias.shape
    if special:
        return attention.rows(jnp.zeros((b, 1), jnp.int32))[:, :, 0, special:]
    rows = attention.rows(jnp.broadcast_to(jnp.arange(total), (b, total)))
    return rows.mean(2, where=unmasked(attention.bias)[:, None, :, None])


def project_patches(model: Llava, patches: Patches, key: Array | None = None) -> Encoded:
    """Projects the tower's tokens; `key` is [B, n], bool, over patches."""
    special = 0 if model.config.keep_special else model.config.tower.special
    size = patches.size[:, special:]
    visual = model.project(patches.hidden[:, special:])
    b, n = size.shape
    # A token takes the position of its first patch.
    total = patches.group.shape[1] - special
    group = patches.group[:, special:] - special
    place = jnp.full((b, n), total, jnp.int32)
    where = jnp.where(group >= 0, group, n)
    place = place.at[jnp.arange(b)[:, None], where].min(jnp.arange(total, dtype=jnp.int32), mode="drop")
    place = jnp.where(size > 0, place, -1)
    return Encoded(visual, place, size, jnp.zeros((b, n), bool) if key is None else key)


def check_patches_only(config: LlavaConfig) -> int:
    """Raises ValueError if the decoder also gets special tokens: these methods do not define what happens to them."""
    if config.keep_special and config.tower.special:
        raise ValueError("methods choose among patches; use a model with vision_feature_select_strategy='default'")
    return config.tower.num_patches


def tome_encoder(n: int) -> Encode:
    """ToMe with about the same number of merges in every layer that runs; exactly n tokens are left."""

    def encode(model: Llava, pixels: Pixels) -> Encoded:
        config = model.config
        patches, special = check_patches_only(config), config.tower.special
        counts = tome_counts(patches, n, config.feature_layers)
        reduce = tome(counts, special)
        start = model.tower.embed(pixels)
        left, _ = model.tower.run_layers(start, range(config.feature_layers), reduce=reduce, proportional=True)
        done = project_patches(model, left)
        return _in_raster_order(done)

    return encode


def tome_counts(patches: int, n: int, layers: int) -> tuple[int, ...]:
    """Merges per layer so that n tokens are left: as even as possible when a layer merges at most half."""
    check_budget(n, patches, "patches")

    def least(left: int, layers: int) -> int:
        for _ in range(layers):
            left -= left // 2
        return left

    if least(patches, layers) > n:
        few = least(patches, layers)
        raise ValueError(f"{layers} layers cannot merge {patches} patches into {n}; keep {few} or more")
    out, left = [], patches
    for later in reversed(range(layers)):
        r = min(-(-(left - n) // (later + 1)), left // 2)
        while least(left - r, later) > n:  # later layers could not merge the rest
            r += 1
        out.append(r)
        left -= r
    return tuple(out)


def _in_raster_order(done: Encoded) -> Encoded:
    order = jnp.argsort(done.place, axis=1)
    return Encoded(*(take(x, order) for x in done))


def top_patches(score: Callable[[Llava, Patches, AttentionInputs], Array], n: int) -> Encode:
    """Keeps the n patches with the highest scores, in raster order."""

    def encode(model: Llava, pixels: Pixels) -> Encoded:
        check_budget(n, check_patches_only(model.config), "patches")
        special = model.config.tower.special
        patches, attention = model.run_tower(pixels)
        kept = top_indices(score(model, patches, attention), n)
        first = jnp.broadcast_to(jnp.arange(special, dtype=jnp.int32), (kept.shape[0], special))
        return project_patches(model, patches.take(jnp.concatenate([first, kept + special], axis=1)))

    return encode


def class_score(model: Llava, patches: Patches, attention: AttentionInputs) -> Array:
    """FasterVLM (Zhang et al. 2024, "[CLS] Attention is All You Need"): attention of the class token, mean over heads.

    The same scores give VisionZip its dominant tokens.
    """
    return class_token_attention(attention, model.config.tower.special).mean(1)


def random_score(seed: int) -> Callable[[Llava, Patches, AttentionInputs], Array]:
    def score(model: Llava, patches: Patches, attention: AttentionInputs) -> Array:
        n = model.config.tower.num_patches
        draws = uniform.random_scores(seed, jnp.arange(n))
        return jnp.broadcast_to(draws, (patches.size.shape[0], n))

    return score


def fixed_patches(places: Callable[[int, int], Any], n: int) -> Encode:
    """Keeps the patches that `places` (grid side, n) returns."""

    def score(model: Llava, patches: Patches, attention: AttentionInputs) -> Array:
        total = model.config.tower.num_patches
        table = jnp.zeros(total).at[jnp.asarray(places(model.config.tower.grid, n))].set(1.0)
        return jnp.broadcast_to(table, (patches.size.shape[0], total))

    return top_patches(score, n)


def pooling_encoder(n: int) -> Encode:
    """Averages the patches in each of n cells of the picture."""

    def encode(model: Llava, pixels: Pixels) -> Encoded:
        config = model.config
        check_patches_only(config)
        special, grid = config.tower.special, config.tower.grid
        cell = jnp.asarray(uniform.cell_of(grid, grid, n))
        patches, _ = model.run_tower(pixels)
        b = patches.size.shape[0]
        how = grouped(jnp.broadcast_to(cell, (b, cell.shape[0])), n)
        x, size = merge(patches.hidden[:, special:], patches.size[:, special:], how)
        return Encoded(model.project(x), how.kept, size, jnp.zeros((b, n), bool))

    return encode


def visionzip_encoder(n: int) -> Encode:
    """VisionZip: dominant and contextual tokens in the published proportion. The class token is not counted."""

    def encode(model: Llava, pixels: Pixels) -> Encoded:
        check_budget(n, check_patches_only(model.config), "patches")
        special = model.config.tower.special
        patches, attention = model.run_tower(pixels)
        scores = class_token_attention(attention, special).sum(1)
        keys = attention.keys.astype(jnp.float32).mean(2)[:, special:]
        dominant, contextual = zip_split(n)
        done = visionzip(patches.hidden[:, special:], scores, keys, dominant, contextual)
        size = jnp.ones(done.how.kept.shape)
        counted = merge(jnp.zeros((*scores.shape, 1)), None, done.how)[1]
        size = counted if contextual else size
        # Contextual tokens stay behind the dominant ones, as published.
        return Encoded(model.project(done.x), done.how.kept, size, jnp.zeros(size.shape, bool))

    return encode


def zip_split(n: int) -> tuple[int, int]:
    """(dominant, contextual): as published for 64, 128 and 192, otherwise 5 to 1. The class token is not counted."""
    if n in SPLITS:
        return SPLITS[n]
    contextual = round(n * 10 / 64)
    return n - contextual, contextual


def prumerge_encoder(n: int, *, stepped: bool = False) -> Encode:
    """PruMerge with an exact number: n - 1 tokens with their neighbours added, and one token for all dropped ones.

    Patches are ranked by the attention of the class token, or of all patches where the tower has no class token.
    """

    def encode(model: Llava, pixels: Pixels) -> Encoded:
        total = check_patches_only(model.config)
        if not 1 <= n <= total:
            raise ValueError(f"PruMerge keeps 1 to {total} of {total} patches, one of them for what goes; not {n}")
        special = model.config.tower.special
        patches, attention = model.run_tower(pixels)
        last = last_layer_attention(model, patches, attention)
        flat = lambda x: x.reshape(*x.shape[:2], -1).astype(jnp.float32)
        q, k = flat(last.queries), flat(last.keys)
        asking = q[:, :1] if special else q
        rows = jnp.einsum("bme,bne->bmn", asking, k, precision="highest") * q.shape[-1] ** -0.5
        attention = jax.nn.softmax(rows, axis=-1).mean(1)[:, special:]
        kept = stepped_order(attention, n - 1) if stepped else ranked_indices(attention, n - 1)
        gone = complement(kept, total)
        done = prumerge(patches.hidden[:, special:], attention, k[:, special:], kept, gone)
        b = kept.shape[0]
        place = jnp.concatenate([kept, jnp.full((b, 1), -1, kept.dtype)], axis=1)
        size = jnp.concatenate([jnp.ones((b, n - 1)), jnp.full((b, 1), float(max(total - n + 1, 1)))], axis=1)
        return Encoded(model.project(done.x), place, size, jnp.zeros((b, n), bool))

    return encode


def cdpruner_encoder(n: int) -> Encode:
    """Keeps n diverse patches: CDPruner's kernel without the question."""

    def encode(model: Llava, pixels: Pixels) -> Encoded:
        check_budget(n, check_patches_only(model.config), "patches")
        special = model.config.tower.special
        patches, _ = model.run_tower(pixels)
        x = model.project(patches.hidden[:, special:])
        kept = jnp.sort(diverse(x, jnp.ones(x.shape[:2]), n).order, axis=1)
        ones = jnp.ones(kept.shape)
        return Encoded(take(x, kept), kept, ones, jnp.zeros(kept.shape, bool))

    return encode


def mustdrop_encoder(r: Callable[[LlavaConfig], tuple[int, int]], *, keys: bool) -> Encode:
    """MustDrop's first stage: r windows merge after the first layer, and key tokens are marked.

    Args:
      r: (config) -> (side of a window, number of windows that merge).
      keys: whether there are key tokens.
    """

    def encode(model: Llava, pixels: Pixels) -> Encoded:
        tower, config = model.tower, model.config
        check_patches_only(config)
        window, many = r(config)
        patches, attention = tower.run_layers(tower.embed(pixels), range(1))
        if many:
            patches = spatial(patches, many, grid=config.tower.grid, special=config.tower.special, window=window)
        return _rest(model, patches, attention, keys)

    return encode


def mustdrop_threshold_encoder(threshold: float = THRESHOLD, *, window: int, keys: bool) -> Encode:
    """MustDrop's first stage with its threshold. Tokens that merged into another leave empty places."""

    def encode(model: Llava, pixels: Pixels) -> Encoded:
        tower, config = model.tower, model.config
        check_patches_only(config)
        patches, attention = tower.run_layers(tower.embed(pixels), range(1))
        sizes = dict(grid=config.tower.grid, special=config.tower.special, window=window)
        return _rest(model, spatial_above(patches, threshold, **sizes), attention, keys)

    return encode


def _rest(model: Llava, patches: Patches, attention: AttentionInputs, keys: bool) -> Encoded:
    config, special = model.config, model.config.tower.special
    if config.feature_layers > 1:
        patches, attention = model.tower.run_layers(patches, range(1, config.feature_layers))
    if not keys:
        return project_patches(model, patches)
    row = class_token_attention(last_layer_attention(model, patches, attention), special)
    present = patches.size[:, special:] > 0
    counts = jnp.asarray([key_count(left) for left in range(present.shape[1] + 1)])
    key = key_tokens(jnp.where(present[:, None], row, -1.0), counts[present.sum(1)])
    return project_patches(model, patches, key)

"""Whole models for `vision_parity.py`: tiny random towers and decoders, with weights from the files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxcompress.checkpoints import load, load_tower
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import init_state
from jaxcompress.models.read_block import HiddenBlock, read_block
from jaxcompress.models.vit import VisionTower
from jaxcompress.policies import Full
from jaxcompress.state.kv_state import State
from jaxcompress.vision import choose, prumerge, prune_rules, sparsevlm, windows
from jaxcompress.vision.dual_attention import LAYERS, dual_attention, passes
from jaxcompress.vision.encoders import class_token_attention
from jaxcompress.vision.fastv import last_word
from jaxcompress.vision.layer_view import LayerView, PruneContext, PruneRule, renumber_after
from jaxcompress.vision.method import PruneStep
from jaxcompress.vision.output_aware import survivors
from jaxcompress.vision.reading import layer_prunings
from jaxcompress.vision.sparsevlm import rater_scores
from jaxcompress.vision.text_raters import text_raters
from jaxcompress.vision.tome import merged, tome
from jaxcompress.vision.visionzip import visionzip

Case = Any  # of vision_parity


def numbers(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return {k: data[k].astype(np.float32) if data[k].dtype == np.float16 else data[k] for k in data.files}


@cache
def weights(path: Path) -> dict[str, np.ndarray]:
    return {name.removeprefix("w/"): tensor for name, tensor in numbers(path).items()}


def _folder(tensors: dict[str, np.ndarray], settings: dict[str, Any]) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@cache
def decoder(path: Path, heads: int = 4) -> Decoder:
    """A llama from the tensors of a file; without an output projection, the embedding stands in for it."""
    named = {k: v for k, v in weights(path).items() if "vision_tower" not in k and "projector" not in k}
    named = {k if k.startswith(("model.", "lm_head")) else f"model.{k}": v for k, v in named.items()}
    layers = 1 + max(int(k.split(".")[2]) for k in named if k.startswith("model.layers."))
    vocabulary, width = named["model.embed_tokens.weight"].shape
    settings = dict(
        model_type="llama", vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, rms_norm_eps=1e-5,
        intermediate_size=named["model.layers.0.mlp.up_proj.weight"].shape[0], num_attention_heads=heads,
        num_key_value_heads=heads, rope_theta=10000.0, tie_word_embeddings="lm_head.weight" not in named,
        torch_dtype="float32",
    )  # fmt: skip
    return load(_folder(named, settings)).model


@cache
def tower(path: Path, prefix: str = "", heads: int = 4) -> VisionTower:
    named = {k.removeprefix(prefix): v for k, v in weights(path).items() if k.startswith(f"{prefix}vision_model.")}
    inner = "vision_model.encoder.layers."
    patch = named["vision_model.embeddings.patch_embedding.weight"]
    grid = round((named["vision_model.embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5)
    settings = dict(
        model_type="clip_vision_model", hidden_size=patch.shape[0], patch_size=patch.shape[-1],
        image_size=grid * patch.shape[-1], num_attention_heads=heads, hidden_act="quick_gelu", layer_norm_eps=1e-5,
        intermediate_size=named[f"{inner}0.mlp.fc1.weight"].shape[0], torch_dtype="float32",
        num_hidden_layers=1 + max(int(k.split(".")[3]) for k in named if k.startswith(inner)),
    )  # fmt: skip
    return load_tower(_folder(named, settings)).model


def _one(folder: Path, pattern: str) -> Path:
    return next(iter(sorted(folder.glob(pattern))))


@partial(jax.jit, static_argnames=("start", "stop"))
def _layers(model: VisionTower, patches: Any, start: int, stop: int) -> Any:
    return model.run_layers(patches, range(start, stop))


def _before_last_layer(case: Case) -> Any:
    """The tower's tokens before its last layer, and the attention inputs of the layer before."""
    model = tower(_one(case.folder, "tower_weights*.npz"))
    return _layers(model, model.embed(jnp.asarray(case["pixel_values"])), 0, model.config.num_layers - 1)


def _close_where_given(case: Case, what: str, ours: Any) -> None:
    if what in case:
        case.close(what, ours, case[what])


# Towers


def fastervlm_case(case: Case) -> None:
    attention, features, k = case["attention_mean"], case["features"], case.number("k")
    if "pixel_values" in case:
        patches, inputs = _before_last_layer(case)
        ours = class_token_attention(inputs, 1).mean(1)
        case.close("features", patches.hidden[:, 1:], features)
        case.close("attention_mean", ours, attention)
        attention, features = ours, patches.hidden[:, 1:]
    kept = choose.top_indices(jnp.asarray(attention), k)
    case.same("mask", choose.mask_of(kept, attention.shape[1]), case["mask"])
    case.close("kept_features", choose.take(jnp.asarray(features), kept), case["kept_features"])


def visionzip_case(case: Case) -> None:
    attention, hidden, metric = (case[key] for key in ("cls_attention", "hidden_states_m2", "metric"))
    if "pixel_values" in case:
        patches, inputs = _before_last_layer(case)
        row, keys = class_token_attention(inputs, 1), inputs.keys.mean(2)
        case.close("cls_attention", row, attention)
        case.close("hidden_states_m2", patches.hidden, hidden)
        case.close("metric", keys, metric)
        attention, hidden, metric = row, patches.hidden, keys
    scores = jnp.pad(jnp.asarray(attention).sum(1), [(0, 0), (1, 0)], constant_values=jnp.inf)
    dominant, contextual = case.number("dominant_arg"), case.number("contextual_num")
    done = visionzip(jnp.asarray(hidden), scores, jnp.asarray(metric), dominant, contextual)
    case.same("all_indices", choose.ranked_indices(scores, dominant), case["all_indices"])
    kept = done.how.kept[:, :dominant]
    case.same("keep_mask", ~choose.mask_of(kept, scores.shape[1]), ~_kept_mask(case, dominant))
    rest = np.asarray(choose.complement(kept, scores.shape[1]))
    seeds = np.asarray(done.how.kept[:, dominant:])
    case.same("target_indices", [np.searchsorted(rest[0], seed) for seed in seeds[0]], case["target_indices"])
    case.same("assign", done.how.target - dominant, case["assign"])
    case.close("contextual", done.x[:, dominant:], case["contextual"])
    case.close("out", done.x, case["out"])


def _kept_mask(case: Case, dominant: int) -> np.ndarray:
    """The file's mask marks either the kept or the dropped tokens."""
    mask = np.asarray(case["keep_mask"], bool)
    return mask if mask.sum(1)[0] == dominant else ~mask


def prumerge_case(case: Case) -> None:
    """`adv` and `plus`, adaptive or with a fixed ratio."""
    source = next((path for path in sorted(case.folder.glob("adv_[0-9]*.npz")) if _same_picture(case, path)), None)
    stepped, fixed = case.name.startswith("plus"), "fixed" in case.name
    attention = jnp.asarray(case["cls_attn"])
    given: dict[str, Any] = numbers(source) if source is not None else {}
    if "q_layer23" in given:
        q, k, x = (jnp.asarray(given[key]) for key in ("q_layer23", "k_layer23", "features_m2"))
        ours = prumerge.single_head_attention(q, k)
        case.close("cls_attn", ours, attention)
        if "pixel_values" in case:
            _prumerge_tower(case, q, k, x)
        keys = k[:, 1:]
    else:
        keys = x = jnp.zeros((*attention.shape, 4))
    n = attention.shape[1]
    if fixed:
        ratio = case.decimal("reduction_ratio")
        kept = choose.ranked_indices(attention, int(n * ratio))
        if stepped:
            kept = jnp.concatenate([kept, jnp.asarray(prumerge.even_steps(n, ratio), jnp.int32)[None]], axis=1)
        gone = prumerge.as_released(kept, n)
        done, present = prumerge.prumerge(x, attention, keys, kept, gone), None
    else:
        done, kept = jax.jit(partial(prumerge.prumerge_adaptive, stepped=stepped))(x, attention, keys)
        case.close("reduction_ratio", prumerge.outliers(attention) / n, case["reduction_ratio"])
        present = np.asarray(done.present)
        count = int(present.sum()) - 1
        kept, gone = kept[:, :count], choose.complement(kept[:, :count], n)
    case.same("kept_idx", kept, case["kept_idx"])
    case.same("complement_idx", gone, case["complement_idx"])
    if "q_layer23" in given:
        case.close("extra_token", done.x[:, -1:], case["extra_token"])
        out = done.x if present is None else np.asarray(done.x)[present][None]
        case.close("out", out, case["out"])


def _same_picture(case: Case, path: Path) -> bool:
    other = numbers(path)
    return "q_layer23" in other and np.allclose(other["cls_attn"], case["cls_attn"], atol=1e-9)


def _prumerge_tower(case: Case, q: Any, k: Any, x: Any) -> None:
    model = tower(_one(case.folder, "tower_weights*.npz"))
    last = model.config.num_layers - 1
    patches, _ = _layers(model, model.embed(jnp.asarray(case["pixel_values"])), 0, last)
    case.close("features_m2", patches.hidden[:, 1:], x)
    _, attention = _layers(model, patches, last, last + 1)
    case.close("q_layer23", attention.queries.reshape(q.shape), q)
    case.close("k_layer23", attention.keys.reshape(k.shape), k)


def _must_see(model: VisionTower, pixels: Any) -> dict[str, Any]:
    """MustDrop's tower as released: similar windows first, and in each picture as many as in the one with fewest."""
    special, grid, last = model.config.special, model.config.grid, model.config.num_layers - 1
    start = model.embed(jnp.asarray(pixels))
    patches, _ = _layers(model, start, 0, 1)
    table = windows.window_table(grid, grid, windows.WINDOW)
    similarity = windows.window_similarity(patches.hidden[:, special:], table)
    r = int(windows.windows_above(similarity).min())
    after = merged(patches, windows.merge_windows(similarity, table, r, similar_first=True))
    before_last, _ = _layers(model, after, 1, last)
    final, attention = _layers(model, before_last, last, last + 1)
    row = class_token_attention(attention, special)
    keys = choose.ranked_indices(row.mean(1), windows.key_count(row.shape[-1]))  # the authors order them by score
    return dict(start=start, after=after, before_last=before_last, final=final, r=r, similarity=similarity, keys=keys)


def mustdrop_tower(case: Case) -> None:
    model = tower(_one(case.folder, "stage1_tower_weights.npz"))
    seen = _must_see(model, case["pixel_values"])
    case.close("window_similarity", seen["similarity"], case["window_similarity"])
    case.same("r", [seen["r"]], case["r"])
    case.same("merged_windows", choose.ranked_indices(seen["similarity"], seen["r"]), case["merged_windows"])
    case.same("key_set", seen["keys"], case["key_set"])
    case.close("hidden_embed", seen["start"].hidden, case["hidden_embed"])
    case.close("hidden_after1", seen["after"].hidden, case["hidden_after1"])
    case.close("hidden_m2", seen["before_last"].hidden, case["hidden_m2"])
    case.close("projector_input", seen["before_last"].hidden[:, 1:], case["projector_input"])
    case.close("last_hidden", seen["final"].hidden, case["last_hidden"])
    case.close("pooler", model.pooled(seen["final"]), case["pooler"])


def tome_deit(case: Case) -> None:
    assets = os.environ.get("JAXCOMPRESS_ASSETS")
    if assets is None:
        raise FileNotFoundError("DeiT-Tiny is needed: set JAXCOMPRESS_ASSETS to the folder with weights/deit_tiny")
    model = deit(Path(assets) / "weights" / "deit_tiny")
    images = numbers(case.folder / "deit_images.npz")
    pixels = images["images_u8"].astype(np.float32) / 255
    pixels = (pixels - np.array([0.485, 0.456, 0.406], np.float32)) / np.array([0.229, 0.224, 0.225], np.float32)
    start = model.embed(jnp.asarray(pixels.transpose(0, 3, 1, 2)))
    if case.name == "deit_images":
        patches, _ = _layers(model, start, 0, model.config.num_layers)
        case.close("logits_plain_no_patch", model.logits(patches), case["logits_plain_no_patch"])
        return
    counts = tuple(int(r) for r in case["r_schedule"])
    patches = _tome(model, start, counts, bool(case.number("prop_attn")))
    case.close("logits", model.logits(patches), case["logits"])
    case.close("final_norm_cls", model.norm(patches.hidden)[:, 0], case["final_norm_cls"])
    _close_where_given(case, "final_size", patches.size)
    if "source_group" in case:
        case.same("source_group", patches.group, case["source_group"])


@cache
def deit(folder: Path) -> VisionTower:
    return load_tower(folder).model


@partial(jax.jit, static_argnames=("counts", "proportional"))
def _tome(model: VisionTower, start: Any, counts: tuple[int, ...], proportional: bool) -> Any:
    return model.run_layers(start, reduce=tome(counts, model.config.special), proportional=proportional)[0]


# Decoders


def _run(
    model: Decoder, hidden: Any, first: int, patches: int, steps: Sequence[PruneStep], *, room: int = 8,
    key: np.ndarray | None = None, raters: bool = False, apart: int = 0, watch: Callable | None = None,
) -> tuple[HiddenBlock, State, list[Any]]:  # fmt: skip
    """Reads embeddings of words and one picture; also returns what `watch` gives before and after every prune step.

    Args:
      apart: the first layers, whose states are kept apart from the others because they will hold more tokens.
    """
    hidden = jnp.asarray(hidden)
    total = hidden.shape[1]
    place = np.arange(total)
    patch = np.where((place >= first) & (place < first + patches), place - first, -1)[None]
    keys = np.zeros((1, patches), bool)
    if key is not None:
        keys[0, key] = True
    # Each step adds clusters beside the patches, at most as many as one pass over all patches makes.
    most = total + sum(sparsevlm.recycled(patches)[1] for _ in steps) + room
    slots = [most + (layer < apart) for layer in range(model.config.num_layers)]

    @jax.jit
    def go(model: Decoder, hidden: Any, keys: Any) -> Any:
        start = HiddenBlock(hidden, jnp.asarray(place, jnp.int32)[None], jnp.asarray(patch, jnp.int32))
        words = total - patches
        context = PruneContext(
            text_raters(start, words) if raters else jnp.ones((1, words), bool), keys, model.config.rope
        )
        log: list[Any] = []

        def watched(rule: PruneRule) -> PruneRule:
            def both(context: PruneContext, block: HiddenBlock, attention: Any, n: int) -> HiddenBlock:
                after = rule(context, block, attention, n)
                seen = {} if watch is None else watch(context, LayerView.at(context, block, attention))
                log.append(dict(before=block._replace(hidden=()), after=after._replace(hidden=()), **seen))
                return after

            return both

        state = init_state(model.config, Full(), slots)
        watched_steps = tuple(one._replace(rule=watched(one.rule)) for one in steps)
        block, state = read_block(model, start, state, Full(), prunings=layer_prunings(context, watched_steps))
        return block, state, log, context.raters

    block, state, log, words = go(model, hidden, jnp.asarray(keys))
    return block, state, [dict(one, words=words) for one in log]


def _left(block: HiddenBlock) -> Any:
    """The hidden states of tokens that are left, without empty places."""
    return np.asarray(block.hidden)[np.asarray(block.positions) >= 0][None]


def _positions(block: HiddenBlock) -> np.ndarray:
    positions = np.asarray(block.positions)
    return positions[positions >= 0][None]


def _held(state: State) -> np.ndarray:
    """How many tokens each layer holds."""
    return np.concatenate([np.asarray(part.occupancy())[:, 0, 0] for part in state])


def _offsets(before: HiddenBlock, after: HiddenBlock) -> tuple[np.ndarray, np.ndarray]:
    """Which visual tokens there were before and after a pruning step."""

    def there(block: HiddenBlock) -> np.ndarray:
        patch, positions = np.asarray(block.patch)[0], np.asarray(block.positions)[0]
        return patch[(positions >= 0) & (patch >= 0)]

    return there(before), there(after)


def fastv_llm(case: Case) -> None:
    model = decoder(case.folder / "llm_weights.npz")
    hidden = numbers(case.folder / "llm_dense.npz")["inputs_embeds"]
    first, patches, layer, kept = (case.number(k) for k in ("sys_length", "image_token_length", "K", "attention_rank"))
    if case.name == "llm_dense":
        block, _, _ = _run(model, hidden, first, patches, ())
        case.close("logits", model.logits(block.hidden), case["logits"])
        case.same("position_ids", block.positions, case["position_ids"])
        return
    inplace = bool(case.number("inplace"))
    rule = prune_rules.fastv if inplace else prune_rules.fastv_in_place
    watch = lambda context, view: dict(score=last_word(view.last_word_attention()))
    block, _, (log,) = _run(model, hidden, first, patches, (PruneStep(layer - 1, kept, rule),), watch=watch)
    case.close("score_row_headmean", log["score"][0], case["score_row_headmean"])
    order = choose.ranked_indices(log["score"], kept)[0] + first
    case.same("topk_in_score_order", order, case["topk_in_score_order"])
    if inplace:
        case.same("keep_sorted", block.positions[0], case["keep_sorted"])
        case.same("position_ids", block.positions, case["position_ids"])
        case.close("logits", model.logits(block.hidden), case["logits"])
    else:
        there = np.asarray(block.positions)[0] >= 0
        case.same("kept", np.flatnonzero(there)[first : first + kept], np.sort(case["topk_in_score_order"]))
        case.close("logits", model.logits(block.hidden)[:, there], case["logits"][:, there])


def fitprune_llm(case: Case) -> None:
    model = decoder(case.folder / "llm_weights.npz")
    files = map(numbers, sorted(case.folder.glob("llm_r*.npz")))
    hidden = next(given["inputs_embeds"] for given in files if "inputs_embeds" in given)
    first, patches = 35, 576
    left, steps = patches, []
    for layer, goes in enumerate(case["deleted_per_layer"]):
        if goes:
            left -= int(goes)
            steps.append(PruneStep(layer, left, prune_rules.fitprune))
    block, state, _ = _run(model, hidden, first, patches, steps)
    case.same("survivor_original_positions", block.positions[0], case["survivor_original_positions"])
    case.same("cache_len_per_layer", _held(state), case["cache_len_per_layer"])
    case.close("last_hidden", block.hidden, case["last_hidden"], 5e-4)


def sparsevlm_llm(case: Case) -> None:
    kind = case.name.split("_")[1]
    plus = kind == "v2"
    model = decoder(case.folder / f"llm_weights_{'v2' if plus else 'v1'}.npz", 16 if plus else 4)
    first, patches = case.number("v_token_start"), case.number("image_shape")
    layers = sparsevlm.LAYERS_FIRST if kind == "v1" else sparsevlm.LAYERS
    noise = [jnp.asarray(case[f"cl{s}_noise"]) * 1e-6 if f"cl{s}_noise" in case else None for s in range(len(layers))]
    budget = case.name.split("ret")[-1].split("_")[0]
    if plus:
        kept = sparsevlm.KEPT_PLUS[int(budget)]
        steps = [PruneStep(at, n, prune_rules.sparsevlm_plus) for at, n in zip(layers, kept, strict=True)]
    elif kind == "v15":
        kept = sparsevlm.KEPT[int(budget)]
        steps = [
            PruneStep(at, n, prune_rules.sparsevlm_fixed(n, z)) for at, n, z in zip(layers, kept, noise, strict=True)
        ]
    else:
        rule = lambda z: prune_rules.sparsevlm_by_rank(case.decimal("scale"), case.decimal("bias"), z)
        steps = [PruneStep(at, 0, rule(z)) for at, z in zip(layers, noise, strict=True)]

    def watch(context: PruneContext, view: LayerView) -> dict[str, Any]:
        scores = (
            prune_rules.sparsevlm_plus_scores(context, view)
            if plus
            else rater_scores(view.word_attention(), context.raters & view.follows)
        )
        return dict(scores=scores, there=view.present)

    block, state, log = _run(model, case["inputs_embeds"], first, patches, steps, raters=True, watch=watch)
    text = case.number("text_seq")
    case.same("raters", np.flatnonzero(np.asarray(log[0]["words"])[0, -text:]), case["raters"])
    for s, one in enumerate(log):
        there = np.asarray(one["there"])[0]
        case.same(f"s{s}_v_in", [there.sum()], case[f"s{s}_v_in"])
        case.close(f"s{s}_relation", np.asarray(one["scores"])[:, there], case[f"s{s}_relation"])
        was, now = _offsets(one["before"], one["after"])
        kept = now[: len(case[f"s{s}_keep"])]
        case.same(f"s{s}_keep", [int(np.flatnonzero(was == patch)[0]) for patch in kept], case[f"s{s}_keep"])
    case.same("cache_len_per_layer", _held(state), case["cache_len_per_layer"])
    case.same("position_ids_final", _positions(block), case["position_ids_final"])
    case.close("last_hidden", _left(block), case["last_hidden"])


def _mustdrop(
    model: Decoder, hidden: Any, first: int, patches: int, key: np.ndarray, thresholds: tuple[float, float]
) -> dict[str, Any]:
    """Prefill and third stage as released: positions numbered anew, every layer reduced to the final survivors."""
    rule = renumber_after(prune_rules.mustdrop_above(thresholds))

    def watch(context: PruneContext, view: LayerView) -> dict[str, Any]:
        stays = passes(*dual_attention(view.word_attention(), view.follows, view.present), thresholds)
        return dict(passes=stays & view.present, there=view.present)

    steps = [PruneStep(layer, patches, rule) for layer in LAYERS]
    block, state, log = _run(model, hidden, first, patches, steps, key=key, apart=LAYERS[0], watch=watch)
    final = np.asarray(block.positions) >= 0
    maps = [np.asarray(one["before"].positions)[final][None] for one in log]
    before = _held(state)
    edges = [LAYERS[0], *(layer + 1 for layer in LAYERS)]
    for kept, start, stop in zip(maps, edges, edges[1:], strict=False):
        state = survivors(state, jnp.asarray(kept), range(start, stop))
    # Each layer goes on counting from what it holds.
    state = tuple(replace(part, seen=part.occupancy()[0, :, 0]) for part in state)
    return dict(block=block, state=state, log=log, maps=maps, before=before, final=final)


@jax.jit
def _next(model: Decoder, tokens: Any, state: State) -> tuple[Any, State]:
    done = read(model, tokens, state, Full())
    return model.logits(done.hidden)[:, -1], done.state


def mustdrop_llm(case: Case) -> None:
    model = decoder(case.folder / "llm_weights.npz")
    first, patches = case.number("v_token_start"), case.number("img_seq")
    thresholds = float(case["thr"][0]), float(case["thr"][1])
    done = _mustdrop(model, case["inputs_embeds"], first, patches, case["key_set_in"], thresholds)
    block, state, log = done["block"], done["state"], done["log"]
    for s, one in enumerate(log):
        there = np.asarray(one["there"])[0]
        case.same(f"filter{s}_n_in", [there.sum()], case[f"filter{s}_n_in"])
        case.same(f"filter{s}_keep", np.flatnonzero(np.asarray(one["passes"])[0][there]), case[f"filter{s}_keep"])
        case.same(f"composed_gather_{s}", done["maps"][s][0], case[f"composed_gather_{s}"])
    case.same("cache_len_before_gather", done["before"], case["cache_len_before_gather"])
    case.same("cache_len_per_layer", _held(state), case["cache_len_per_layer"])
    left = np.asarray(block.patch)[done["final"]]
    left = left[left >= 0]
    case.same("key_set_out", np.flatnonzero(np.isin(left, case["key_set_in"])), case["key_set_out"])
    case.same("position_ids_final", _positions(block), case["position_ids_final"])
    case.close("final_norm_hidden", _left(block), case["final_norm_hidden"])
    case.close("prefill_logits_all", model.logits(jnp.asarray(_left(block))), case["prefill_logits_all"])
    case.close("prefill_logits_last", model.logits(jnp.asarray(_left(block)))[:, -1], case["prefill_logits_last"])
    for key in case.numbers:
        if key[:2] in ("k_", "v_") and key[2:].isdigit():
            case.close(key, _cached(state, int(key[2:]), key[0]), case[key])
    logits = []
    for token in case["decode_tokens_in"]:
        out, state = _next(model, jnp.asarray([[token]], jnp.int32), state)
        logits.append(out[0])
    case.close("decode_logits", jnp.stack(logits), case["decode_logits"])
    case.same("cache_len_after_decode", _held(state), case["cache_len_after_decode"])


def _cached(state: State, layer: int, what: str) -> np.ndarray:
    part = next(part for part in state if layer in np.asarray(part.layer))
    at = int(np.flatnonzero(np.asarray(part.layer) == layer)[0])
    positions = np.asarray(part.positions[at, 0, 0])
    order = np.argsort(positions, kind="stable")[(positions < 0).sum() :]
    held: Any = part.keys if what == "k" else part.values
    return np.asarray(held[at])[:, :, order]


def mustdrop_e2e(case: Case) -> None:
    file = case.folder / "e2e_weights.npz"
    tensors = weights(file)
    pixels = case["pixel_values"]
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    seen = _must_see(tower(file, "model.vision_tower.vision_tower.", 3), pixels)
    crops, n = seen["keys"].shape[0], seen["before_last"].hidden.shape[1] - 1
    key = np.concatenate([np.asarray(seen["keys"][i]) + i * n for i in range(crops)])
    case.same("key_set", key, case["key_set"])
    case.same("img_seq_after_stage1", [crops * n], case["img_seq_after_stage1"])
    linear = lambda x, i: x @ tensors[f"model.mm_projector.{i}.weight"].T + tensors[f"model.mm_projector.{i}.bias"]
    features = seen["before_last"].hidden[:, 1:]
    visual = linear(jax.nn.gelu(linear(features, 0), approximate=False), 2).reshape(1, crops * n, -1)
    ids = case["input_ids"][0]
    first = int(np.flatnonzero(ids == -200)[0])
    model = decoder(file)
    words = lambda piece: model.embed(jnp.asarray(piece, jnp.int32)[None])
    hidden = jnp.concatenate([words(ids[:first]), visual, words(ids[first + 1 :])], axis=1)
    thresholds = float(case["thr"][0]), float(case["thr"][1])
    done = _mustdrop(model, hidden, first, crops * n, key, thresholds)
    state, block = done["state"], done["block"]
    for s, kept in enumerate(done["maps"]):
        case.same(f"composed_gather_{s}", kept[0], case[f"composed_gather_{s}"])
    tokens = len(ids) - 1
    after = [int((np.asarray(one["after"].positions) >= 0).sum()) - tokens for one in done["log"]]
    visible = [crops * n, *after]
    counts = [visible[sum(layer >= at for at in LAYERS)] for layer in range(len(case["num_token"]))]
    case.same("num_token", counts, case["num_token"])
    logits = model.logits(jnp.asarray(_left(block)))[:, -1]
    written, every = [1], []
    for step in range(len(case["step_logits"])):
        every.append(logits[0])
        token = int(logits[0].argmax())
        written.append(token)
        if step + 1 < len(case["step_logits"]):
            logits, state = _next(model, jnp.asarray([[token]], jnp.int32), state)
    case.close("step_logits", jnp.stack(every), case["step_logits"])
    case.same("generated", [written], case["generated"])


MODELS: dict[str, dict[str, Callable[[Any], None]]] = {
    "fastervlm": {"case": fastervlm_case},
    "visionzip": {"case": visionzip_case},
    "prumerge": {"adv": prumerge_case, "plus": prumerge_case},
    "mustdrop": {"stage1_tower": mustdrop_tower, "llm": mustdrop_llm, "e2e": mustdrop_e2e},
    "tome": {"deit": tome_deit},
    "fastv": {"llm": fastv_llm},
    "fitprune": {"llm": fitprune_llm},
    "sparsevlm": {"llm": sparsevlm_llm},
}

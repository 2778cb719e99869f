"""Compares vision token reduction with the numbers of the authors' code, for every file of a folder, by method.

    python experiments/vision_parity.py FOLDER [--only mustdrop] [--verbose]

The folder holds `.npz` files of the official implementations in sub-folders by method (tome, mustdrop, fastv,
sparsevlm, visionzip, fastervlm, prumerge, cdpruner, fitprune), inputs, weights and outputs together. Kept sets have to
be equal; values may differ by 1e-4, those of a 32-layer FitPrune model by 5e-4.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from command import Command, arguments
from vision_parity_models import MODELS

from jaxcompress.vision import cdpruner, choose, dual_attention, fastv, fitprune, merging, sparsevlm, tome, windows
from jaxcompress.vision.cdpruner import question_relevance


@dataclass(frozen=True)
class Arguments(Command):
    """Prints the arrays that differ, and how many are equal by method; the exit code is 1 if any differs."""

    folder: Annotated[Path, tyro.conf.Positional]
    only: str = ""
    """Part of `method/file`."""
    verbose: bool = False
    """Print every comparison."""


QUICK = Arguments(
    quick=True, folder=Path(__file__).parents[1] / "tests" / "fixtures" / "vision", only="tome/match_03", verbose=True
)
TOLERANCE = 1e-4
Numbers = dict[str, np.ndarray]

# Compiled as a whole: running the operations one by one would take minutes.
bipartite = jax.jit(tome.bipartite, static_argnums=1, static_argnames=("class_token", "distill_token"))
every_kth = jax.jit(tome.every_kth, static_argnums=1)
largest = jax.jit(merging.largest)
merge, unmerge = jax.jit(merging.merge), jax.jit(merging.unmerge, static_argnums=2)
cluster, diverse = jax.jit(sparsevlm.cluster, static_argnums=1), jax.jit(cdpruner.diverse, static_argnums=2)


def merge_windows(similarity: jax.Array, table: np.ndarray, r: int) -> merging.Merging:
    return jax.jit(partial(windows.merge_windows, table=table, r=r, similar_first=True))(similarity)


class Case:
    """One file: its numbers, its folder for weights and inputs it shares, and what was found."""

    def __init__(self, path: Path):
        self.path, self.folder, self.name = path, path.parent, path.stem
        self.numbers = read(path)
        self.found: list[tuple[str, bool, str]] = []

    def __getitem__(self, key: str) -> np.ndarray:
        return self.numbers[key]

    def __contains__(self, key: str) -> bool:
        return key in self.numbers

    def number(self, key: str) -> int:
        return int(self.numbers[key].reshape(-1)[0])

    def decimal(self, key: str, i: int = 0) -> float:
        """A number that was written as a decimal, not as the float32 next to it."""
        return round(float(self.numbers[key].reshape(-1)[i]), 6)

    def same(self, what: str, ours: Any, theirs: Any) -> None:
        """Compares integers and sets exactly."""
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        equal = ours.shape == theirs.shape and bool((ours == theirs).all())
        self.found.append((what, equal, "" if equal else f"{ours.tolist()} is not {theirs.tolist()}"))

    def close(self, what: str, ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> None:
        """Compares values, with the tolerance relative to 1 and to the largest of them."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if ours.shape != theirs.shape:
            self.found.append((what, False, f"shape {ours.shape} is not {theirs.shape}"))
            return
        off = float(np.abs(ours - theirs).max()) if ours.size else 0.0
        self.found.append((what, off <= tolerance, f"off by {off:.1e}"))


def read(path: Path) -> Numbers:
    """Reads a file; half floats become float32."""
    with np.load(path) as data:
        return {k: data[k].astype(np.float32) if data[k].dtype == np.float16 else data[k] for k in data.files}


def batched(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x)[None]


# ToMe


def tome_match(case: Case) -> None:
    x, size = jnp.asarray(case["x"]), jnp.asarray(case["size_in"])[..., 0]
    special = {key: bool(case.number(key)) for key in ("class_token", "distill_token")}
    total = x.shape[1]
    how = bipartite(jnp.asarray(case["metric"]), case.number("r"), **special)
    for name, given in (("unit", None), ("sized", size)):
        out, sizes = merge(x, given, how)
        case.close(f"x_{name}", out, case[f"x_{name}"])
        case.close(f"size_{name}", sizes[..., None], case[f"size_{name}"])
    into = how.into(total)
    case.same("source_group", into, case["source_group"])
    out, _ = merge(x, None, how)
    if "x_amax" in case:
        case.close("x_amax", largest(x, how), case["x_amax"])
        case.close("x_mean", out, case["x_mean"])
    back = in_released_order(how) if special["distill_token"] else how
    case.close("unmerged", unmerge(out, back, total), case["unmerged"])
    again = bipartite(out, 1, **special)
    both = merging.followed(into, again.into(out.shape[1]))
    case.same("source_group_after_second_r1", both, case["source_group_after_second_r1"])


def in_released_order(how: merging.Merging) -> merging.Merging:
    """With all even tokens before all odd ones: the authors' `unmerge` forgets that a distillation token was moved."""
    kept, target = np.asarray(how.kept), np.asarray(how.target)
    order = np.argsort(kept % 2, axis=1, kind="stable")
    if len(target[0]) == 0:
        return how
    return how._replace(
        kept=jnp.asarray(np.take_along_axis(kept, order, 1)),
        target=jnp.asarray(np.take_along_axis(np.argsort(order, axis=1), target, 1)),
    )


def tome_kth(case: Case) -> None:
    x = jnp.asarray(case["x"])
    how = every_kth(jnp.asarray(case["metric"]), case.number("k"))
    out, size = merge(x, None, how)
    case.close("x_unit", out, case["x_unit"])
    case.close("size_unit", size[..., None], case["size_unit"])
    case.close("unmerged", unmerge(out, how, case["unmerged"].shape[1]), case["unmerged"])


def tome_parse_r(case: Case) -> None:
    for key in case.numbers:
        if key.startswith("case_"):
            continue
        layers, i = (int(part) for part in key[1:].split("_case"))
        r: Any = int(case["case_r"][i])
        r = [3, 2, 1] if r < 0 else r
        case.same(key, tome.schedule(layers, r, case.decimal("case_inflect", i)), case[key])


# MustDrop, arrays


def mustdrop_stage1_pool(case: Case) -> None:
    x, window = jnp.asarray(case["x"]), case.number("window")
    grid = windows.square(x.shape[1] - 1)
    table = windows.window_table(grid, grid, window)
    similarity = windows.window_similarity(x[:, 1:], table)
    case.close("window_similarity", similarity, case["window_similarity"])
    r = int(windows.windows_above(similarity, case.decimal("threshold")).min())
    case.same("r", [r], case["r"])
    how = merge_windows(similarity, table, r)
    case.same("merged_windows", choose.ranked_indices(similarity, r), case["merged_windows"])
    case.same("unmerged_patch", how.kept[:, 1 + r :] - 1, case["unmerged_patch"])
    for given, out, sizes in ((None, "out", "size"), (case["size_in2"], "out_sized2", "size_sized2")):
        merged, size = merge(x, None if given is None else jnp.asarray(given), how)
        case.close(out, merged, case[out])
        case.close(sizes, size, case[sizes])
    case.same("source_group", how.into(x.shape[1]), case["source_group"])


def mustdrop_stage2_filter(case: Case) -> None:
    rows = batched(case["attn_text_rows"])
    share, individual = dual_attention.dual_attention(
        rows, jnp.ones((1, rows.shape[2]), bool), jnp.ones((1, rows.shape[3]), bool)
    )
    for key in case.numbers:
        if key.startswith("thr_"):
            thresholds = float(case[key][0]), float(case[key][1])
            kept = dual_attention.passes(share, individual, thresholds)
            name = key.replace("thr", "keep")
            case.same(name, np.flatnonzero(kept[0]), case[name])


# FastV, FitPrune


def fastv_select(case: Case) -> None:
    row, first, patches = case["attn_last_row"], case.number("sys_length"), case.number("image_token_length")
    kept = case.number("attention_rank") if "attention_rank" in case else fastv.share_kept(patches, case.decimal("r"))
    scores = fastv.last_word(batched(row[:, first : first + patches]))
    case.same("topk_in_score_order", choose.ranked_indices(scores, kept)[0] + first, case["topk_in_score_order"])
    words = np.concatenate([np.arange(first), np.arange(first + patches, row.shape[1])])
    keep = np.sort(np.concatenate([words, np.asarray(choose.top_indices(scores, kept)[0]) + first]))
    case.same("keep_sorted", keep, case["keep_sorted"])
    case.same("position_ids", keep[None], case["position_ids"])
    case.close("hidden_out", case["hidden_in"][:, keep], case["hidden_out"])


def fitprune_select(case: Case) -> None:
    first, patches, goes = (case.number(key) for key in ("prefix", "left_vtoken_num", "delete"))
    picture = slice(first, first + patches)
    attention = jnp.asarray(case["attn"])
    text = attention[:, :, first + patches :, picture]
    cross = fitprune.cross_attention(text, jnp.ones((1, text.shape[2]), bool))
    own = fitprune.self_attention(attention[:, :, picture, picture], jnp.ones((1, patches), bool))
    order = fitprune.lowest_first(fitprune.importance(cross, own))[0, :goes]
    if goes:
        case.close("cross", cross[0], case["cross"])
        case.close("self_", own[0], case["self_"])
        case.same("deleted_in_order", order, case["deleted_in_order"])
    keep = np.ones(attention.shape[-1], bool)
    keep[np.asarray(order) + first] = False
    case.same("keep_mask", keep, case["keep_mask"])


# SparseVLM, arrays


def sparsevlm_cluster(case: Case) -> None:
    noise = jnp.asarray(case["rand_noise_raw"]) * 1e-6
    done = cluster(jnp.asarray(case["x"]), case.number("cluster_num"), noise=noise)
    case.close("score", done.score, case["score"])
    case.same("centres", done.centres, case["centres"])
    case.same("assign", done.group, case["assign"])
    case.close("merged", done.x, case["merged"])


def sparsevlm_rank(case: Case) -> None:
    first, patches, text = (case.number(key) for key in ("v_token_start", "v_token_num", "text_token_start"))
    rows = jnp.asarray(case["attn"])[:, :, text:, first : first + patches]
    rates = jnp.zeros((1, rows.shape[2]), bool).at[0, case["rater_idx"]].set(True)
    scores = sparsevlm.rater_scores(rows, rates)
    case.close("relation", scores, case["relation"])
    everything = jnp.ones((1, patches), bool)
    kept = sparsevlm.rank_budget(rows, rates, everything, case.decimal("scale"), case.decimal("bias"))
    case.same("s_flag", [int(int(kept[0]) != patches)], case["s_flag"])
    case.same("mask", choose.mask_of(choose.top_indices(scores, int(kept[0])), patches), case["mask"])


# CDPruner


def cdpruner_case(case: Case) -> None:
    image = jnp.asarray(case["image_embeds"])
    b, n, d = image.shape
    # The authors scale relevance over the whole batch at once.
    relevance = question_relevance(image.reshape(1, b * n, d), jnp.asarray(case["text_embeds"])).reshape(b, n)
    done = diverse(jnp.asarray(case["projected_features"]), relevance, case.number("k"))
    case.close("relevance", relevance, case["relevance"])
    case.close("kernel_diag", done.quality, case["kernel_diag"])
    if case.number("f64_same_selection"):
        case.same("selected_sorted", jnp.sort(done.order, axis=1), case["selected_sorted"])
        case.same("mask", choose.mask_of(done.order, n), case["mask"])
        case.close("di2s_final", np.maximum(done.gain, -1e30), case["di2s_final"], 1e-3)


CHECKS: dict[str, dict[str, Callable[[Case], None]]] = {
    "tome": {"match": tome_match, "kth": tome_kth, "parse_r": tome_parse_r},
    "mustdrop": {"stage1_pool": mustdrop_stage1_pool, "stage2_filter": mustdrop_stage2_filter},
    "fastv": {"select": fastv_select},
    "fitprune": {"select": fitprune_select},
    "sparsevlm": {"cluster": sparsevlm_cluster, "rank": sparsevlm_rank},
    "cdpruner": {"case": cdpruner_case},
}


def check(path: Path) -> list[tuple[str, bool, str]] | None:
    """The comparisons of a file: name, whether equal, and the difference; None for weights and unknown files."""
    known = {**CHECKS.get(path.parent.name, {}), **MODELS.get(path.parent.name, {})}
    kind = next((kind for kind in sorted(known, key=len, reverse=True) if path.stem.startswith(kind)), None)
    if kind is None or "weights" in path.stem:
        return None
    case = Case(path)
    known[kind](case)
    return case.found


@jax.default_matmul_precision("highest")
def main(options: Arguments) -> int:
    files: dict[str, list[bool]] = defaultdict(list)
    numbers: dict[str, list[bool]] = defaultdict(list)
    weights, unknown, started = 0, [], time.monotonic()
    for path in sorted(options.folder.glob("*/*.npz")):
        name = f"{path.parent.name}/{path.stem}"
        if options.only not in name:
            continue
        try:
            found = check(path)
        except Exception as error:  # a file that stops must not hide the others
            found = [("runs", False, f"{type(error).__name__}: {error}")]
            if options.verbose:
                raise
        if found is None:
            weights += "weights" in path.stem
            unknown += [] if "weights" in path.stem else [name]
            continue
        files[path.parent.name].append(all(equal for _, equal, _ in found))
        numbers[path.parent.name] += [equal for _, equal, _ in found]
        for what, equal, why in found:
            if options.verbose or not equal:
                print(f"{'  ' if equal else '! '}{name}: {what} {why}"[:300])
    print(f"\n{'method':<12} files equal   arrays equal")
    for method in sorted(files):
        good, arrays = files[method], numbers[method]
        print(f"{method:<12} {sum(good):>4} of {len(good):<4}  {sum(arrays):>5} of {len(arrays)}")
    every = [equal for good in files.values() for equal in good]
    print(f"{'all':<12} {sum(every):>4} of {len(every):<4}  in {time.monotonic() - started:.0f} s")
    print(f"{weights} files hold only weights; not compared: {', '.join(unknown) or 'none'}")
    return 0 if all(every) and every else 1


if __name__ == "__main__":
    sys.exit(main(arguments(QUICK)))

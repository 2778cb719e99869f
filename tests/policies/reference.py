"""One-shot scores, budgets and merges restated from their definitions, in NumPy and float64: one sequence, no padding.

Letters: T tokens, H query heads, K kv heads (head h reads kv head h // (H // K)), D width of a head, E of the model.
`q` [T, H, D], `k` and `v` [T, K, D], `p` [H, T, T] causal attention, `wo` [H, D, E]. Keys are rotated, as they are
cached. A score is [K, T], or [1, T] where all heads share one set; higher is kept, inf marks what a method never drops.
What is tested against this file shares no code with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

Array = np.ndarray
Rope = Callable[[Array, Array], Array]


# Words that every definition uses.


def rope(x: Array, at: Array, theta: float = 10000.0) -> Array:
    """x [..., D] turned to positions [...]; channel c turns together with c + D/2 (Su et al. 2021, as in Llama)."""
    d = x.shape[-1]
    angle = np.asarray(at, np.float64)[..., None] / theta ** (np.arange(0, d, 2) / d)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def over_group(x: Array, kv_heads: int) -> Array:
    """[H, ...] -> [K, ...]: mean over the query heads that read one kv head."""
    return x.reshape(kv_heads, -1, *x.shape[1:]).mean(1)


def protect(score: Array, first: int = 0, recent: int = 0) -> Array:
    """The same scores, with the first and the newest tokens out of danger."""
    at = np.arange(score.shape[-1])
    return np.where((at < first) | (at >= score.shape[-1] - recent), np.inf, score)


def top(score: Array, n: int) -> Array:
    """[..., T] -> [..., n]: sorted positions of the n highest; of equals the older stays."""
    return np.sort(np.argsort(-score, axis=-1, kind="stable")[..., :n], -1)


def mask_of(kept: Array, tokens: int) -> Array:
    """[K, n] positions -> [K, T] bool."""
    mask = np.zeros((*kept.shape[:-1], tokens), bool)
    np.put_along_axis(mask, kept, True, -1)
    return mask


def kept_share(tokens: int, ratio: float) -> int:
    """How many of the tokens stay when `ratio` of them go (kvpress 0.5.5 `compute_n_kept`)."""
    return max(1, int(tokens * (1 - ratio)))


def pooled(x: Array, kernel: int, pool: Literal["avg", "max"]) -> Array:
    """[..., T], stride 1, an odd kernel; the mean counts zeros beyond the ends (torch avg_pool1d), the maximum not."""
    half, n = kernel // 2, x.shape[-1]
    ends = [(0, 0)] * (x.ndim - 1) + [(half, half)]
    wide = np.pad(x, ends, constant_values=0.0 if pool == "avg" else -np.inf)
    shifted = np.stack([wide[..., i : i + n] for i in range(kernel)])
    return shifted.mean(0) if pool == "avg" else shifted.max(0)


def cosine(a: Array, b: Array) -> Array:
    """[m, D] and [n, D] -> [m, n]."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    return unit(a) @ unit(b).T


# Scores from attention.


def tova(p: Array) -> Array:
    """[1, T]: mass from the last query, mean over all heads (Oren et al. 2024, `tova_cache.py`; nothing protected)."""
    return p[:, -1].mean(0)[None]


def observed_attention(p: Array, kv_heads: int) -> Array:
    """Mean mass from the queries that see the token (kvpress 0.5.5 `observed_attention_press.py`)."""
    return over_group(p.sum(1) / np.arange(p.shape[-1], 0, -1), kv_heads)


def h2o(p: Array, kv_heads: int, recent: int) -> Array:
    """Summed mass; the newest are kept (Zhang et al. 2023, `h2o_hf/utils_real_drop/modify_llama.py`)."""
    return protect(over_group(p.sum(1), kv_heads), recent=recent)


def snapkv(p: Array, kv_heads: int, window: int, kernel: int, pool: Literal["avg", "max"] = "avg") -> Array:
    """Mean mass from the last `window` queries, pooled per query head over the prefix (Li et al. 2024; kvpress)."""
    prefix = pooled(p[:, -window:, :-window].mean(1), kernel, pool)
    return np.pad(over_group(prefix, kv_heads), ((0, 0), (0, window)), constant_values=np.inf)


def scissorhands(p: Array, kv_heads: int, history: int, recent: int) -> Array:
    """How many of the last `history` queries gave at least 1/(keys they see) (Liu et al. 2023, Alg. 2, from memory)."""
    tokens = p.shape[-1]
    pivotal = p >= 1 / np.arange(1, tokens + 1)[:, None]
    return protect(over_group(pivotal[:, -history:].sum(1), kv_heads), recent=recent)


def nacl(p: Array, kv_heads: int, proxies: int, first: int, recent: int, best: int, noise: Array) -> Array:
    """Mass from the last queries; beyond `best`, a draw without repeats (Chen et al. 2024, `llama_nacl_patch.py`).

    noise [K, T] is standard Gumbel: the highest of score + noise are a draw with probabilities softmax(score).
    """
    score = over_group(p[:, -proxies:].sum(1), kv_heads)
    inside = protect(np.zeros_like(score), first, recent) == 0
    sure = mask_of(top(np.where(inside, score, -np.inf), best), p.shape[-1])
    return np.where(inside & ~sure, score + noise, np.inf)


def rkv(
    q: Array, k: Array, window: int = 8, kernel: int = 7, mix: float = 0.07, threshold: float = 0.5,
) -> Array:  # fmt: skip
    """mix * importance - (1 - mix) * redundancy (Cai et al. 2025, `rkv/compression/r1_kv.py`); q [T, H, D] rotated."""
    tokens, kv_heads, d = k.shape
    group = q.shape[1] // kv_heads
    score = np.full((kv_heads, tokens), np.inf)
    for g in range(kv_heads):
        heads = q[-window:, g * group : (g + 1) * group]
        logits = np.einsum("whd,td->hwt", heads, k[:-window, g]).max(0) / np.sqrt(d)
        importance = pooled(softmax(logits).mean(0), kernel, "max")
        similar = cosine(k[:, g], k[:, g])
        np.fill_diagonal(similar, 0.0)
        for row in similar:  # the most recent token like this one is spared; where none is, the first (as in the code)
            row[np.flatnonzero(row > threshold).max(initial=0)] = 0.0
        redundancy = softmax(similar.mean(0))[:-window]
        score[g, :-window] = mix * importance - (1 - mix) * redundancy
    return score


def kvzip(q_probe: Array, k_probe: Array, k: Array, span: tuple[int, int], first: int = 0) -> Array:
    """[K, span]: the most mass a repeat of tokens span[0]:span[1] gives them (Kim et al. 2025, `attention/score.py`).

    q_probe [M, H, D] and k_probe [M, K, D] rotated: the repeat, which sees the first tokens, the span, and itself.
    """
    probes, kv_heads, d = k_probe.shape
    seen = np.concatenate([k[:first], k[span[0] : span[1]], k_probe])
    before = len(seen) - probes
    group = q_probe.shape[1] // kv_heads
    logits = np.einsum("mhd,shd->hms", q_probe, np.repeat(seen, group, 1)) / np.sqrt(d)
    mass = softmax(np.where(np.tri(probes, len(seen), before, dtype=bool), logits, -np.inf))[..., first:before]
    return mass.reshape(kv_heads, -1, before - first).max(1)


# Scores from keys and values alone, and from expected queries.


def window(tokens: int, first: int = 0) -> Array:
    """[1, T]: the newest stay, and the first (Xiao et al. 2023, StreamingLLM)."""
    return protect(np.arange(tokens, dtype=np.float64)[None], first=first)


def knorm(k: Array) -> Array:
    """Small keys stay (Devoto et al. 2024; kvpress 0.5.5 `knorm_press.py`)."""
    return -np.linalg.norm(k, axis=-1).T


def keydiff(k: Array) -> Array:
    """Keys unlike the mean direction stay (Park et al. 2025; kvpress 0.5.5 `keydiff_press.py`)."""
    anchors = (k / np.linalg.norm(k, axis=-1, keepdims=True)).mean(0)
    return np.stack([-cosine(k[:, g], anchors[None, g])[:, 0] for g in range(k.shape[1])])


def lagkv(k: Array, v: Array, first: int = 4, lag: int = 128, cross: bool = False) -> Array:
    """Spread over channels, scaled by the next chunk's range (Liang et al. 2025; kvpress 0.5.5 `lagkv_press.py`).

    The rank inside the chunk / lag; with `cross` the raw numbers, which compare between chunks.
    """
    tokens, kv_heads, _ = k.shape
    if tokens < first + 2 * lag:
        ramp = (np.arange(tokens) - first) / max(tokens - first, 1)
        return np.tile(protect(ramp, first=first), (kv_heads, 1))
    score = np.full((kv_heads, tokens), np.inf)
    for g in range(kv_heads):
        for at in range(first, tokens - 2 * lag + 1, lag):
            here, after = slice(at, at + lag), slice(at + lag, at + 2 * lag)
            part = np.zeros(lag)
            for x in (k[:, g], v[:, g]):
                low, high = x[after].min(0), x[after].max(0)
                part += softmax(((x[here] - low) / (high - low)).std(-1, ddof=1)) / 2
            score[g, here] = part if cross else part.argsort(kind="stable").argsort() / lag
    return score


def cur(
    k: Array, v: Array, first: int = 4, local: int | None = 16,
    leverage: Literal["key", "value", "kv_avg", "kv_product"] = "kv_product",
) -> Array:  # fmt: skip
    """Squared norms, as shares of their local window (Sengupta et al. 2025, CurDKV; kvpress 0.5.5 `cur_press.py`)."""
    shares = []
    for x in (k, v):
        square = (x**2).sum(-1).T
        tokens = square.shape[-1]
        if local is not None:
            for at in range(0, tokens, local):
                square[:, at : at + local] /= square[:, at : at + local].sum(-1, keepdims=True)
        shares.append(square)
    key, value = shares
    score = {"key": key, "value": value, "kv_avg": (key + value) / 2, "kv_product": key * value}[leverage]
    return protect(score / score.sum(-1, keepdims=True), first=first)


def expected_attention(
    q_pre: Array, k: Array, v: Array, turn: Rope, first: int = 4, future: int = 512,
    covariance: bool = True, value_norm: bool = True, epsilon: float = 0.0,
) -> Array:  # fmt: skip
    """Mass that Gaussian queries at the next positions would give (Devoto et al. 2025; kvpress 0.5.5).

    q_pre [T, H, D] not rotated; `turn(x, at)` rotates. E[exp(q k / sqrt(D))] = exp(mean k / sqrt(D) + k cov k / 2D).
    """
    tokens, heads, d = q_pre.shape
    kv_heads = k.shape[1]
    rest = q_pre[first:]
    mean = rest.mean(0)
    cov = np.einsum("thi,thj->hij", rest - mean, rest - mean) / len(rest)
    ahead = np.mean([turn(np.eye(d), np.full(d, tokens + i)) for i in range(future)], 0)  # x @ ahead is x, turned
    mean, cov = mean @ ahead, ahead.T @ cov @ ahead
    keys = np.repeat(k[first:], heads // kv_heads, 1)
    exponent = np.einsum("hd,thd->ht", mean, keys) / np.sqrt(d)
    if covariance:
        exponent += np.einsum("thi,hij,thj->ht", keys, cov, keys) / (2 * d)
    score = over_group(softmax(exponent), kv_heads)
    if value_norm:
        score = (score + epsilon) * np.linalg.norm(v[first:], axis=-1).T
    return np.pad(score, ((0, 0), (first, 0)), constant_values=np.inf)


# What is made of another method's score.


def chunkkv(score: Array, length: int = 20) -> Array:
    """[1, T]: each token has the mean score of its chunk, summed over heads (Liu et al. 2025; kvpress 0.5.5)."""
    total = score.sum(0)
    pieces = [total[at : at + length] for at in range(0, len(total), length)]
    return np.concatenate([np.full(len(x), x.mean()) for x in pieces])[None]


def chunkkv_keep(score: Array, length: int, ratio: float) -> Array:
    """[1, T] bool: whole chunks, as many as a share of the chunks gives (kvpress 0.5.5 `chunkkv_press.py`)."""
    tokens = score.shape[-1]
    best = top(chunkkv(score, length)[:, ::length], kept_share(-(-tokens // length), ratio))
    return np.repeat(mask_of(best, -(-tokens // length)), length, -1)[:, :tokens]


def chunkwise_keep(score: Array, length: int, ratio: float) -> Array:
    """[K, T] bool: the same share of every chunk (Corallo and Papotti 2024, FINCH; kvpress 0.5.5 `chunk_press.py`)."""
    pieces = [score[:, at : at + length] for at in range(0, score.shape[-1], length)]
    return np.concatenate([mask_of(top(x, kept_share(x.shape[-1], ratio)), x.shape[-1]) for x in pieces], -1)


def critical(score: Array, v: Array, wo: Array, kept: int, share: float = 0.5, epsilon: float = 1e-4) -> Array:
    """`share` of the kept by score, the others by (score + epsilon) * |v Wo|_1 (Feng et al. 2025; kvpress 0.5.5)."""
    tokens, kv_heads, _ = v.shape
    written = np.abs(np.einsum("thd,hde->hte", np.repeat(v, len(wo) // kv_heads, 1), wo)).sum(-1)
    first = max(1, int(kept * share)) if share else 0
    return np.where(mask_of(top(score, first), tokens), np.inf, (score + epsilon) * over_group(written, kv_heads))


def adakv_keep(score: Array, kept: int, alpha: float = 0.2) -> Array:
    """[K, T] bool: K * kept tokens of all heads together, alpha * kept of each for sure (Feng et al. 2024; kvpress)."""
    kv_heads, tokens = score.shape
    safe = max(1, int(kept * alpha)) if alpha else 0
    together = np.where(mask_of(top(score, safe), tokens), np.inf, score).reshape(-1)
    return mask_of(top(together, kv_heads * kept), kv_heads * tokens).reshape(kv_heads, tokens)


# Budgets.


def adakv_budgets(score: Array, kept: int, floor: float = 0.2, normalize: bool = True) -> Array:
    """[K] slots beside the window: a blend of even and adaptive (Feng et al. 2024, `FFY0/AdaKV`).

    score [K, P] of the prefix alone. With `normalize` a head counts by the mass that its own best `kept` hold.
    """
    kv_heads, prefix = score.shape
    if normalize:
        score = score * (np.sort(score, -1)[:, -kept:].sum(-1) / score.sum(-1))[:, None]
    count = mask_of(top(score.reshape(-1), kv_heads * kept), kv_heads * prefix).reshape(kv_heads, prefix).sum(-1)
    return np.round(count * (1 - floor) + int(kept * floor)).astype(int)


def pyramid_budgets_official(layers: int, tokens: int, kept: int, window: int = 8, beta: int = 20) -> list[int]:
    """Slots of each layer, window included; whole steps (Cai et al. 2024, KVCache-Factory `pyramidkv_utils.py`)."""
    if tokens < kept:
        return [tokens] * layers
    if tokens < 2 * (kept - window):
        return [kept] * layers
    low = (kept - window) // beta
    high = 2 * (kept - window) - low
    if high >= tokens - window:
        high = tokens - window
        low = 2 * (kept - window) - high
    return [high - layer * ((high - low) // (layers - 1)) + window for layer in range(layers)]


def pyramid_budgets_even(layers: int, tokens: int, ratio: float, window: int = 64, beta: int = 20) -> list[int]:
    """Slots of each layer, window included; their mean is the share asked for (kvpress 0.5.5 `pyramidkv_press.py`)."""
    mean = tokens * (1 - ratio)
    low = mean / beta
    high = 2 * mean - low
    if high >= tokens - window:
        high = tokens - window
        low = 2 * mean - high
    if not tokens >= high >= low >= window:
        return [max(1, round(mean))] * layers
    return [round(high - layer * (high - low) / max(layers - 1, 1)) for layer in range(layers)]


# What becomes of the dropped, and of the kept keys. kept [K, n]: sorted positions.


def rerotate(k: Array, kept: Array, turn: Rope) -> Array:
    """[n, K, D]: the kept keys as if they stood at 0 .. n - 1 (kvpress 0.5.5 `key_rerotation_press.py`)."""
    moved = np.arange(kept.shape[-1]) - kept
    return np.stack([turn(k[at, g], by) for g, (at, by) in enumerate(zip(kept, moved, strict=True))], 1)


def merging(k: Array, v: Array, kept: Array, threshold: float = 0.0, fraction: float = 1.0) -> Array:
    """[n, K, D] values: a dropped value joins the kept key most like its own (kvpress 0.5.5 `merging_press.py`)."""
    tokens = len(k)
    merged = []
    for g, at in enumerate(kept):
        gone = np.setdiff1d(np.arange(tokens), at)
        values, total, weight = v[at, g], np.zeros((len(at), v.shape[-1])), np.zeros(len(at))
        like = cosine(k[gone, g], k[at, g])
        target, best = like.argmax(-1), like.max(-1)
        passed = best >= threshold
        if fraction < 1 and passed.any():
            passed &= best >= np.quantile(np.where(passed, best, -np.inf), 1 - fraction)
        size = np.linalg.norm(v[:, g], axis=-1)
        for i, j, similarity, ok in zip(gone, target, best, passed, strict=True):
            w = ok * max(similarity, 0.0) * size[i] / (size[i] + size[at[j]])
            total[j] += w * v[i, g]
            weight[j] += w
        merged.append((values + total) / (1 + weight)[:, None])
    return np.stack(merged, 1)


def cam(v: Array, kept: Array, mass: Array, draw: Array, targets: int = 32) -> Array:
    """[n, K, D] values: a dropped value is spread over the next kept ones, by chance (Zhang et al. 2024, `zyxxmu/cam`).

    mass [K, T] is the summed attention; draw [K, T] uniform in [0, 1). Chance: mass over the mean mass of the targets.
    """
    tokens = len(v)
    merged = np.stack([v[at, g] for g, at in enumerate(kept)], 1)
    for g, at in enumerate(kept):
        for i in np.setdiff1d(np.arange(tokens), at):
            after = np.flatnonzero(at > i)[:targets]
            if len(after) and draw[g, i] * mass[g, at[after]].mean() < mass[g, i]:
                merged[after, g] += v[i, g] / len(after)
    return merged


def d2o(
    k: Array, v: Array, kept: Array, threshold: Array | None = None, old: float = 0.5, new: float = 0.5,
    weigh: Literal["code", "paper"] = "code",
) -> tuple[Array, Array]:  # fmt: skip
    """Values [n, K, D] and thresholds [K]: merge what is like enough (Wan et al. 2024, `AIoT-MLSys-Lab/D2O`).

    The threshold is the mean of the best similarities, then a running mean. Keys stay: rotated keys have no mean.
    """
    tokens, kv_heads, _ = k.shape
    merged, limits = [], np.zeros(kv_heads)
    for g, at in enumerate(kept):
        gone = np.setdiff1d(np.arange(tokens), at)
        like = cosine(k[gone, g], k[at, g])
        target, best = like.argmax(-1), like.max(-1)
        limits[g] = best.mean() if threshold is None else old * threshold[g] + new * best.mean()
        values = v[at, g].copy()
        for j in range(len(at)):
            joined = (target == j) & (best >= limits[g])
            if weigh == "code":
                w, own, whole = best[joined], 1.0, 1.0 + joined.sum()
            else:
                w, own = np.exp(best[joined]), np.e
                whole = own + w.sum()
            values[j] = (own * v[at[j], g] + w @ v[gone[joined], g]) / whole
        merged.append(values)
    return np.stack(merged, 1), limits

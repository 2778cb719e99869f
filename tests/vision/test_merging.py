"""Whatever merges conserves the mean over the patches that tokens stand for."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.models.patches import Patches
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.vision import temporal, tome, uniform, windows
from jaxcompress.vision.merging import Merging, followed, grouped, merge, merge_in_place, unmerge

B, N, E = 2, 36, 4


def tokens(seed: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, N, E)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.integers(1, 5, (B, N)).astype(np.float32))


def frames(x: jax.Array) -> jax.Array:
    return x.reshape(B, 4, 9, E)


WAYS = {
    "tome": lambda x: tome.bipartite(x, 7, class_token=True),
    "tome-plain": lambda x: tome.bipartite(x, 18),
    "tome-distilled": lambda x: tome.bipartite(x, 9, class_token=True, distill_token=True),
    "kth": lambda x: tome.every_kth(x, 4),
    "random": lambda x: tome.at_random(x, 20, jax.random.key(0), special=1),
    "windows": lambda x: windows.merge_windows(
        windows.window_similarity(x, windows.window_table(6, 6, 3)), windows.window_table(6, 6, 3), 2, special=0
    ),
    "pool": lambda x: grouped(jnp.broadcast_to(uniform.cell_of(6, 6, 8), (B, N)), 8),
    "frames": lambda x: temporal.merge_frames(temporal.stillness(frames(x)), 13),
}
COMPILED = {
    name: jax.jit(lambda x, size, way=way: (*merge(x, size, way(x)), way(x).into(N))) for name, way in WAYS.items()
}


@pytest.mark.parametrize("name", WAYS)
@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=5)
def test_the_weighted_mean_stays(name: str, seed: int) -> None:
    x, size = tokens(seed)
    out, after, into = (np.asarray(y, np.float64) for y in COMPILED[name](x, size))
    np.testing.assert_allclose(after.sum(1), np.asarray(size).sum(1), rtol=1e-6)
    mean = lambda x, s: (x * s[..., None]).sum(1) / s.sum(1)[:, None]
    np.testing.assert_allclose(mean(out, after), mean(np.asarray(x, np.float64), np.asarray(size)), atol=1e-5)
    for row in range(B):  # and every group on its own, from where its tokens went
        for j in range(out.shape[1]):
            members = into[row] == j
            weight = np.asarray(size)[row, members]
            np.testing.assert_allclose(after[row, j], weight.sum())
            expected = (np.asarray(x)[row, members] * weight[:, None]).sum(0) / weight.sum()
            np.testing.assert_allclose(out[row, j], expected, atol=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_rows_of_a_batch_do_not_know_each_other(name: str) -> None:
    if name in ("pool", "frames", "windows"):
        pytest.skip("elementwise in the batch, tested through whole methods")
    x, _ = tokens(1)
    whole = WAYS[name](x)
    for row in range(B):
        alone = WAYS[name](x[row : row + 1])
        for a, b in zip(whole, alone, strict=True):
            np.testing.assert_array_equal(a[row], b[0])


def test_tome_with_nothing_to_merge_is_the_identity() -> None:
    x, size = tokens(2)
    how = tome.bipartite(x, 0, class_token=True)
    out, after = merge(x, size, how)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(after, size)
    reduce = tome.tome((0, 0), 1)
    patches = Patches(x, size, jnp.broadcast_to(jnp.arange(N), (B, N)))
    heads = x[:, :, None]
    assert reduce(patches, AttentionInputs(heads, heads, jnp.zeros((B, N))), 1) is patches


def test_special_tokens_stay_alone() -> None:
    x = jnp.ones((1, 8, 3))  # everything is alike, so that everything would merge
    for special in ({"class_token": True}, {"class_token": True, "distill_token": True}, {"distill_token": True}):
        how = tome.bipartite(x, 9, **special)
        into = np.asarray(how.into(8))[0]
        for token in (0, 1)[not special.get("class_token", False) :][: sum(special.values())]:
            assert (into == into[token]).sum() == 1


def test_of_equal_pairs_the_earlier_merge() -> None:
    how = tome.bipartite(jnp.ones((1, 8, 3)), 2)
    np.testing.assert_array_equal(how.gone, [[0, 2]])
    np.testing.assert_array_equal(how.kept, [[4, 6, 1, 3, 5, 7]])
    np.testing.assert_array_equal(how.target, [[2, 2]])


def test_unmerged_tokens_are_their_group() -> None:
    x, _ = tokens(3)
    how = tome.bipartite(x, 12)
    out, _ = merge(x, None, how)
    into = np.asarray(how.into(N))
    back = np.asarray(unmerge(out, how, N))
    for row in range(B):
        np.testing.assert_array_equal(back[row], np.asarray(out)[row, into[row]])
    dropped = Merging(jnp.array([[0, 1]]), jnp.array([[2]]), jnp.array([[2]]))
    assert dropped.into(3).tolist() == [[0, 1, -1]]
    np.testing.assert_array_equal(unmerge(jnp.ones((1, 2, 1)), dropped, 3)[0, :, 0], [1, 1, 0])
    assert followed(jnp.array([[1, -1, 0]]), jnp.array([[5, 6]])).tolist() == [[6, -1, 5]]


@pytest.mark.slow
def test_in_place_and_with_fixed_numbers_are_the_same_merge() -> None:
    x, size = tokens(4)
    table = windows.window_table(6, 6, 3)
    patches = Patches(x, size, jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N)))
    similarity = windows.window_similarity(x, table)
    limit = float(np.sort(np.asarray(similarity[0]))[1])
    count = np.asarray(windows.windows_above(similarity, limit))
    above = windows.spatial_above(patches, limit, grid=6, special=0)
    for row in range(B):
        one = jax.tree.map(lambda y, row=row: y[row : row + 1], patches)
        exact = windows.spatial(one, int(count[row]), grid=6, special=0)
        there = np.asarray(above.size)[row] > 0
        np.testing.assert_allclose(np.asarray(above.hidden)[row, there], exact.hidden[0], atol=1e-6)
        np.testing.assert_array_equal(np.asarray(above.size)[row, there], exact.size[0])
    out, after = merge_in_place(x, size, jnp.zeros((B, N), jnp.int32))
    assert (np.asarray(after)[:, 1:] == 0).all()
    np.testing.assert_allclose(after[:, 0], size.sum(1))
    np.testing.assert_allclose(out[:, 0], (x * size[..., None]).sum(1) / size.sum(1)[:, None], atol=1e-5)


def test_bfloat16_keeps_its_type_and_counts_exactly() -> None:
    x, size = tokens(5)
    out, after = merge(x.astype(jnp.bfloat16), size, tome.bipartite(x, 10))
    assert out.dtype == jnp.bfloat16
    assert after.dtype == jnp.float32
    assert float(after.sum()) == float(size.sum())


def numpy_frames(x: np.ndarray, r: int) -> list[list[int]]:
    """Token by token: which original tokens each one that is left stands for."""
    frames, patches, _ = x.shape
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    like = {(f, p): float(unit[f, p] @ unit[f - 1, p]) for f in range(1, frames) for p in range(patches)}
    goes = set(sorted(like, key=lambda at: (-like[at], at))[:r])
    groups: dict[int, list[int]] = {}
    for f in range(frames):
        for p in range(patches):
            start = f
            while (start, p) in goes:
                start -= 1
            groups.setdefault(start * patches + p, []).append(f * patches + p)
    return [groups[first] for first in sorted(groups)]


@pytest.mark.slow
@hypothesis.given(seed=st.integers(0, 1000), r=st.sampled_from([0, 1, 13, 27]))
@hypothesis.settings(max_examples=8)
def test_still_patches_of_a_video_merge_as_restated(seed: int, r: int) -> None:
    x = np.random.default_rng(seed).standard_normal((1, 4, 9, E)).astype(np.float32)
    how = temporal.merge_frames(temporal.stillness(jnp.asarray(x)), r)
    into = np.asarray(how.into(N))[0]
    expected = numpy_frames(x[0], r)
    assert how.kept.shape[1] == N - r == len(expected)
    assert [np.flatnonzero(into == j).tolist() for j in range(N - r)] == expected


def test_a_still_video_becomes_its_first_frame() -> None:
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 1, 9, E)), (1, 5, 9, E))
    how = temporal.merge_frames(temporal.stillness(x), 36)
    out, size = merge(x.reshape(1, 45, E), None, how)
    np.testing.assert_allclose(out[0], x[0, 0], atol=1e-6)
    np.testing.assert_array_equal(size, np.full((1, 9), 5.0))
    with pytest.raises(ValueError, match="37 of 36 patches of later frames"):
        temporal.merge_frames(temporal.stillness(x), 37)


def test_grids_that_windows_do_not_tile() -> None:
    with pytest.raises(
        ValueError, match=r"windows of 3 x 3 do not tile a grid of 14 x 14 patches; give one of \[2, 7, 14\]"
    ):
        windows.window_table(14, 14, 3)
    with pytest.raises(ValueError, match="no window fits"):
        windows.window_table(13, 7, 2)
    with pytest.raises(ValueError, match="37 patches are no square grid"):
        windows.square(37)
    with pytest.raises(ValueError, match="cannot keep 5 of 4 windows"):
        windows.merge_windows(jnp.zeros((1, 4)), windows.window_table(6, 6, 3), 5)

"""A method between a picture and what is written about it, with PyTorch's models of random weights."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llava import io, loaded, pictures, seen, short_prompts

from jaxcompress.generation import decode, init_decode_state
from jaxcompress.generation.visual import ImageFeatures, as_encoded, prefill_encoded, prefill_visual
from jaxcompress.policies import Full
from jaxcompress.policies.names import get_policy
from jaxcompress.vision import encode, slots_per_layer
from jaxcompress.vision.names import get_method

FULL = Full()
ROOM = 24  # words of the longest prompt, and what is written


def written(name: str, method: str, keep: int | None, row: int | None = None, *, wide: bool = False) -> np.ndarray:
    """Eight greedy tokens after prompts with pictures as the model lays them out; of both rows or of one, which may be
    as wide as both."""
    model, how = loaded(name).model, get_method(method, keep)
    one = seen(name, row)
    if wide:
        more = seen(name).visual.shape[1] - one.visual.shape[1]
        one = one._replace(visual=jnp.pad(one.visual, [(0, 0), (0, more), (0, 0)]))
    given = as_encoded(one, how)
    ids = short_prompts(name) if row is None else short_prompts(name)[row : row + 1]
    held = slots_per_layer(model.config, how, ROOM, tokens=given.visual.shape[1])
    progress = init_decode_state(model.decoder, FULL, held, batch=len(ids))
    counts = [sum(counts) for counts in one.counts]
    progress = prefill_encoded(model, ids, given, progress, how, counts=counts)
    return np.asarray(decode(model.decoder, progress, 8)[0])


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_keeping_everything_it_writes_what_pytorch_writes(name: str) -> None:
    """Rows of a batch whose pictures have different numbers of tiles, newlines and all."""
    expected = np.concatenate([io(name)["written_0"], io(name)["written_1"]])
    np.testing.assert_array_equal(written(name, "full", None), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fastv", "dart", "sparsevlm", "fitprune", "mustdrop-prefill"])
def test_rows_of_a_ragged_batch_are_those_alone(method: str) -> None:
    """How many stay between the first cut and the last follows from the longest picture, so that a row alone is as
    wide; methods with one cut do not care."""
    both = written("llava_next", method, 6)
    for row in range(2):
        np.testing.assert_array_equal(written("llava_next", method, 6, row, wide=True)[0], both[row])
        if method in ("fastv", "dart"):
            np.testing.assert_array_equal(written("llava_next", method, 6, row)[0], both[row])


@pytest.mark.slow
def test_patches_make_room_for_what_is_written() -> None:
    model, how = loaded("llava").model, get_method("mustdrop", 6)
    given = encode(model, jnp.asarray(pictures("llava")[0]), how)
    first = short_prompts("llava")[0].index(model.config.image_token)
    policy = how.decode_policy(first, first + given.visual.shape[1])
    held = slots_per_layer(model.config, how, 10)
    progress = init_decode_state(model.decoder, policy, held, batch=2)
    progress = prefill_encoded(model, short_prompts("llava"), given, progress, how)
    tokens, progress = decode(model.decoder, progress, 12)
    assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < model.config.decoder.vocab_size)).all()
    capacities = np.concatenate([np.asarray(part.occupancy()) for part in progress.kv])[:, :, 0]
    assert (capacities <= np.asarray(held)[:, None] + 1).all()  # twelve words were written into ten places


@pytest.mark.parametrize("placement", [pytest.param(None, marks=pytest.mark.slow), "slot"])
def test_a_bounded_state_reads_pictures_by_method_or_by_stage_alike(placement: Any) -> None:
    """`full` as a method and no stages at all, through TOVA."""
    model, how, tova = loaded("llava").model, get_method("full"), get_policy("tova")
    one = seen("llava")
    begin = lambda: init_decode_state(model.decoder, tova, 12, batch=2, placement=placement)
    mine = prefill_encoded(model, short_prompts("llava"), as_encoded(one, how), begin(), how)
    other = prefill_visual(model, short_prompts("llava"), one, begin())
    np.testing.assert_allclose(mine.logits, other.logits, atol=1e-5)
    for part, same in zip(mine.kv, other.kv, strict=True):
        np.testing.assert_array_equal(part.positions, same.positions)
        np.testing.assert_allclose(part.keys, same.keys, atol=1e-5)


def test_wrong_input() -> None:
    model, one = loaded("llava").model, seen("llava")
    with pytest.raises(ValueError, match="pool acts in the tower"):
        as_encoded(one, get_method("pool", 4))
    with pytest.raises(ValueError, match="one picture in each row"):
        as_encoded(ImageFeatures(one.visual, ((8, 8), (16,))), get_method("full"))
    given = as_encoded(one, get_method("full"))
    progress = init_decode_state(model.decoder, FULL, 40, batch=2)
    with pytest.raises(ValueError, match="2 image tokens"):
        prefill_encoded(model, [[63, 63], [63]], given, progress, get_method("full"))


def test_counts_and_places_that_do_not_fit() -> None:
    model, full = loaded("llava").model, get_method("full")
    given = as_encoded(seen("llava"), full)
    m = given.visual.shape[1]
    shuffled = given._replace(place=given.place[:, ::-1])

    def prefill(encoded: Any = given, **how: Any) -> None:
        progress = init_decode_state(model.decoder, FULL, 40, batch=2)
        prefill_encoded(model, short_prompts("llava"), encoded, progress, full, **how)

    for how, says in (
        (dict(counts=[m]), "counts are visual tokens of each of 2 rows"),
        (dict(counts=[m, m - 1]), f"counts has {m - 1} visual tokens for row 1, whose last one is number {m} of {m}"),
        (dict(counts=[m + 1, m]), f"counts has {m + 1} visual tokens for row 0"),
        (dict(counts=[m, m], patches=m), "give counts= or patches=, not both"),
        (dict(patches=m - 1), f"at patch number {m}, of patches={m - 1}"),
        (dict(patches=m, encoded=shuffled), rf"give encoded.in_raster_order\({m}\)"),
    ):
        with pytest.raises(ValueError, match=says):
            prefill(**how)

"""Batches in which rows have pictures, or none has."""

from __future__ import annotations

import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llava import FIXTURES, loaded, pictures, seen, short_prompts

from jaxcompress.checkpoints import load_llava
from jaxcompress.generation import init_decode_state
from jaxcompress.generation.visual import as_encoded, batch_prompts, encode_images, prefill_encoded, prefill_visual
from jaxcompress.inputs.position_warning import PositionWarning
from jaxcompress.policies import TOVA
from jaxcompress.vision import encode, get_method


@pytest.mark.parametrize("name", ["llava", "llava_next"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_without_any_picture(name: str, rows: int) -> None:
    model, config = loaded(name).model, loaded(name).config
    side, channels = config.tower.image_size, config.tower.channels
    for pixels in ([], np.zeros((0, channels, side, side), np.float32)):
        nothing = encode_images(model, pixels, [[]] * rows)
        assert nothing.counts == ((),) * rows
        assert nothing.visual.shape == (rows, 1, config.decoder.hidden_size)


def test_a_prompt_without_pictures_is_text() -> None:
    model = loaded("llava").model
    given = batch_prompts(model, [[5, 6, 7, 8], [9, 10]], encode_images(model, [], [[], []]))
    assert (given.patch == -1).all()
    assert given.positions.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    embedded = model.embed(given.tokens, encode_images(model, [], [[], []]).visual)
    np.testing.assert_array_equal(embedded, model.decoder.embed(given.tokens))


@pytest.mark.parametrize(("known", "placement", "warns"), [(16, None, True), (64, None, False), (16, "slot", False)])
def test_prompts_beyond_the_trained_positions(tmp_path: Path, known: int, placement: Any, warns: bool) -> None:
    shutil.copytree(FIXTURES / "llava", tmp_path / "llava")
    path = tmp_path / "llava" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = known
    path.write_text(json.dumps(config))
    model, prompts, one = load_llava(path.parent, dtype="float32").model, short_prompts("llava"), seen("llava")
    full, fresh = get_method("full"), partial(init_decode_state, model.decoder, TOVA(), 12, batch=2)
    end = max(sum(counts) + len(ids) - 1 for ids, counts in zip(prompts, one.counts, strict=True))
    assert 16 < end < 64
    for read in (
        lambda: prefill_visual(model, prompts, one, fresh(placement=placement)),
        lambda: prefill_encoded(model, prompts, as_encoded(one, full), fresh(placement=placement), full),
    ):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", PositionWarning)
            read()
        told = [str(warning.message) for warning in found if warning.category is PositionWarning]
        assert [text.split(",")[0] for text in told] == [f"positions reach {end}"] * warns


def test_what_cannot_be_looked_at() -> None:
    model, (crops, _) = loaded("llava").model, pictures("llava")
    side = loaded("llava").config.tower.image_size
    wrong: list[tuple[Any, Any, str]] = [
        ([], None, r"no rows were given; a row without pictures has the sizes \[\]"),
        ([], [], "no rows were given"),
        (crops, [[]], "2 crops were given for pictures that have 0"),
        (crops, [(side, side)], r"row 0 has the sizes .*; give a list with \(height, width\) of each picture"),
        (crops, [[side, side]], "row 0 has the sizes"),
        (crops, [[(side, 0), (side, side)]], "a width must be a whole number, at least 1, not 0"),
        (crops[..., 1:], None, r"pixels must be \[crops, 3, \d+, \d+\], not"),
    ]
    for pixels, sizes, message in wrong:
        with pytest.raises(ValueError, match=message):
            encode_images(model, pixels, sizes)
    with pytest.raises(ValueError, match="one picture in each row; use `prefill_visual` for several, or none"):
        as_encoded(encode_images(model, [], [[]]), get_method("full"))
    with pytest.raises(ValueError, match="no images were given"):
        encode(model, jnp.asarray(crops[:0]), get_method("full"))

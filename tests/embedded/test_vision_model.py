"""The vision-language model that ships."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxcompress.checkpoints import load_embedded_vision
from jaxcompress.embedded import vision_folder
from jaxcompress.embedded.drawings import SIDE, draw, words
from jaxcompress.evaluation.visual import Examiner, exam, guessing
from jaxcompress.vision import get_method


def test_it_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in vision_folder().iterdir()}
    assert sum(files.values()) < 4e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(files)
    config = json.loads((vision_folder() / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["dtype"] == "bfloat16"


def test_words_and_pictures_go_in() -> None:
    loaded = load_embedded_vision()
    tokenizer = loaded.tokenizer
    for word in words():
        (token,) = tokenizer.encode(word, add_bos=False).tolist()
        assert tokenizer.decode([token]) == word
    assert tokenizer.encode("<image> how many", add_bos=True).tolist()[:2] == [
        tokenizer.bos_id,
        loaded.config.image_token,
    ]
    drawing = draw(0)
    pixels = loaded.processor(images=[drawing.pixels], return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)
    np.testing.assert_allclose(pixels[0], (drawing.pixels.transpose(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-5)


@pytest.mark.slow
def test_it_answers_far_better_than_by_guessing() -> None:
    loaded = load_embedded_vision()
    tokenizer = loaded.tokenizer
    asked = exam(loaded.model, tokenizer, loaded.processor, pictures=24, each=8)
    got = Examiner(loaded.model, asked, runs=1)(get_method("full"))
    assert guessing(asked) < 0.45
    assert got.accuracy > 0.85
    assert min(got.by_kind.values()) > 0.6


@pytest.mark.slow
def test_in_bfloat16_it_answers_as_well() -> None:
    loaded = load_embedded_vision(dtype="bfloat16")
    tokenizer = loaded.tokenizer
    asked = exam(loaded.model, tokenizer, loaded.processor, pictures=24, each=8)
    assert Examiner(loaded.model, asked, runs=1)(get_method("full")).accuracy > 0.85

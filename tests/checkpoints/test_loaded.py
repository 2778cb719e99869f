"""The one result of loading."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcompress import embedded
from jaxcompress.checkpoints import (
    Loaded,
    load,
    load_embedded,
    load_embedded_vision,
    load_encoder,
    load_llava,
    load_tower,
)
from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.encoder import Encoder
from jaxcompress.models.llava import Llava
from jaxcompress.models.vit import VisionTower
from jaxcompress.policies import Retention

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOWER = FIXTURES / "vision_models" / "clip"
EVERY = {
    "load": (lambda: load(embedded.decoder_folder()), Decoder, Tokenizer),
    "load_embedded": (load_embedded, Decoder, Tokenizer),
    "load_embedded_vision": (load_embedded_vision, Llava, Tokenizer),
    "load_llava": (lambda: load_llava(embedded.vision_folder()), Llava, Tokenizer),
    "load_tower": (lambda: load_tower(TOWER), VisionTower, None),
    "load_encoder": (lambda: load_encoder(embedded.compressor_folder()), Encoder, EncoderTokenizer),
}


@pytest.mark.parametrize("name", EVERY)
def test_everything_that_loads_gives_the_same(name: str) -> None:
    call: Callable[[], Loaded[Any, Any, Any]]
    call, model, tokenizer = EVERY[name]
    loaded = call()
    assert type(loaded) is Loaded
    assert type(loaded.model) is model
    assert loaded.config == loaded.model.config
    assert loaded.settings["model_type"]
    assert (loaded.folder / "config.json").is_file()
    if tokenizer is None:
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist: .* has no tokenizer\. Open"):
            loaded.tokenizer  # noqa: B018
    else:
        assert type(loaded.tokenizer) is tokenizer
        assert loaded.tokenizer is loaded.tokenizer
    assert (loaded.policy is None) == (loaded.saved_policy is None) == (model is not Decoder)
    if model not in (Llava, VisionTower):
        with pytest.raises(FileNotFoundError, match="has no preprocessor_config.json"):
            loaded.processor  # noqa: B018


def test_a_saved_policy() -> None:
    loaded = load_embedded()
    assert isinstance(loaded.policy, Retention)
    assert loaded.saved_policy is not None
    assert loaded.saved_policy.make() == loaded.policy is loaded.policy


def test_repr_is_short() -> None:
    loaded = load_embedded(dtype="bfloat16")
    assert repr(loaded) == f"Loaded(Decoder of 2,164,672 bfloat16 weights, folder={str(loaded.folder)!r})"
    assert not {"tokenizer", "policy", "processor"} & set(vars(loaded))  # nothing was read for it


def test_pickling() -> None:
    loaded = replace(load_embedded(dtype="bfloat16"), settings={"changed": 1})
    before = pickle.dumps(loaded)
    loaded.tokenizer, loaded.policy  # noqa: B018
    assert len(pickle.dumps(loaded)) == len(before)  # what was read for it is left out
    again = pickle.loads(before)
    assert (again.settings, again.folder, again.config) == ({"changed": 1}, loaded.folder, loaded.config)
    assert again.policy == loaded.policy
    for one, other in zip(jax.tree.leaves(again.model), jax.tree.leaves(loaded.model), strict=True):
        np.testing.assert_array_equal(one, other)

"""Settings as arrays of rows give the tokens that a configuration gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.generation import GenerationConfig
from jaxcompress.generation.sampling import row_keys
from jaxcompress.serving.row_sampling import idle_rows, sample_rows, set_row

CONFIGS = (
    GenerationConfig(),
    GenerationConfig(temperature=0.9, top_k=3),
    GenerationConfig(temperature=1.3, top_p=0.8, repetition_penalty=1.2),
    GenerationConfig(temperature=0.7, min_p=0.05),
    GenerationConfig(temperature=1.0),
    GenerationConfig(temperature=2.0, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=0.8),
    GenerationConfig(temperature=0.5, top_k=10**12, top_p=1.0),
)
SAMPLE = jax.jit(sample_rows)


@pytest.mark.parametrize("seed", range(3))
def test_each_row_draws_as_its_configuration_does(seed: int) -> None:
    draw = np.random.default_rng(seed)
    logits = jnp.asarray(draw.normal(0, 2, (len(CONFIGS), 97)), jnp.float32)
    appeared, keys = jnp.asarray(draw.random(logits.shape) < 0.1), row_keys(range(seed, seed + len(CONFIGS)))
    rows = idle_rows(len(CONFIGS))
    for turn in (0, 1):  # the second time, every row has had other settings before
        order = np.roll(np.arange(len(CONFIGS)), turn)
        for row, n in enumerate(order):
            set_row(rows, row, CONFIGS[n], left=1, logprobs=False)
        expected = [
            int(CONFIGS[n].sample(keys[row : row + 1], logits[row : row + 1], appeared[row : row + 1])[0])
            for row, n in enumerate(order)
        ]
        assert SAMPLE(keys, logits, appeared, rows).tolist() == expected


def test_a_row_forgets_the_settings_before_it() -> None:
    rows, fresh = idle_rows(1), idle_rows(1)
    for config in CONFIGS:
        set_row(rows, 0, config, left=1, logprobs=True)
    for one in (rows, fresh):
        set_row(one, 0, GenerationConfig(temperature=0.6), left=2, logprobs=False)
    assert all(np.array_equal(x, y) for x, y in zip(rows, fresh, strict=True))

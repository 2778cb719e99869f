"""The warpers against Hugging Face's numbers, and what must hold for any logits."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcompress.generation.config import GenerationConfig
from jaxcompress.generation.sampling import (
    draw,
    greedy,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    remember,
    row_keys,
)

OFFICIAL = np.load(Path(__file__).parents[1] / "fixtures" / "sampling.npz")
ROWS, VOCABULARY = 3, 24
logits_without_ties = hnp.arrays(np.int32, (ROWS, VOCABULARY), elements=st.integers(-3000, 3000)).map(
    lambda x: (np.argsort(np.argsort(x, axis=-1), axis=-1) * 0.3 + x / 1e4).astype(np.float32)
)
any_logits = hnp.arrays(np.int32, (ROWS, VOCABULARY), elements=st.integers(-8, 8)).map(lambda x: x.astype(np.float32))


def softmax(logits):
    return np.asarray(jax.nn.softmax(jnp.asarray(logits), axis=-1))


def kept(logits):
    return np.isfinite(np.asarray(logits))


class TestOfficial:
    @pytest.mark.parametrize("case", range(len(OFFICIAL["settings"])), ids=lambda i: str(OFFICIAL["settings"][i]))
    def test_equals_the_hugging_face_processors(self, case):
        logits, history = jnp.asarray(OFFICIAL["logits"]), jnp.asarray(OFFICIAL["history"])
        sampler = GenerationConfig(**{"temperature": 1.0} | json.loads(str(OFFICIAL["settings"][case])))
        seen = remember(jnp.zeros(logits.shape, bool), history)
        ours, theirs = np.asarray(sampler.warp(logits, seen)), OFFICIAL["expected"][case]
        np.testing.assert_array_equal(kept(ours), kept(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)

    def test_greedy_applies_the_penalty_alone(self):
        logits = jnp.array([[2.0, 1.9, -1.0]])
        seen = jnp.array([[True, False, False]])
        assert GenerationConfig(temperature=0).sample(None, logits) == 0
        assert GenerationConfig(temperature=0, repetition_penalty=1.5).sample(None, logits, seen) == 1

    def test_a_negative_logit_of_a_seen_token_is_multiplied(self):
        warped = GenerationConfig(1.0, repetition_penalty=2.0).warp(
            jnp.array([[-1.0, 1.0, -1.0]]), jnp.array([[True, True, False]])
        )
        np.testing.assert_array_equal(warped, [[-2.0, 0.5, -1.0]])


class TestRules:
    @given(logits_without_ties, st.integers(1, VOCABULARY + 5))
    def test_top_k_keeps_exactly_k(self, logits, k):
        assert (kept(keep_top_k(jnp.asarray(logits), k)).sum(-1) == min(k, VOCABULARY)).all()

    @given(any_logits, st.floats(0.01, 1.0))
    def test_top_p_keeps_the_fewest_tokens_with_that_mass(self, logits, p):
        mask, probabilities = kept(keep_top_p(jnp.asarray(logits), p)), softmax(logits)
        mass = np.where(mask, probabilities, 0).sum(-1)
        smallest = np.where(mask, probabilities, np.inf).min(-1)
        assert (mass >= p - 1e-5).all()
        assert (mass - smallest <= p + 1e-5).all()
        assert (np.where(mask, 0, probabilities).max(-1) <= smallest).all()

    @given(any_logits, st.floats(0.0, 1.0))
    def test_min_p_is_relative_to_the_best(self, logits, min_p):
        mask, probabilities = kept(keep_min_p(jnp.asarray(logits), min_p)), softmax(logits)
        ratio = probabilities / probabilities.max(-1, keepdims=True)
        assert mask[ratio > min_p + 1e-6].all()
        assert not mask[ratio < min_p - 1e-6].any()

    @given(
        any_logits,
        st.sampled_from(
            [GenerationConfig(1.0, top_k=1), GenerationConfig(1.0, top_p=1e-9), GenerationConfig(1.0, min_p=1.0)]
        ),
    )
    def test_the_best_token_is_never_removed(self, logits, sampler):
        warped = np.asarray(sampler.warp(jnp.asarray(logits)))
        np.testing.assert_array_equal(warped.max(-1), logits.max(-1))

    @given(logits_without_ties, st.permutations(range(VOCABULARY)))
    def test_names_of_tokens_carry_no_meaning(self, logits, order):
        sampler = GenerationConfig(temperature=0.7, top_k=9, top_p=0.8, min_p=0.01, repetition_penalty=1.4)
        seen = jnp.asarray(logits > 3)
        straight = np.asarray(sampler.warp(jnp.asarray(logits), seen))
        renamed = np.asarray(sampler.warp(jnp.asarray(logits[:, order]), seen[:, np.array(order)]))
        np.testing.assert_allclose(renamed, straight[:, order], rtol=1e-6)

    def test_ties_at_the_edge(self):
        equal = jnp.zeros((1, 4))
        np.testing.assert_array_equal(kept(keep_top_k(equal, 2)), [[True] * 4])
        np.testing.assert_array_equal(kept(keep_top_p(equal, 0.5)), [[False, False, True, True]])
        assert greedy(equal) == 0


class TestDrawing:
    @given(st.integers(0, 2**31), any_logits)
    def test_a_batch_is_its_rows(self, seed, logits):
        sampler = GenerationConfig(temperature=0.9, top_p=0.95)
        seeds = [seed, 7, seed + 1]
        together = sampler.sample(row_keys(seeds), jnp.asarray(logits))
        alone = [sampler.sample(row_keys([s]), jnp.asarray(row[None]))[0] for s, row in zip(seeds, logits, strict=True)]
        np.testing.assert_array_equal(together, jnp.stack(alone))

    def test_same_seed_same_token_other_seeds_other_tokens(self):
        flat = jnp.zeros((8, 1000))
        same = GenerationConfig(1.0).sample(row_keys([3] * 8), flat)
        assert len(set(same.tolist())) == 1
        assert len(set(GenerationConfig(1.0).sample(row_keys(range(8)), flat).tolist())) > 4

    @pytest.mark.usefixtures("as_users_call_it")
    def test_seeds_of_64_bits_are_all_different(self):
        small = [0, 7, 2**31, 2**32 - 1]
        np.testing.assert_array_equal(
            jax.random.key_data(row_keys(small)),
            np.stack([jax.random.key_data(jax.random.key(seed)) for seed in small]),
        )
        seeds = [*small, *(seed + 2**32 for seed in small), *(-1 - seed for seed in small), 2**63 - 1, -(2**63)]
        assert len({*map(tuple, jax.random.key_data(row_keys(seeds)).tolist())}) == len(seeds)
        for wrong, says in ((2**63, "must be within"), (-(2**63) - 1, "must be within"), (0.5, "whole number")):
            with pytest.raises(ValueError, match=f"seeds .*{says}"):
                row_keys([wrong])

    def test_removed_tokens_are_never_drawn_and_the_rest_by_probability(self):
        rows = 4000
        logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
        keys = jax.random.split(jax.random.key(0), rows)
        tokens = GenerationConfig(1.0, top_k=2).sample(keys, jnp.tile(logits, (rows, 1)))
        counts = np.bincount(tokens, minlength=4) / rows
        np.testing.assert_allclose(counts, [0, 0, 3 / 7, 4 / 7], atol=0.03)

    def test_is_a_static_argument_under_jit(self):
        @partial(jax.jit, static_argnums=0)
        def step(sampler, keys, logits, seen):
            return sampler.sample(keys, logits, seen)

        logits = jnp.asarray(OFFICIAL["logits"])
        keys, seen = row_keys(range(len(logits))), jnp.zeros(logits.shape, bool)
        for sampler in (GenerationConfig(temperature=0), GenerationConfig(0.8, 20, 0.9, 0.02, 1.2)):
            np.testing.assert_array_equal(step(sampler, keys, logits, seen), sampler.sample(keys, logits, seen))
        assert GenerationConfig(1.0, top_k=3) == GenerationConfig(1.0, top_k=3)
        assert hash(GenerationConfig(1.0, top_k=3)) == hash(GenerationConfig(1.0, top_k=3))
        assert step(GenerationConfig(1.0), keys, logits.astype(jnp.bfloat16), seen).dtype == jnp.int32

    def test_draw_is_the_categorical_of_each_key(self):
        logits = jnp.asarray(OFFICIAL["logits"])
        keys = row_keys(range(len(logits)))
        expected = [jax.random.categorical(jax.random.key(i), row) for i, row in enumerate(logits)]
        np.testing.assert_array_equal(draw(keys, logits), jnp.stack(expected))


class TestMemory:
    def test_remembers_valid_tokens_only(self):
        tokens = jnp.array([[1, 3, 3], [0, 2, 4]])
        valid = jnp.array([[True, True, False], [False, False, True]])
        seen = remember(jnp.zeros((2, 5), bool), tokens, valid)
        np.testing.assert_array_equal(seen, [[0, 1, 0, 1, 0], [0, 0, 0, 0, 1]])
        np.testing.assert_array_equal(remember(seen, tokens)[0], [0, 1, 0, 1, 0])

    def test_padding_is_ignored_whatever_its_number(self):
        seen = remember(jnp.zeros((1, 4), bool), jnp.array([[-1, 9, 2]]), jnp.array([[False, False, True]]))
        np.testing.assert_array_equal(seen, [[0, 0, 1, 0]])


class TestMistakes:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", -0.1),
            ("temperature", float("nan")),
            ("temperature", float("inf")),
            ("top_k", 0),
            ("top_k", -3),
            ("top_p", 0.0),
            ("top_p", 1.1),
            ("min_p", -0.1),
            ("min_p", 1.5),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", -1.0),
        ],
    )
    def test_a_wrong_setting_is_named(self, field, value):
        with pytest.raises(ValueError, match=rf"{field} must be .*, got {value}"):
            GenerationConfig(**{field: value})

    def test_missing_keys_and_missing_memory(self):
        logits = jnp.zeros((2, 4))
        with pytest.raises(ValueError, match="row_keys"):
            GenerationConfig(1.0).sample(None, logits)
        with pytest.raises(ValueError, match="needs `appeared`"):
            GenerationConfig(1.0, repetition_penalty=1.1).sample(row_keys([0, 1]), logits)


class TestExtremes:
    """Settings at the ends of what a float can be, on logits of every size."""

    LOGITS = jnp.array(
        [[1.0, 5.0, -3.0, 5.0001], [-2.0, -1.0, -9.0, -4.0], [3e38, -3e38, 1.0, 0.0], [-jnp.inf, 5, 1, 2]]
    )
    BEST = (3, 1, 0, 1)

    @pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 5e-324])
    @pytest.mark.parametrize(
        "more", [{}, dict(top_p=0.9), dict(top_p=1e-300), dict(top_k=2, min_p=0.1), dict(top_k=10**9)]
    )
    def test_next_to_no_temperature_takes_the_best(self, temperature, more):
        sampler = GenerationConfig(temperature=temperature, **more)
        assert not np.isnan(sampler.warp(self.LOGITS)).any()
        np.testing.assert_array_equal(sampler.sample(row_keys(range(4)), self.LOGITS), self.BEST)

    def test_equally_good_tokens_stay_so(self):
        flat = jnp.zeros((64, 2))
        assert set(GenerationConfig(temperature=1e-40).sample(row_keys(range(64)), flat).tolist()) == {0, 1}

    @pytest.mark.parametrize("penalty", [1e-320, 1e-38, 1e38, 1e308])
    @pytest.mark.parametrize("temperature", [0, 1e-38, 1, 1e300])
    def test_any_penalty_leaves_a_distribution(self, penalty, temperature):
        warped = GenerationConfig(temperature=temperature, repetition_penalty=penalty).warp(
            self.LOGITS, self.LOGITS > -5
        )
        np.testing.assert_allclose(softmax(warped).sum(-1), 1, rtol=1e-6)

"""Perplexity: against plain attention, against its definition, and however the text is cut."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_tokens, tiny_decoder, with_embedding

from jaxcompress.evaluation.perplexity import perplexity
from jaxcompress.evaluation.sweep import capacities, rows_of_text, sweep
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import TOVA, Full, Policy, Window, once
from jaxcompress.training.loss import token_losses

SLOTS, TOTAL = 6, 25
TEXT = random_tokens(2, TOTAL)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return tiny_decoder()


@partial(jax.jit, static_argnames="cuts")
def _losses(model: Decoder, tokens: Any, state: Any, policy: Policy, cuts: tuple[tuple[int, int], ...]) -> Any:
    """Losses [B, T - 1], read in calls of so many tokens, with a selection after every so many."""
    hidden, at = [], 0
    for length, chunk in cuts:
        done = read(model, tokens[:, at : at + length], state, policy, chunk=chunk)
        state, at = done.state, at + length
        hidden.append(done.hidden)
    return token_losses(model.logits(jnp.concatenate(hidden, axis=1)), tokens[:, 1:])


def losses(model: Decoder, policy: Policy, *cuts: tuple[int, int]) -> np.ndarray:
    return np.asarray(_losses(model, TEXT, init_state(model.config, policy, SLOTS, batch=2), policy, cuts))


def test_a_full_cache_is_plain_causal_attention(model: Decoder) -> None:
    expected = np.asarray(token_losses(model(jnp.asarray(TEXT[:, :-1])), jnp.asarray(TEXT[:, 1:])))
    result = perplexity(model, TEXT, Full(), TOTAL - 1, segment=8)
    assert result.nats == pytest.approx(expected.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(np.exp(expected.mean()), rel=1e-4)
    assert result.tokens == expected.size
    assert result.tokens_per_second > 0
    assert result.state_bytes == sum(run.nbytes for run in init_state(model.config, Full(), TOTAL - 1, batch=2))


def test_a_bounded_state_is_worse_or_at_least_different(model: Decoder) -> None:
    assert perplexity(model, TEXT, TOVA(), SLOTS).nats != perplexity(model, TEXT, Full(), TOTAL).nats


def test_streaming_is_token_by_token_however_it_is_cut(model: Decoder) -> None:
    expected = losses(model, TOVA(), (TOTAL - 1, 1)).mean()
    for segment in (1, 7, 512):
        assert perplexity(model, TEXT, TOVA(), SLOTS, segment=segment).nats == pytest.approx(expected, rel=1e-5)


def test_rows_are_independent(model: Decoder) -> None:
    alone = [perplexity(model, TEXT[row : row + 1], TOVA(), SLOTS).nats for row in range(2)]
    assert perplexity(model, TEXT, TOVA(), SLOTS).nats == pytest.approx(np.mean(alone), rel=1e-5)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)


def test_chunked_selects_after_every_chunk(model: Decoder) -> None:
    expected = losses(model, TOVA(), (TOTAL - 1, 4)).mean()
    for segment in (8, 512):
        result = perplexity(model, TEXT, TOVA(), SLOTS, mode="chunked", chunk=4, segment=segment)
        assert result.nats == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(losses(model, TOVA(), (TOTAL - 1, 1)).mean(), rel=1e-4)


def test_oneshot_selects_once_from_the_prompt_and_measures_the_rest(model: Decoder) -> None:
    prompt = 10
    expected = losses(model, TOVA(), (prompt, prompt), (TOTAL - 1 - prompt, 1))
    result = perplexity(model, TEXT, TOVA(), SLOTS, mode="oneshot", prompt=prompt, segment=8)
    assert result.nats == pytest.approx(expected[:, prompt:].mean(), rel=1e-5)
    assert result.tokens == 2 * (TOTAL - 1 - prompt)
    attended = np.asarray(token_losses(model(jnp.asarray(TEXT[:, :-1])), jnp.asarray(TEXT[:, 1:])))
    np.testing.assert_allclose(expected[:, :prompt], attended[:, :prompt], atol=1e-4)


def test_skipped_tokens_are_read_but_not_counted(model: Decoder) -> None:
    expected = losses(model, TOVA(), (TOTAL - 1, 1))
    read_so_far: list[int] = []
    result = perplexity(model, TEXT, TOVA(), SLOTS, skip=10, segment=8, progress=read_so_far.append)
    assert result.nats == pytest.approx(expected[:, 10:].mean(), rel=1e-5)
    assert result.tokens == expected[:, 10:].size
    assert read_so_far == [16, 16, 16]


@pytest.mark.parametrize(
    ("length", "policy", "how", "says"),
    [
        (1, TOVA(), {}, "at least 2 tokens, 1 given"),
        (9, Full(), {}, "8 tokens do not fit into the 6 slots"),
        (9, TOVA(), dict(mode="oneshot"), "oneshot needs a prompt .* not None"),
        (9, TOVA(), dict(mode="oneshot", prompt=9), "oneshot needs a prompt .* not 9"),
        (9, TOVA(), dict(mode="oneshot", prompt=0), "oneshot needs a prompt .* not 0"),
        (9, TOVA(), dict(mode="chunked", chunk=0), "at least 1 token, not chunk=0"),
        (9, TOVA(), dict(skip=8), "8 predictions, the first 8 of them skipped"),
        (9, Window(6), {}, r"window\+6 needs at least 7 slots"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(model: Decoder, length: int, policy: Policy, how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        perplexity(model, TEXT[:, :length], policy, SLOTS, **how)


def test_losses_that_are_not_finite_name_row_and_position(model: Decoder) -> None:
    absent = next(t for t in range(61) if t not in TEXT)
    text = TEXT.copy()
    text[1, 11] = absent
    with pytest.raises(FloatingPointError, match="first in row 1 after the token at position 11"):
        perplexity(with_embedding(model, absent, np.nan), text, TOVA(), SLOTS, segment=8)


def test_what_is_left_out_is_told(model: Decoder) -> None:
    """With a begin token every token of the rows is predicted, and what is left out is what fills no row."""
    text = random_tokens(2 * (TOTAL - 1) + 7)
    rows = rows_of_text(text, TOTAL, bos=0)
    assert perplexity(model, rows, TOVA(), SLOTS, text=len(text)).left_out == 7
    assert perplexity(model, TEXT, TOVA(), SLOTS, skip=10).left_out == 2 * 11
    (row,) = sweep(model, rows, [TOVA()], [SLOTS], text=len(text))
    assert (row.tokens, row.left_out) == (2 * (TOTAL - 1), 7)
    with pytest.raises(ValueError, match="a text of 9 tokens cannot have 48 predictions"):
        perplexity(model, TEXT, TOVA(), SLOTS, text=9)


@pytest.mark.slow
def test_a_capacity_that_nothing_depends_on_is_no_result(model: Decoder) -> None:
    """A policy that selects once keeps what it keeps: it has one capacity in each mode, or none."""
    policy, how = once(TOVA(), 4), dict[str, Any](mode="oneshot", prompt=10)
    (row,) = sweep(model, TEXT, [policy], [4], **how)
    assert row.slots == 4 + TOTAL - 1 - 10 == 18
    for slots in (17, 19, TOTAL):
        with pytest.raises(ValueError, match="give 18 slots"):
            perplexity(model, TEXT, policy, slots, **how)
    (row,) = sweep(model, TEXT, [once(TOVA(), 12)], [4], **how)  # of 10 tokens no 12 are kept
    assert row.slots == TOTAL - 1
    assert capacities(once(TOVA(), 40), [4], TOTAL, 10) == [41]  # its least
    with pytest.raises(ValueError, match="needs mode oneshot"):
        perplexity(model, TEXT, policy, 18)
    with pytest.raises(ValueError, match="needs mode oneshot"):
        sweep(model, TEXT, [policy], [18])


def test_texts_of_many_lengths_share_programs(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    module = sys.modules["jaxcompress.evaluation.perplexity"]
    monkeypatch.setattr(module, "read", lambda *args, **how: traced.append(1) or read(*args, **how))
    for length in range(5, TOTAL):
        perplexity(model, TEXT[:, :length], Window(), SLOTS)
    assert len(traced) == 1


def test_a_sweep_yields_rows_in_order_and_leaves_out_what_is_too_small(model: Decoder) -> None:
    rows = list(sweep(model, TEXT, [Full(), TOVA(), Window(4)], [8, 3], segment=512))
    assert [(row.policy, row.slots) for row in rows] == [("full", TOTAL), ("tova", 3), ("tova", 8), ("window+4", 8)]
    assert {row.mode for row in rows} == {"streaming"}
    assert rows[2].nats == pytest.approx(perplexity(model, TEXT, TOVA(), 8).nats, rel=1e-6)
    assert all(row.perplexity == pytest.approx(np.exp(row.nats)) and row.tokens == 2 * (TOTAL - 1) for row in rows)


def test_a_sweep_yields_each_row_when_it_is_done(model: Decoder) -> None:
    read_so_far: list[int] = []
    rows = sweep(model, TEXT, [TOVA(), Window()], [4], progress=read_so_far.append)
    assert read_so_far == []
    assert next(rows).policy == "tova"
    assert sum(read_so_far) == TEXT.size - 2


def test_rows_of_text() -> None:
    text = np.arange(35)
    np.testing.assert_array_equal(rows_of_text(text, 10), np.arange(30).reshape(3, 10))
    np.testing.assert_array_equal(rows_of_text(text, 10, rows=2)[:, 0], [0, 20])
    assert rows_of_text(text, 10, rows=99).shape == (3, 10)
    begun = rows_of_text(text, 10, bos=-7)
    np.testing.assert_array_equal(begun[:, 0], [-7] * 3)
    np.testing.assert_array_equal(begun[:, 1:], np.arange(27).reshape(3, 9))
    with pytest.raises(ValueError, match="the text has 35 tokens, less than one row of 39; give a smaller context"):
        rows_of_text(text, 40, bos=0)

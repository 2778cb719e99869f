"""The gate for token ids: every function that takes them, with everything that is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCABULARY, tiny_decoder

from jaxcompress.budgets.calibration import attention_spread, retrieval_heads
from jaxcompress.evaluation import Recall, answers, perplexity, sweep
from jaxcompress.evaluation.tracing import trace
from jaxcompress.generation import generate, init_decode_state, prefill, prefill_stream
from jaxcompress.generation.reconstruction import Repeat, kvzip, read_whole, reconstruct
from jaxcompress.inputs.token_ids import check_read, prompt_ids, token_ids, token_rows
from jaxcompress.models.decoder import read
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import TOVA
from jaxcompress.training import bounded_value_and_grad

pytestmark = pytest.mark.usefixtures("as_users_call_it")
MODEL = tiny_decoder()
HOW: dict[str, Any] = dict(policy=TOVA(), slots=4)


def _answers(tokens: Any) -> Any:
    nothing = np.zeros(4, np.int32)
    return answers(MODEL, [Recall(row, nothing > 0, nothing > 0, nothing) for row in tokens], **HOW)


TAKE_ROWS: dict[str, Callable[[Any], Any]] = {
    "trace": lambda x: trace(MODEL, x, **HOW, prompt=2),
    "perplexity": lambda x: perplexity(MODEL, x, **HOW),
    "sweep": lambda x: sweep(MODEL, x, [TOVA()], [4]),
    "answers": _answers,
    "attention_spread": lambda x: attention_spread(MODEL, x),
    "retrieval_heads": lambda x: retrieval_heads(MODEL, x, np.ones((1, 4), bool), sinks=1, recent=1),
}
TAKE_ARRAYS: dict[str, Callable[[Any], Any]] = {
    "read": lambda x: read(MODEL, x, init_state(MODEL.config, TOVA(), 4), TOVA()),
    "model": MODEL,
    "bounded_value_and_grad": lambda x: bounded_value_and_grad(MODEL, x, **HOW, weights=jnp.ones((1, 3)), segment=3),
}
TAKE_PROMPTS: dict[str, Callable[[Any], Any]] = {
    "generate": lambda x: generate(MODEL, x, **HOW, max_new_tokens=1),
    "prefill": lambda x: prefill(MODEL, x, init_decode_state(MODEL, **HOW)),
    "read_on": lambda x: next(prefill_stream(MODEL, x, init_decode_state(MODEL, **HOW))),
    "kvzip": lambda x: kvzip(MODEL, x, **HOW, repeat=Repeat()),
    "read_whole": lambda x: read_whole(MODEL, x),
}
OUTSIDE = (VOCABULARY, 400, 2**31 - 1, 2**31, 2**40, 2**63, 2**70, -1, -100, -(2**31) - 1)


@pytest.mark.parametrize("wrong", OUTSIDE)
def test_ids_outside_the_vocabulary(wrong: int) -> None:
    says = f"token id {wrong} at index 2 is outside the vocabulary 0..{VOCABULARY - 1}"
    for name, take in (TAKE_ROWS | TAKE_PROMPTS).items():
        with pytest.raises(ValueError, match=says):
            print(name, take([[1, 2, wrong, 4]]))
    if abs(wrong) < 2**31:
        for name, take in TAKE_ARRAYS.items():
            for array in (np.array([[1, 2, wrong, 4]], np.int32), jnp.array([[1, 2, wrong, 4]], jnp.int32)):
                with pytest.raises(ValueError, match=says):
                    print(name, take(array))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([[1.0, 2.0, 3.0, 4.0]], "whole numbers, not float64"),
        (np.ones((1, 4), np.float32), "whole numbers, not float32"),
        (np.ones((1, 4), bool), "whole numbers, not bool"),
        ([["a", "b", "c", "d"]], r"not text .*; encode it first: tokenizer\.encode"),
        ([[1, None, 3, 4]], "whole numbers, not .*None"),
    ],
)
def test_what_is_no_id(wrong: Any, says: str) -> None:
    takes = TAKE_ROWS | TAKE_PROMPTS
    for name, take in (takes | TAKE_ARRAYS if isinstance(wrong, np.ndarray) else takes).items():
        with pytest.raises(ValueError, match=says):
            print(name, take(wrong))


def test_shapes() -> None:
    for name, take in (TAKE_ROWS | TAKE_ARRAYS).items():
        if name != "answers":
            with pytest.raises(ValueError, match=r"\[B, T\], not \[4\]; for one text give tokens\[None\]"):
                print(name, take(np.arange(4)))
    for name in ("trace", "perplexity", "attention_spread"):
        with pytest.raises(ValueError, match=r"rows of equal length, not of \[2, 1\]"):
            print(name, TAKE_ROWS[name]([[1, 2], [3]]))
        with pytest.raises(ValueError, match="has no rows"):
            print(name, TAKE_ROWS[name](np.zeros((0, 4), np.int32)))
    for name, take in TAKE_PROMPTS.items():
        with pytest.raises(ValueError, match="sequence"):
            print(name, take([1, 2, 3]))
        if name != "read_on":
            with pytest.raises(ValueError, match=r"prompt 0 must be a sequence .*, not \[1, 2\]"):
                print(name, take([[[1, 2]]]))
            with pytest.raises(ValueError, match="prompt 0 is empty"):
                print(name, take([[]]))
            with pytest.raises(ValueError, match="no prompts were given"):
                print(name, take([]))
            with pytest.raises(ValueError, match="not 'text'"):
                print(name, take("text"))


def test_padding_is_masked_and_not_an_id() -> None:
    """What a mask calls padding is not looked at; a mask of another shape or type is refused."""
    padded, valid = np.array([[1, 2, -100, 9999]]), np.array([[True, True, False, False]])
    np.testing.assert_array_equal(token_rows(padded, VOCABULARY, valid=valid), [[1, 2, 0, 0]])
    check_read(jnp.asarray(padded), VOCABULARY, jnp.asarray(valid))
    for mask in (valid[0], valid.astype(int), valid.tolist()):
        with pytest.raises(ValueError, match=r"`valid` must be bool \[1, 4\]"):
            token_rows(padded, VOCABULARY, valid=mask)
    with pytest.raises(ValueError, match="leave padding out, or mask it"):
        token_ids([1, -100], VOCABULARY, "a text")


def test_under_jit_kind_and_shape_are_checked() -> None:
    state = init_state(MODEL.config, TOVA(), 4)
    shaped = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    trace_read = lambda tokens: jax.eval_shape(lambda x: read(MODEL, x, state, TOVA()).hidden, tokens)
    assert trace_read(shaped(1, 4)).shape == (1, 4, MODEL.config.hidden_size)
    for wrong, says in (
        (shaped(4), r"not \[4\]"), (shaped(1, 4, dtype=jnp.float32), "float32"), (shaped(1, 4, dtype=bool), "bool"),
        (shaped(2, 4), "the state has 1 rows, the tokens 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            trace_read(wrong)


def test_repetitions_are_asked_for_in_known_words() -> None:
    state = init_state(MODEL.config, TOVA(), 4)
    with pytest.raises(ValueError, match="Repeat.later: token id 99"):
        reconstruct(MODEL, [[1, 2, 3]], state, Repeat(later=(99,)))


def test_what_is_taken() -> None:
    for good in ([3, 0], (3, 0), np.array([3, 0], np.uint8), jnp.array([3, 0]), np.array([3, 0], np.uint64)):
        ids = token_ids(good, 4, "x")
        assert ids.dtype == np.int32
        assert ids.tolist() == [3, 0]
    assert token_ids([], 4, "x").tolist() == []
    assert [row.tolist() for row in prompt_ids(np.array([[1, 2], [3, 0]]), 4)] == [[1, 2], [3, 0]]
    assert [row.tolist() for row in prompt_ids([[1], np.array([3, 0])], 4)] == [[1], [3, 0]]

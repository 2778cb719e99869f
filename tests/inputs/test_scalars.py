"""Numbers of every sort, and what is none."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.generation.config import GenerationConfig
from jaxcompress.inputs.scalars import number, share, whole
from jaxcompress.prompt import WORDS, ScoredWords, keep
from jaxcompress.vision import get_method

HALVES: list[Any] = [0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), np.array(0.5), jnp.float32(0.5)]
THREES: list[Any] = [3, np.int8(3), np.uint64(3), np.array(3), jnp.int32(3)]
NO_NUMBERS: list[Any] = [True, np.bool_(True), jnp.array(True), "3", b"3", None, [3], np.array([3]), [], 3j, float]
NOT_FINITE: list[Any] = [float("nan"), float("inf"), -np.inf, np.float32("nan"), jnp.float32("inf")]


@pytest.mark.parametrize("given", [*HALVES, *THREES], ids=repr)
def test_numbers_become_pythons(given: Any) -> None:
    assert (type(number(given, "x")), number(given, "x")) == (float, float(given))


@pytest.mark.parametrize("given", [*NO_NUMBERS, *NOT_FINITE], ids=repr)
def test_what_is_no_number(given: Any) -> None:
    for of in (number, share, whole):
        with pytest.raises(ValueError, match="x must be"):
            of(given, "x")


def test_what_no_float_can_hold() -> None:
    assert whole(10**400, "x") == 10**400
    for of in (number, share):
        with pytest.raises(ValueError, match="x must be"):
            of(10**400, "x")


@pytest.mark.parametrize("given", THREES, ids=repr)
def test_whole_numbers(given: Any) -> None:
    assert (type(whole(given, "x")), whole(given, "x")) == (int, 3)
    assert get_method("fastv", given) is get_method("fastv", 3)
    assert GenerationConfig(1.0, top_k=given) == GenerationConfig(1.0, top_k=3)
    assert hash(GenerationConfig(1.0, top_k=given)) == hash(GenerationConfig(1.0, top_k=3))


@pytest.mark.parametrize("given", [3.0, np.float32(3), np.array(2.5), -1], ids=repr)
def test_what_is_no_whole_number_from_0(given: Any) -> None:
    with pytest.raises(ValueError, match="x must be"):
        whole(given, "x")
    with pytest.raises(ValueError, match="keep"):
        get_method("fastv", given)
    with pytest.raises(ValueError, match="top_k must be an integer >= 1"):
        GenerationConfig(1.0, top_k=given)


@pytest.mark.parametrize("given", HALVES, ids=repr)
def test_shares(given: Any) -> None:
    assert (type(share(given)), share(given)) == (float, 0.5)
    words = ScoredWords("a b c d", np.arange(0, 8, 2)[:, None] + [0, 1], np.arange(4, dtype=np.float32), "test")
    assert keep(words, WORDS, rate=given).text == "c d"
    assert GenerationConfig(temperature=given, top_p=given) == GenerationConfig(0.5, top_p=0.5)


@pytest.mark.parametrize("given", [0, -0.1, 1.0000001, np.float32(2)], ids=repr)
def test_what_is_no_share(given: Any) -> None:
    with pytest.raises(ValueError, match=r"a rate must be in \(0, 1\], the share of tokens that stays, not"):
        share(given)

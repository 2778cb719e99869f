"""Names of dtypes, as people and config.json write them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxcompress.checkpoints._dtype import config_dtype, weights_dtype

HELD = {"n": SimpleNamespace(get_dtype=lambda: "I64"), "w": SimpleNamespace(get_dtype=lambda: "BF16")}


@pytest.mark.parametrize(
    ("asked", "settings", "name"),
    [
        ("bf16", {}, "bfloat16"),
        ("BFloat16", {}, "bfloat16"),
        ("torch.float16", {}, "float16"),
        ("half", {}, "float16"),
        ("fp32", {}, "float32"),
        ("float", {}, "float32"),
        ("auto", {"dtype": "float16"}, "float32"),  # the tests run on a CPU
        ("auto", {"dtype": "float64"}, "float32"),  # without x64 it is the widest type
        (None, {"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        (None, {"dtype": None, "torch_dtype": "float32"}, "float32"),
        (None, {"torch_dtype": "auto"}, "bfloat16"),
        ("Auto", {}, "float32"),
    ],
)
def test_names(asked: Any, settings: dict[str, Any], name: str) -> None:
    assert weights_dtype(asked, settings, HELD, Path("m")).name == name


@pytest.mark.parametrize(
    ("asked", "settings", "says"),
    [
        ("bf15", {}, "dtype must be a floating-point type, not 'bf15'; known: float32"),
        ("int8", {}, "dtype must be a floating-point type, not int8"),
        (None, {"torch_dtype": "int8"}, "m/config.json: torch_dtype must be a floating-point type"),
        (None, {"dtype": ["float32"]}, "m/config.json: dtype must be the name"),
        (None, {"dtype": 5}, "dtype must be the name of a type, such as 'float32', not 5"),
    ],
)
def test_what_is_none(asked: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        weights_dtype(asked, settings, HELD, Path("m"))


def test_a_config_that_says_nothing() -> None:
    assert config_dtype({"torch_dtype": "auto"}) is None

"""What `import jaxcompress as jc` gives."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from types import ModuleType
from typing import Any

import pytest

import jaxcompress as jc
from jaxcompress import budgets, training

ROOMS = {
    "budgets", "checkpoints", "distributed", "embedded", "evaluation", "generation", "models", "policies", "prompt",
    "serving", "training", "vision",
}  # fmt: skip
NAMES = {
    "Chat", "GenerationConfig", "KVState", "Loaded", "Policy", "State", "Tokenizer", "advance", "generate",
    "get_policy", "init_state", "load", "load_embedded", "load_state", "perplexity", "read", "save", "save_state",
    "trace",
}  # fmt: skip


def test_only_what_is_meant_is_listed() -> None:
    assert dir(jc) == sorted({"__version__", *ROOMS, *NAMES})
    assert set(jc.__all__) == ROOMS | NAMES


def test_rooms_are_modules_and_names_are_not() -> None:
    for name in ROOMS:
        assert getattr(jc, name) is sys.modules[f"jaxcompress.{name}"]
    assert not [name for name in NAMES if isinstance(getattr(jc, name), ModuleType)]


def test_rooms_are_there_at_once_and_loaded_when_used() -> None:
    code = """
import sys
import jaxcompress as jc

assert not [name for name in sys.modules if name.startswith("jaxcompress.") and name != "jaxcompress._versions"]
assert jc.policies is sys.modules["jaxcompress.policies"]
assert "jaxcompress.generation" not in sys.modules
jc.budgets.pyramid(16, 4), jc.state.KVState, jc.vision.get_method, jc.training.Batch, jc.evaluation.survival
jc.prompt.Compressor, jc.checkpoints.load_llava, jc.models.Decoder, jc.embedded.decoder_folder, jc.recurrence.advance
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", [jc, budgets, training])
def test_every_public_name_can_be_had(module: Any) -> None:
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_types_ship() -> None:
    assert files("jaxcompress").joinpath("py.typed").is_file()

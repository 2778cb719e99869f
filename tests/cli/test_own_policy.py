"""A policy from a user's own file, by FILE.py:NAME, in the commands that take one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import TEXT, folder, model, run, text, tokenizer  # noqa: F401  fixtures

from jaxcompress.evaluation.board import points
from jaxcompress.evaluation.results import read_rows
from jaxcompress.evaluation.tracing import trace
from jaxcompress.generation import Tokenizer
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.names import get_policy

# ruff: noqa: F811  pytest's fixtures

MINE = """
import jax.numpy as jnp

from jaxcompress.policies import Policy, policy


@policy
class Quiet(Policy):
    scope = "kv_head"

    def score(self, stats, held):
        return -jnp.linalg.norm(held.keys.astype(jnp.float32), axis=-1)
"""


@pytest.fixture
def quiet(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return f"{path}:Quiet"


def test_commands_take_it(
    run: Any, quiet: str, text: Path, tmp_path: Path, model: Decoder, tokenizer: Tokenizer
) -> None:
    out = tmp_path / "trace.npz"
    how = ("--file", text, "--limit", 12, "--prompt-tokens", 6, "--policy", quiet, "--slots", 4, "--out", out)
    assert run("trace", *how).code == 0
    same = trace(model, tokenizer.encode(TEXT)[None, :12], get_policy(quiet), 4, prompt=6, mode="streaming")
    with np.load(out) as file:
        np.testing.assert_array_equal(file["death"], same.death)
    ran = run("generate", "--prompt", TEXT, "--policy", quiet, "--slots", 6, "--max-new-tokens", 2)
    assert (ran.code, ran.err) == (0, "")


def test_a_file_that_changed_is_measured_again(run: Any, quiet: str, text: Path, tmp_path: Path) -> None:
    path, out = Path(quiet.rpartition(":")[0]), tmp_path / "rows.jsonl"
    how = ("--file", text, "--context", 16, "--rows", 1, "--policies", "tova", quiet, "--slots", 4, "--out", out)
    assert run("perplexity", *how).code == 0
    path.write_text(MINE.replace("return -jnp", "return jnp"))
    ran = run("perplexity", *how)
    assert (ran.code, "1 cells were in" in ran.err) == (0, True)
    tova, first, second = read_rows(out)
    assert "policy_hash" not in tova.cell.settings
    assert first.cell.settings["policy_hash"] != second.cell.settings["policy_hash"]
    found = points([tova, first, second])
    assert len({point.comparison for point in found}) == 1
    assert len({point.policy for point in found}) == 3


@pytest.mark.slow
def test_a_model_is_trained_with_it(run: Any, quiet: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT * 8, encoding="utf-8")
    path = Path(quiet.rpartition(":")[0])
    small = ("--length", 16, "--rows", 2, "--steps", 1, "--segment", 8, "--slots", 6, "--held-out", 0)
    out = tmp_path / "run"
    ran = run("train", "--data", tmp_path / "book.txt", "--out", out, "--policy", quiet, *small)
    assert (ran.code, ran.err) == (0, "")
    assert json.loads((out / "model" / "policy.json").read_text())["policy"] == quiet
    path.write_text(MINE.replace("return -jnp", "return jnp"))
    ran = run("train", "--out", out, "--resume", "--steps", 2)
    assert (ran.code, f"the code of --policy {quiet} has changed" in ran.err) == (2, True)


def test_a_file_that_is_not_there(run: Any, tmp_path: Path) -> None:
    ran = run("generate", "--prompt", "a", "--policy", f"{tmp_path}/none.py:Quiet")
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert "there is no file" in ran.err

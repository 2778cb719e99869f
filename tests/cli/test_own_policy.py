"""A policy from a user's own file, by FILE.py:NAME, in every command that takes a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import TEXT, folder, model, run, text, tokenizer  # noqa: F401  fixtures

from jaxcompress.cli.own_policy import own_policy
from jaxcompress.evaluation.tracing import trace
from jaxcompress.generation import Tokenizer
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.names import get_policy

# ruff: noqa: F811  pytest's fixtures

MINE = """
from __future__ import annotations

import jax.numpy as jnp

from jaxcompress.policies import TOVA, Policy, policy


@policy
class Quiet(Policy):
    scope = "kv_head"

    def score(self, stats, held):
        return -jnp.linalg.norm(held.keys.astype(jnp.float32), axis=-1)


@policy
class Wants(Policy):
    needed: int

    def score(self, stats, held):
        return held.positions


layered = TOVA("layer")
number = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_it_is_the_policy_of_the_file(mine: Path) -> None:
    assert own_policy("tova") is None
    assert own_policy(f"{mine}:layered") == get_policy("tova")
    assert own_policy(f"{mine}:layered/recent4") == get_policy("tova/recent4")
    quiet = own_policy(f"{mine}:Quiet")
    assert quiet is not None
    assert quiet == own_policy(f"{mine}:Quiet")  # the file is run once
    assert quiet.scope == "kv_head"


def test_commands_take_it(
    run: Any, mine: Path, text: Path, tmp_path: Path, model: Decoder, tokenizer: Tokenizer
) -> None:
    out, name = tmp_path / "trace.npz", f"{mine}:Quiet"
    how = ("--file", text, "--limit", 12, "--prompt-tokens", 6, "--policy", name, "--slots", 4, "--out", out)
    assert run("trace", *how).code == 0
    policy = own_policy(name)
    assert policy is not None
    same = trace(model, tokenizer.encode(TEXT)[None, :12], policy, 4, prompt=6, mode="streaming")
    with np.load(out) as file:
        np.testing.assert_array_equal(file["death"], same.death)
    ran = run("generate", "--prompt", TEXT, "--policy", name, "--slots", 6, "--max-new-tokens", 2)
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.slow
def test_a_model_is_trained_with_it(run: Any, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT * 8, encoding="utf-8")
    small = ("--length", 16, "--rows", 2, "--steps", 1, "--segment", 8, "--slots", 6, "--held-out", 0)
    out = tmp_path / "run"
    ran = run("train", "--data", tmp_path / "book.txt", "--out", out, "--policy", f"{mine}:Quiet", *small)
    assert (ran.code, ran.err) == (0, "")
    assert json.loads((out / "model" / "policy.json").read_text())["policy"] == f"{mine}:Quiet"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("{mine}:Loud", "'Loud' in {mine} must be a policy or a class of policies; there is no such name"),
        ("{mine}:number", "it is a int"),
        ("{mine}:Wants", "needs settings"),
        ("{mine}:", "there is no such name"),
        ("{mine}:Quiet/recentX", "unknown modifier"),
        ("{tmp}/none.py:Quiet", "there is no file {tmp}/none.py"),
        ("{tmp}/broken.py:Quiet", "broken.py fails: ZeroDivisionError: division by zero"),
        ("{tmp}/cut.py:Quiet", "cut.py fails: SyntaxError"),
    ],
)
def test_what_is_wrong(run: Any, mine: Path, tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "cut.py").write_text("class")
    names = dict(mine=mine, tmp=tmp_path)
    ran = run("generate", "--prompt", "a", "--policy", name.format(**names))
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert says.format(**names) in ran.err

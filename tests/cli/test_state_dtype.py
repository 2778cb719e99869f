"""--state-dtype: what keys and values are stored in, in every command that makes a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from test_cli import SENTENCE, TEXT, folder, model, run, text, tokenizer  # noqa: F401  fixtures

from jaxcompress.cli.compare import Compare
from jaxcompress.cli.flags import StateDtype
from jaxcompress.evaluation.compare import Compared
from jaxcompress.evaluation.results import read_rows
from jaxcompress.evaluation.tracing import trace
from jaxcompress.generation import Tokenizer, generate
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import TOVA
from jaxcompress.state.storage import DTYPES

# ruff: noqa: F811  pytest's fixtures

COMMANDS = {
    "generate": ("--prompt", "a"),
    "perplexity": (),
    "trace": ("--prompt-tokens", 3, "--out", "x.npz", "--file", "-"),
    "retention": ("--out", "x.html"),
    "compare": (),
}


def test_the_parser_knows_what_the_library_knows() -> None:
    assert get_args(StateDtype) == DTYPES


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_names_are_refused_at_once(command: str, run: Any, tmp_path: Path) -> None:
    """Before there is a model."""
    ran = run(command, *COMMANDS[command], "--state-dtype", "int3", model=tmp_path / "nothing")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "--state-dtype" in ran.err
    assert all(name in ran.err for name in DTYPES)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help", model=None)
    assert f"--state-dtype{{None,{','.join(DTYPES)}}}" in "".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.slow
def test_generate(run: Any, model: Decoder, tokenizer: Tokenizer) -> None:
    how = ("--prompt", SENTENCE, "--policy", "tova", "--slots", 6, "--max-new-tokens", 10, "--json")
    ids = [tokenizer.encode(SENTENCE)]
    tokens = np.concatenate(
        list(generate(model, ids, TOVA(), 6, max_new_tokens=10, stream_every=8, dtype="int4")), axis=1
    )
    (told,) = run("generate", *how, "--state-dtype", "int4").json
    assert told["text"] == tokenizer.decode(tokens[0])
    assert told["text"] != run("generate", *how).json[0]["text"]  # of sharp random weights


def test_perplexity_reports_the_bytes_of_codes_and_scales(run: Any, text: Path, tmp_path: Path, model: Decoder) -> None:
    how = ("--file", text, "--context", 16, "--rows", 2, "--policies", "window", "--slots", 4, "--json")
    told = {name: run("perplexity", *how, "--state-dtype", name).json for name in ("int8", "int4")}
    told["float32"] = run("perplexity", *how, "--out", tmp_path / "rows.jsonl").json  # as the weights
    assert [row.figure.details for row in read_rows(tmp_path / "rows.jsonl")] == told["float32"]["table"]
    config = model.config
    numbers = 2 * config.num_layers * 2 * config.num_kv_heads * 5  # vectors: K and V, layers, rows, heads, slots
    rest = 4 * (config.num_layers * 2 * 5 + 2 + config.num_layers)  # positions, seen, layer
    width = config.head_dim
    for name, vector in (("float32", 4 * width), ("int8", width + 2), ("int4", width // 2 + 2)):
        assert told[name]["state_dtype"] == name
        (row,) = told[name]["table"]
        assert row["state_bytes"] == numbers * vector + rest
        assert row["state_bytes"] == sum(part.nbytes for part in init_state(config, TOVA(), 4, batch=2, dtype=name)) - (
            4 * config.num_layers * 2 * 5  # TOVA's own numbers
        )
    (exact,), (int8,), (int4,) = (told[name]["table"] for name in ("float32", "int8", "int4"))
    assert 0 < abs(int8["nats"] - exact["nats"]) < 0.1
    assert int8["nats"] != int4["nats"]


@pytest.mark.slow
def test_trace(run: Any, text: Path, tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    out = tmp_path / "trace.npz"
    how = (
        "--file",
        text,
        "--limit",
        12,
        "--prompt-tokens",
        6,
        "--policy",
        "tova",
        "--slots",
        4,
        "--mode",
        "oneshot",
        "--out",
        out,
    )
    assert run("trace", *how, "--state-dtype", "int4").code == 0
    ids = tokenizer.encode(TEXT)[None, :12]
    same, exact = (trace(model, ids, TOVA(), 4, prompt=6, dtype=name) for name in ("int4", None))
    with np.load(out) as file:
        np.testing.assert_array_equal(file["positions"], same.positions)
        np.testing.assert_array_equal(file["death"], same.death)
        np.testing.assert_allclose(file["logits"], same.logits, atol=1e-4)
    assert np.abs(same.logits - exact.logits).max() > 1e-3


def test_retention(run: Any, text: Path, tmp_path: Path) -> None:
    how = ("--file", text, "--out", tmp_path / "page.html", "--slots", 6, "--limit", 24, "--json")
    assert run("retention", *how, "--state-dtype", "int8").json["tokens"] == 24


@pytest.mark.slow
def test_compare(monkeypatch: pytest.MonkeyPatch, run: Any, tmp_path: Path) -> None:
    """It gets there, and into the rows; what it does with it is tested where it is computed."""
    given, out = [], tmp_path / "rows.jsonl"

    def compared(*arguments: Any, placement: Any, dtype: Any) -> Compared:
        given.append((placement, dtype))
        return Compared("tova", arguments[3], 3.0, 0.1, 0.5, 0.2, None, None, None, None, 64, 96, 1.0, 10.0)

    monkeypatch.setattr("jaxcompress.evaluation.compare.compared", compared)
    how = ("--context", 512, "--rows", 1, "--seeds", 2, "--policies", "tova", "--fractions", 4, 8, "--out", out)
    for _ in range(2):
        ran = run("compare", *how, "--state-dtype", "int4", "--placement", "slot", model=None)
        assert ran.count("3.000 ±0.100") == 2
    assert given == [("slot", "int4")] * 2  # the second run found its lines in the file
    rows = [row for row in read_rows(out) if row.cell.slots == 64]
    assert [(row.figure.metric, row.figure.value, row.figure.spread) for row in rows] == [
        ("nats per token", 3.0, 0.1), ("recall %", 50.0, 20.0),
    ]  # fmt: skip
    assert {row.cell.dtype for row in rows} == {"float32/int4"}
    assert Compare().state_dtype is None

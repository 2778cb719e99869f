"""jaxcompress retention: what it prints, and that the page and the numbers are those of the trace."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import TEXT, folder, model, run, text, tokenizer  # noqa: F401  fixtures

from jaxcompress.evaluation.lifetimes import AFTER, overlap, survival_by_kind, token_kinds, token_texts
from jaxcompress.evaluation.tracing import trace
from jaxcompress.generation import Tokenizer
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.names import get_policy

# ruff: noqa: F811  pytest's fixtures

SMALL = ("--slots", 6, "--limit", 24)


def death(model: Decoder, tokenizer: Tokenizer, policy: str = "tova", **how: Any) -> np.ndarray:
    ids = tokenizer.encode(TEXT)[None, :24]
    return trace(model, ids, get_policy(policy), 6, **(how or dict(prompt=24, mode="streaming"))).death[:, 0]


def embedded_deaths(page: Path) -> np.ndarray:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    data = json.loads(found[1])
    shape = len(data["layers"]), len(data["heads"]), data["tokens"]
    return np.frombuffer(base64.b64decode(data["death"]), "<u2").reshape(shape)


def test_page_and_table(run: Any, text: Path, tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    out, figure = tmp_path / "page.html", tmp_path / "heat.png"
    ran = run("retention", "--file", text, "--out", out, "--figure", figure, *SMALL)
    assert ran.code == 0
    expected = death(model, tokenizer)
    np.testing.assert_array_equal(embedded_deaths(out), expected)
    every = len(tokenizer.encode(TEXT))
    lines = ran.splitlines()
    assert lines[0] == f"tova, 6 slots, 24 of {every} tokens of {text}; 2 layers, 1 set of slots in each"
    texts = token_texts(tokenizer, tokenizer.encode(TEXT)[:24])
    rows = survival_by_kind(expected, token_kinds(texts))
    assert len(lines[3:-3]) == len(rows)
    for line, row in zip(lines[3:-3], rows, strict=True):
        shares = ["-" if share != share else f"{share:.1%}" for share in (*row.after, row.end)]
        assert re.split(r"\s{2,}", line) == [row.kind, str(row.tokens), *shares]
    assert lines[-1] == f"{out} shows tova, and {figure}"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "What tova keeps in 6 slots" in out.read_text(encoding="utf-8")


def test_json_with_another_policy(run: Any, text: Path, tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    how = ("--file", text, "--out", tmp_path / "page.html", *SMALL)
    told = run("retention", *how, "--compare", "h2o", "--json").json
    ours, theirs = death(model, tokenizer), death(model, tokenizer, "h2o")
    same = overlap(ours, theirs)
    assert (told["policy"], told["slots"], told["tokens"], told["mode"]) == ("tova", 6, 24, "streaming")
    assert [tuple(row["after"]) for row in told["kinds"]] == [tuple(map(str, AFTER))] * len(told["kinds"])
    assert told["overlap"]["policy"] == "h2o"
    for name, expected in zip(("jaccard", "shared"), same.means(), strict=True):
        np.testing.assert_allclose(told["overlap"][name], expected)
    assert told["overlap"]["since"] == same.since.tolist()
    plain = run("retention", *how, "--compare", "h2o")
    assert "What tova and h2o both hold" in plain
    last = plain.splitlines()[-3].split()
    assert last[:3] == ["1", str(same.since[1]), f"{same.means()[0][1]:.1%}"]
    assert run("retention", *how, "--json").json["overlap"] is None


def test_half_a_text_read_at_once(run: Any, text: Path, tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    out = tmp_path / "page.html"
    ran = run("retention", "--file", text, "--out", out, *SMALL, "--mode", "oneshot", "--json")
    assert ran.json["prompt"] == 12
    np.testing.assert_array_equal(embedded_deaths(out), death(model, tokenizer, mode="oneshot", prompt=12))
    assert "oneshot, the first 12 tokens" in out.read_text(encoding="utf-8")


def test_standard_input_and_a_capacity_per_layer(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    ran = run("retention", "--file", "-", "--out", tmp_path / "page.html", "--limit", 24, "--slots", 6, 6)
    assert ran.startswith("tova, 6, 6 slots, 24 of ")
    assert "tokens of standard input" in ran


def test_without_a_text_it_reads_what_is_held_out(run: Any, tmp_path: Path) -> None:
    told = run("retention", "--out", tmp_path / "page.html", *SMALL, "--json").json
    assert told["text"].startswith("topics/")
    assert told["tokens"] == 24 < told["of"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--policy", "tovaa"), "unknown policy 'tovaa'"),
        (("--compare", "tovaa"), "unknown policy 'tovaa'"),
        (("--compare", "full"), "do not fit into the 6 slots"),
        (("--limit", 0), "--limit must be at least 1, not 0"),
        (("--prompt-tokens", 3), "--prompt-tokens is for --mode chunked and oneshot"),
        (("--mode", "oneshot", "--prompt-tokens", 0), "prompt must be between 1 and the 24 tokens given, not 0"),
        (("--mode", "oneshot", "--prompt-tokens", 25), "not 25"),
        (("--slots", 1, 2, 3), "slots has 3 entries, the model has 2 layers"),
        (("--file", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_is_wrong(run: Any, text: Path, tmp_path: Path, arguments: tuple[Any, ...], says: str) -> None:
    out = tmp_path / "page.html"
    ran = run("retention", "--out", out, "--file", text, *SMALL, *arguments)
    assert ran.code == 2
    assert ran.err.startswith("jaxcompress: ")
    assert says in ran.err
    assert not out.exists()


@pytest.mark.parametrize(("data", "says"), [(b"caf\xe9", "0xe9 at offset 3"), (b"", "is empty")])
def test_files(run: Any, tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "wrong.txt"
    path.write_bytes(data)
    ran = run("retention", "--out", tmp_path / "page.html", "--file", path)
    assert ran.code == 2
    assert says in ran.err

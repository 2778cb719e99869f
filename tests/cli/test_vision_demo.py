"""jaxcompress vision-demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxcompress.cli import main


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = "--pictures 2 --drawn 1 --tokens 16 9 --methods grid tome fastv"
    assert main(["vision-demo", "--out", str(tmp_path), *how.split()]) == 4
    printed, told = capsys.readouterr()
    table = json.loads((tmp_path / "vision_demo.json").read_text())
    assert {row["budget"] for row in table} == {144, 16, 9}
    assert table[0]["method"] == "full"
    assert "3 layers cannot merge 144 patches into 16; keep 18 or more" in told
    assert "2 of 7 measurements failed" in told
    for row in table[1:]:
        assert row["flops"] < table[0]["flops"]
        assert row["kv_bytes"] < table[0]["kv_bytes"]
    assert all(row["method"] in printed for row in table)
    assert (tmp_path / "picture0.png").exists()
    assert not (tmp_path / "picture1.png").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--tokens", "145"], "--tokens: 145 of 144 patches cannot be kept; give numbers from 1 to 144"),
        (["--tokens", "0"], "tokens: 0 of 144"),
        (["--methods", "nearest"], "unknown method 'nearest'; known: full, random"),
        (["--pictures", "0"], "--pictures must be at least 1, not 0"),
    ],
)
def test_bad_input(given: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vision-demo", "--out", str(tmp_path), *given]) == 2
    assert says in capsys.readouterr().err

"""Files of rows only grow, sweeps go on where they stopped, and failures stay where they happen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxcompress.evaluation.provenance import PACKAGE, Provenance, code_version, provenance
from jaxcompress.evaluation.results import Cell, Figure, append, read_rows, run_cells

MADE = Provenance(version="0.1.0", code="abc", device="cpu", command="jaxcompress ruler")


def cell(policy: str = "tova", seed: int = 0, **changes: object) -> Cell:
    given = dict(
        experiment="ruler", task="vt", model="m", model_hash="0f", policy=policy, slots=64, context=1024,
        dtype="float32", seed=seed, settings=dict(question="known", placement=None),
    )  # fmt: skip
    return Cell(**(given | changes))  # type: ignore[arg-type]


def figure(value: float = 50.0) -> Figure:
    return Figure(
        metric="score", value=value, tokens=100, samples=4, state_bytes=1 << 20, details=[dict(answer=["é\n<"])]
    )


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    many = [cell(), cell(slots=(3, 4)), cell("full", settings={})]
    done = run_cells(many, lambda one: [figure(), figure(1.0)], MADE, file)
    assert (done.measured, done.found, done.failed) == (3, 0, {})
    rows = read_rows(file)
    assert [row.cell for row in rows] == [one for one in many for _ in range(2)]
    assert {row.made for row in rows} == {MADE}
    assert [row.figure.value for row in rows] == [50.0, 1.0] * 3
    assert rows[0].figure.details == [{"answer": ["é\n<"]}]
    assert file.read_text(encoding="utf-8").count("\n") == 6


def test_a_sweep_goes_on_and_nothing_changes(tmp_path: Path) -> None:
    file, asked = tmp_path / "rows.jsonl", []

    def measure(one: Cell) -> list[Figure]:
        asked.append(one)
        if one.policy == "broken":
            raise RuntimeError("it broke")
        return [figure(float("nan") if one.policy == "nan" else float(one.seed))]

    first = [cell(), cell("broken"), cell("nan"), cell("tova", 1)]
    shown: list[float] = []
    done = run_cells(first, measure, MADE, file, shown=lambda rows: shown.append(rows[0].figure.value))
    assert (done.measured, done.found) == (2, 0)
    assert list(done.failed) == ["vt, broken, 64 slots, seed 0", "vt, nan, 64 slots, seed 0"]
    assert "it broke" in done.failed["vt, broken, 64 slots, seed 0"]
    before = file.read_bytes()
    asked.clear()
    again = run_cells([*first, cell("h2o")], measure, replace(MADE, code="later"), file)
    assert [one.policy for one in asked] == ["broken", "nan", "h2o"]
    assert (again.measured, again.found, len(again.failed)) == (1, 2, 2)
    assert file.read_bytes().startswith(before)
    assert [row.made.code for row in read_rows(file)] == ["abc", "abc", "later"]
    assert shown == [0, 1]


def test_an_interruption_passes_through_and_keeps_what_is_done(tmp_path: Path) -> None:
    def measure(one: Cell) -> list[Figure]:
        if one.seed == 2:
            raise KeyboardInterrupt
        return [figure()]

    file = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_cells([cell(seed=seed) for seed in range(4)], measure, MADE, file)
    assert [row.cell.seed for row in read_rows(file)] == [0, 1]


def test_the_name_of_a_model_is_not_what_it_is() -> None:
    assert cell(model="here").key == cell(model="there").key
    others = (dict(model_hash="1"), dict(slots=65), dict(seed=1), dict(dtype="int8"), dict(settings={}))
    keys = {cell(**changes).key for changes in others}  # type: ignore[arg-type]
    assert len(keys | {cell().key}) == 6


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object, not a list"),
        ('{"experiment": "ruler"}', "is not a row of results: missing"),
        (dict(value="high"), "value must be a number, not 'high'"),
        (dict(slots="64"), "slots must be a number or a list of numbers, not '64'"),
        (dict(slots=[4, None]), "slots must be a number or a list of numbers"),
        (dict(settings=[]), r"settings must be an object, not \[\]"),
        (dict(spread="1"), "spread must be a number or null, not '1'"),
        (dict(policy=3), "policy must be a string, not 3"),
        (b"\xff", "is not JSON"),
        (dict(value=float("nan")), "value must be a number, not nan"),
        (dict(tokens=10**400), "tokens must be a number, not 1000"),
        (dict(spread=float("inf")), "spread must be a number or null, not inf"),
    ],
)
def test_a_broken_line_is_named(line: str | bytes | dict[str, Any], why: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    run_cells([cell()], lambda one: [figure()], MADE, file)
    good = json.loads(file.read_text())
    data = json.dumps(good | line) if isinstance(line, dict) else line
    with file.open("ab") as end:
        end.write((data if isinstance(data, bytes) else data.encode()) + b"\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2.*{why}"):
        read_rows(file)
    with pytest.raises(ValueError, match="line 2"):
        run_cells([], lambda one: [], MADE, file)


def test_a_last_line_without_an_end_stays_a_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    run_cells([cell()], lambda one: [figure()], MADE, file)
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    run_cells([cell(), cell(seed=1), cell(seed=2)], lambda one: [figure()], MADE, file)
    assert [row.cell.seed for row in read_rows(file)] == [0, 1, 2]


@pytest.mark.parametrize("kept", [True, False])
def test_a_cell_that_is_given_twice_is_measured_and_shown_once(kept: bool, tmp_path: Path) -> None:
    file, shown = tmp_path / "rows.jsonl" if kept else None, []
    for found in (0, 1 if kept else 0):
        done = run_cells([cell(), cell()], lambda one: [figure()], MADE, file, shown=shown.append)
        assert (done.measured, done.found) == (1 - found, found)
    assert len(shown) == 2


def test_no_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/none.jsonl.*--out"):
        read_rows(tmp_path / "none.jsonl")


def test_a_file_that_cannot_be_written_is_an_error_of_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        run_cells([cell()], lambda one: [figure()], MADE, tmp_path / "no" / "rows.jsonl")
    append(tmp_path / "empty.jsonl", [])
    assert read_rows(tmp_path / "empty.jsonl") == []


def test_by_what_a_row_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = provenance(["jaxcompress", "ruler", "--out", "my rows"])
    assert made.command == "jaxcompress ruler --out 'my rows'"
    assert made.device.startswith("cpu, ")
    assert made.code
    monkeypatch.setenv("PATH", "")  # no git: the sources say which code it is
    code_version.cache_clear()
    assert code_version().startswith("sha256:")
    code_version.cache_clear()
    assert (PACKAGE / "evaluation").is_dir()

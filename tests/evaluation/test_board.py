"""The board: what is averaged, what nothing beats, and what its page, its picture and kvpress's files hold."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxcompress.cli import main
from jaxcompress.evaluation.board import Point, front, fronts, in_words, memory, points, slowness, table, uneven
from jaxcompress.evaluation.board_figure import draw
from jaxcompress.evaluation.board_page import board_page
from jaxcompress.evaluation.kvpress_format import write_kvpress
from jaxcompress.evaluation.provenance import Provenance
from jaxcompress.evaluation.results import Cell, Figure, Row, append

MADE = Provenance(version="0.1.0", code="abc", device="cpu", command="jaxcompress ruler --model '</script>'")
DETAIL = dict(
    question="What? ", answer_prefix="It is", answer=["a", "b"], predicted_answer=" a,\n\"c\"", context_tokens=700,
    max_new_tokens=30,
)  # fmt: skip


def row(
    policy: str = "tova", value: float = 50.0, *, task: str = "vt", seed: int = 0, fraction: int = 4,
    speed: float | None = 10.0, lower: bool = False, question: str = "unknown",
) -> Row:  # fmt: skip
    cell = Cell(
        experiment="ruler", task=task, model="org/smol", model_hash="0f", policy=policy, slots=768 // fraction,
        context=1024, dtype="float32", seed=seed,
        settings=dict(fraction=fraction, question=question, protocol="kvpress", placement=None),
    )  # fmt: skip
    figure = Figure(
        metric="string match %", value=float(value), spread=2.0, lower_is_better=lower, tokens=100, samples=4,
        state_bytes=(1 << 24) // fraction, tokens_per_second=speed, details=[DETAIL],
    )  # fmt: skip
    return Row(cell, figure, MADE, "2026-01-01")


def test_means_over_tasks_and_spread_over_seeds() -> None:
    rows = [row(value=10), row(value=30, seed=1), row(value=50, task="cwe"), row(value=80, task="cwe", seed=1)]
    (point,) = points(rows)
    assert (point.value, point.task, point.seeds, point.rows) == (42.5, "mean of 2 tasks", 2, 4)
    assert point.spread == pytest.approx(17.678, abs=1e-3)  # of 30 and 55
    assert (point.tokens, point.samples, point.state_bytes, point.tokens_per_second) == (400, 16, 1 << 22, 10)
    vt, cwe = points(rows, over_tasks=False)
    assert (vt.value, cwe.value, vt.task, cwe.task) == (20, 65, "vt", "cwe")
    (alone,) = points(rows[:1])
    assert (alone.task, alone.spread) == ("vt", 2.0)
    (uneven_seeds,) = points([*rows, row(value=0, seed=2)])  # one task lacks this seed
    assert uneven_seeds.value == pytest.approx((40 / 3 + 65) / 2)
    assert uneven_seeds.spread == point.spread


def test_types_of_numbers_are_told_where_they_differ() -> None:
    wide, narrow = row(), row()
    narrow = narrow._replace(cell=replace(narrow.cell, dtype="float32/int8"))
    assert [point.policy for point in points([wide])] == ["tova"]
    assert [point.policy for point in points([wide, narrow])] == ["tova, float32", "tova, float32/int8"]


def test_only_what_may_be_compared_is() -> None:
    given = points([row(), row(fraction=8), row("h2o"), row(question="known")])
    assert len(given) == 4
    assert len({point.comparison for point in given}) == 2
    assert uneven(given) == []
    assert len(uneven(points([row(), row("h2o", task="cwe")]))) == 1
    several = [row(name, task=task, question=question)
               for name, task in (("tova", "vt"), ("h2o", "cwe")) for question in ("known", "unknown")]  # fmt: skip
    assert len(uneven(points(several))) == 1  # a note says the same of both


def test_only_means_over_tasks_can_be_uneven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(tmp_path / "rows.jsonl", [row(), row("h2o", task="cwe")])
    for more, told in (((), "measured on different tasks"), (("--by-task",), "")):
        assert main(["board", "--rows", str(tmp_path / "rows.jsonl"), *more]) == 0
        err = capsys.readouterr().err
        assert told in err if told else not err


def test_the_newer_of_two_rows_of_a_cell_counts() -> None:
    (point,) = points([row(value=1), row(value=9)])
    assert (point.value, point.rows) == (9, 1)
    newer = row(value=7)._replace(at="2026-06-01", made=replace(MADE, command="again"))
    (point,) = points([newer, row(value=1)])  # whichever file was named first
    assert (point.value, point.command) == (7, "again")


def test_what_nothing_beats() -> None:
    named = [("full", 90, 1), ("tova", 80, 4), ("h2o", 70, 4), ("random", 75, 2), ("knorm", 80, 8)]
    given = points([row(policy, value, fraction=fraction) for policy, value, fraction in named])
    assert [point.policy for point in front(given, memory)] == ["knorm", "full"]
    losses = points([row(policy, value, fraction=fraction, lower=True) for policy, value, fraction in named])
    assert [point.policy for point in front(losses, memory)] == ["knorm", "h2o"]
    speeds = [("a", 90, 5.0), ("b", 80, 9.0), ("c", 70, 7.0), ("d", 99, None)]
    quick = points([row(policy, value, speed=speed) for policy, value, speed in speeds])
    assert [point.policy for point in front(quick, slowness)] == ["b", "a"]
    equal = points([row("a", 50), row("b", 50)])
    assert [point.policy for point in front(equal, memory)] == ["a", "b"]
    assert [point.policy for point in front(points([row("a", 50), row("b", 50), row("c", 40)]), memory)] == ["a", "b"]
    assert {point.policy for point in fronts(given, memory)} == {"knorm", "full"}


def test_the_table() -> None:
    lines = table(points([row("full", 90, fraction=1), row("tova", 50), row("tova", 60, question="known")]))
    text = "\n".join(lines)
    assert text.count("ruler, vt: string match % (higher is better)") == 2
    assert re.search(r"^full +768 +90\.000 ±2\.000\* +16,384 +10 +1 +4 +100$", text, re.MULTILINE)
    assert "question known, protocol kvpress" in text
    assert in_words(dict(tokens="0f", text="0f", mode="streaming", prompt=None)) == "mode streaming"


class _Page(HTMLParser):
    """What a page refers to, and its data."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.data, self._inside = "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        self.outside += [str(said[name]) for name in ("src", "href") if name in said]
        self._inside = said.get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data
            self._inside = False


def test_the_page_stands_alone() -> None:
    rows = [row(), row(seed=1), row("h2o", task="cwe"), row(task="cwe"), row("full", 90, fraction=1, speed=None)]
    page = _Page()
    text = board_page(rows)
    page.feed(text)
    assert page.outside == ["data:,"]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    shown = json.loads(page.data)
    assert {one["task"] for one in shown} == {"vt", "cwe", "mean of 2 tasks"}
    assert shown[0]["command"] == "jaxcompress ruler --model '</script>'"
    assert text.count("</script>") == 2
    other = row("tova", 10, fraction=8)._replace(made=replace(MADE, command="jaxcompress ruler --fractions 8"))
    page = _Page()
    page.feed(board_page([row(), other]))
    assert [one["command"] for one in json.loads(page.data)] == [MADE.command, "jaxcompress ruler --fractions 8"]
    with pytest.raises(ValueError, match="no rows"):
        board_page([])


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"board.{suffix}"
    draw(points([row("full", 90, fraction=1), row(), row("h2o", 40, speed=None), row("tova", 3, lower=True)]), path)
    assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match="no rows to draw"):
        draw([], path)


@pytest.mark.filterwarnings("error")
def test_a_picture_of_what_has_no_state_and_no_speed(tmp_path: Path) -> None:
    """Such as prompts that were shortened."""
    free = [
        one._replace(figure=replace(one.figure, state_bytes=0)) for one in (row(speed=None), row("h2o", speed=None))
    ]
    draw(points(free), tmp_path / "board.svg")
    text = (tmp_path / "board.svg").read_text()
    assert text.count("tova") == text.count("h2o") == 1  # in the legend


def test_the_files_of_kvpress(tmp_path: Path) -> None:
    rows = [row(value=40), row(value=60, seed=1), row(value=10, task="cwe"), row(value=80, question="known")]
    folders = write_kvpress(rows, tmp_path)
    assert [folder.name for folder in folders] == [
        "ruler__1024__org--smol__tova__0.75", "ruler__1024__org--smol__tova__0.75__compressed_questions",
    ]  # fmt: skip
    metrics = json.loads((folders[0] / "metrics.json").read_text())
    assert metrics == {"cwe": {"string_match": 10.0}, "vt": {"string_match": 50.0}}
    with (folders[0] / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["task"] for line in lines] == ["vt", "vt", "cwe"]
    assert lines[0]["predicted_answer"] == ' a,\n"c"'
    assert float(lines[0]["compression_ratio"]) == 1 - 192 / 700  # of this context
    with (folders[1] / "predictions.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["compression_ratio"]) == 0.75  # the longest: the question counts too
    config = json.loads((folders[1] / "config.yaml").read_text())
    assert (config["press_name"], config["compress_questions"], config["data_dir"]) == ("tova", True, "1024")
    with pytest.raises(ValueError, match="no row is of RULER"):
        write_kvpress([], tmp_path)


def test_settings_that_share_a_name_get_folders_of_their_own(tmp_path: Path) -> None:
    plain = row(value=20)
    plain = plain._replace(cell=replace(plain.cell, settings=dict(plain.cell.settings, form="plain")))
    newer = row(value=40)._replace(at="2026-02-01")
    rows = [newer, row(value=1), plain, row(fraction=128), row(fraction=150)]  # the second is older
    folders = write_kvpress(rows, tmp_path)
    assert [folder.name.removeprefix("ruler__1024__org--smol__tova__") for folder in folders] == [
        "0.75", "0.75__form-plain", "0.99__fraction-128__slots-6", "0.99__fraction-150__slots-5",
    ]  # fmt: skip
    scores = [json.loads((folder / "metrics.json").read_text())["vt"]["string_match"] for folder in folders[:2]]
    assert scores == [40, 20]


def test_points_may_be_kept_in_sets() -> None:
    assert isinstance(points([row()])[0], Point)
    assert len(set(points([row(), row("h2o")]))) == 2

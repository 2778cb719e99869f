"""Parts of the scripts that measure tables, which --quick alone would not show to be wrong."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxcompress.checkpoints import SavedPolicy, load_embedded, save_policy
from jaxcompress.evaluation.provenance import Provenance
from jaxcompress.evaluation.results import Cell, Figure, Row, read_rows, run_cells
from jaxcompress.models.modes import calls
from jaxcompress.policies import Full
from jaxcompress.prompt.information import Context, Reader
from jaxcompress.prompt.surface import words_of
from jaxcompress.prompt.words import align

FOLDER = Path(__file__).parents[2] / "experiments"
MADE = Provenance(version="0", code="abc", device="cpu", command="")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_how_far_from_the_edge_tokens_are_that_one_side_keeps(script: Any) -> None:
    edge = script("kvpress_parity").edge
    scores = np.array([[[4.0, 3.0, 2.0, 1.9, 1.0]]])
    theirs = np.array([[[True, True, True, False, False]]])
    assert edge(theirs, theirs, scores) == 0
    swapped = np.array([[[True, True, False, True, False]]])
    assert edge(swapped, theirs, scores) == pytest.approx(0.05)  # 1.9 beside the smallest kept, 2.0
    assert edge(swapped, theirs, np.zeros(0)) is None


def test_rows_are_found_again_by_their_bits(script: Any) -> None:
    same_rows = script("kvpress_parity").same_rows
    keys = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    np.testing.assert_array_equal(same_rows(keys, keys[[4, 1]]), [False, True, False, False, True, False])
    with pytest.raises(AssertionError, match="equal keys"):
        same_rows(np.concatenate([keys, keys[:1]]), keys[:1])


@pytest.mark.parametrize(
    ("text", "number"), [("so 3 + 4 = 7.", 7), ("1,250 coins", 1250), ("-2.5", -2.5), ("none", None)]
)
def test_the_last_number_of_an_answer(text: str, number: float | None, script: Any) -> None:
    assert script("random_eviction").last_number(text) == number


def test_made_up_questions_have_their_answers(script: Any) -> None:
    from random import Random

    for seed in range(20):
        question = script("random_eviction").made_up(Random(seed))
        start, more, gone, times = map(int, [word for word in question.text.split() if word.isdigit()])
        assert question.answer == times * (start + more - gone)


def test_a_released_file_of_qasper(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = dict(unanswerable=False, extractive_spans=["a", "b"], yes_no=None, free_form_answer="")
    asked = dict(question="What?", answers=[dict(answer=answer)])
    sections = [dict(section_name="One", paragraphs=["First.", "Second."])]
    path = tmp_path / "qasper-dev-v0.3.json"
    path.write_text(json.dumps({"1": dict(title="Title", full_text=sections, qas=[asked])}))
    module = script("tova_documents")
    (document,) = module.qasper(str(path))
    assert (document.name, document.text) == ("qasper 1", "Title\n\nOne\nFirst.\nSecond.")
    assert [(one.text, one.references) for one in document.questions] == [("What?", ("a, b",))]
    with pytest.raises(SystemExit):
        next(module.qasper(str(tmp_path / "no.json")))
    assert f"QASPER was looked for as {tmp_path / 'no.json'}" in capsys.readouterr().err


def test_documents_of_two_data_sets_are_never_averaged(script: Any) -> None:
    table = script("tova_documents").table
    metric = "questions: nats per token of the references"

    def row(task: str, value: float) -> Row:
        cell = Cell(experiment="tova_documents", task=task, model="m", model_hash="", policy="tova", slots=8,
                    context=64, dtype="float32")  # fmt: skip
        return Row(cell, Figure(metric=metric, value=value, tokens=5, samples=1, state_bytes=1), MADE, at="")

    stories, papers = [row("squality 1", 0.0), row("squality 2", 0.0)], [row("qasper 1", 2.0)]
    assert table(stories + papers) == [*table(stories), "", *table(papers)]


def test_ablations_of_a_compressor_are_named_after_a_plus(script: Any) -> None:
    module = script("prompt_tables")
    assert module.shortener("tf-idf+numbers+lines", None, 0)[1] == dict(protect=["numbers"], force=["\n"])
    with pytest.raises(ValueError, match="unknown ablation 'letters' of tf-idf"):
        module.shortener("tf-idf+letters", None, 0)


def test_evidence_compares_what_read_the_same_texts(script: Any) -> None:
    """A seed that lacks a text has no mean, and rows of smaller runs are no part of the table."""
    table = script("training_evidence").table

    def row(name: str, book: str, policy: str, value: float, rows: int = 4) -> Row:
        cell = Cell(
            experiment="training_evidence", task=book, model=name, model_hash="", policy=policy, slots=8, context=64,
            dtype="float32", settings=dict(name=name, fraction=1 if policy == "full" else 8, kind="text", rows=rows),
        )  # fmt: skip
        figure = Figure(metric="nats per token", value=value, tokens=63 * rows, samples=rows, state_bytes=1)
        return Row(cell, figure, MADE, at="")

    rows = [row("as it is", book, policy, value) for book in "ab" for policy, value in (("tova", 4.0), ("full", 3.0))]
    rows += [row("joint-0", "a", "learned", 3.0), row("joint-0", "b", "learned", 3.2)]
    alone = table(rows)
    assert "3.100 (90%)" in "\n".join(alone)
    assert table([*rows, row("joint-1", "a", "learned", 9.0)]) == alone
    assert table([*rows, row("joint-0", "a", "learned", 9.0, rows=1)]) == alone


def made(task: str = "book", *, model: str = "m", details: Any = None, **changes: Any) -> Row:
    given: dict[str, Any] = dict(model_hash=model, policy="tova", slots=8, context=64, dtype="float32")
    cell = Cell(experiment="e", task=task, model=model, **(given | changes))
    figure = Figure(metric="nats per token", value=1.0, tokens=1, samples=1, state_bytes=1, details=details)
    return Row(cell, figure, MADE, at="")


def test_a_table_is_of_rows_that_differ_in_what_it_says(script: Any) -> None:
    tables = script("paper_tables").tables
    said = lambda rows, *apart: tables(rows, lambda some: [" ".join(one.cell.task for one in some)], apart)
    a, b = made("a"), made("b", slots=16, policy="h2o", seed=1)
    assert said([a, b]) == ["a b"]
    assert said([]) == [""]
    long, other = made("long", context=128), made("other", model="n")
    assert said([a, b, long]) == ["**context 64**", "", "a b", "", "**context 128**", "", "long"]
    assert said([a, other]) == ["**model m**", "", "a", "", "**model n**", "", "other"]
    assert said([a, other, long], "model", "context") == ["a other long"]
    two = [made("x", settings=dict(batch=n)) for n in (1, 2)]
    assert said([a, *two])[2::4] == ["a x", "a x"]  # what has no batch stands in both
    assert said([a, *two], "batch") == ["a x x"]
    again = made("again", model="m", model_hash="retrained")
    assert said([a, again, other], "model")[2::4] == ["a other", "again other"]
    edited = [made(n, policy="p.py:P", settings=dict(policy_hash=n)) for n in ("first", "second")]
    assert said([a, *edited])[2::4] == ["a first", "a second"]


def test_rows_of_another_text_of_that_name_are_not_found(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_texts, rows = script("paper_tables").of_texts, tmp_path / "rows.jsonl"
    args, cell = script("paper_tables").OfRows(out=rows), made().cell
    measure = lambda cell: [made(details=dict(each=[1])).figure]
    run_cells([cell], measure, MADE, rows)  # of an earlier version, which does not say its text
    cells, figures = of_texts(args, [cell], measure, lambda cell: "one")
    assert run_cells(cells, figures, MADE, rows).found == 1
    rows.unlink()
    run_cells([cell], figures, MADE, rows)
    assert set(read_rows(rows)[0].figure.details) == {"each", "text"}
    assert read_rows(rows)[0].cell.key == cell.key
    for text, what in (("one", contextlib.nullcontext()), ("two", pytest.raises(SystemExit))):
        cells, _ = of_texts(args, [cell], measure, lambda cell, text=text: text)
        with what:
            assert list(cells) == [cell]
    assert "has rows of another text that is called book too" in capsys.readouterr().err


def test_contexts_are_dealt_to_all_books(script: Any) -> None:
    module = script("prompt_tables")
    books = {str(n): " ".join(f"{n}w{i}" for i in range(200)) for n in range(3)}
    tokenizer = SimpleNamespace(encode=lambda text, add_bos: [0] * len(text))
    for contexts, counts in ((5, [2, 2, 1]), (6, [2, 2, 2]), (2, [1, 1, 0])):
        found = module.continuations(module.Arguments(contexts=contexts, words=5, after=2), books, tokenizer)
        assert [sum(piece.text.startswith(f"{n}w") for piece in found) for n in range(3)] == counts


def test_domains_are_the_same_every_time_and_told_apart(script: Any, tmp_path: Path) -> None:
    module = script("prompt_domains")
    names = ["documentation", "code", "logs", "json", "tables"]
    found = module.domains_of(names)
    assert list(found) == names
    assert found == module.domains_of(names)
    assert all(len(set(texts.values())) == 4 for texts in found.values())
    orders = [json.loads(line) for line in found["json"]["shop 0"].splitlines()]
    for one in orders:
        assert one["total"] == round(sum(item["quantity"] * item["price"] for item in one["items"]), 2)
        assert f"order {one['id']} " in found["logs"]["shop 0"]
        assert f"| {one['id']} | {one['at'][:10]} | " in found["tables"]["shop 0"]
    own = tmp_path / "dialogue.txt"
    own.write_text("Good morrow, cousin.", "utf-8")
    assert module.domains_of([str(own)]) == {"dialogue": {"dialogue": "Good morrow, cousin."}}
    with pytest.raises(ValueError, match="'letters' is neither"):
        module.domains_of(["letters"])
    with pytest.raises(ValueError, match="two texts that are called 'dialogue'"):
        module.domains_of([str(own), str(own)])


@pytest.mark.slow
def test_what_a_reader_needs(script: Any) -> None:
    """A word left out, as by reading the text twice; and the best half is labelled."""
    module, loaded = script("reader_teachers"), load_embedded()
    reader = Reader(loaded.model, loaded.tokenizer, Full(), slots=128)
    text = " ".join(f"def method{n}(self): return self.value{n} + {n}" for n in range(3))
    ids, places = loaded.tokenizer.encode_with_places(text)
    scored = module.left_out(reader, before=1000, after=8)(text)
    losses = lambda ids: module.losses_of(reader, [ids])[0, : len(ids)]
    naive, _ = reader.losses(Context(reader.begin().state, ids[:1]), ids[None, 1:])
    np.testing.assert_allclose(losses(ids)[1:], naive[0], atol=1e-4)
    whole = losses(ids)
    for at in (2, 9, len(scored.spans) - 1):
        (first,), (last,) = align(scored.spans[at : at + 1], places)
        without = losses(np.delete(ids, slice(first, last)))[first : first + 8].sum()
        assert scored.scores[at] == pytest.approx(without - whole[last : last + 8].sum(), abs=1e-3)
    words = module.repeated(reader)(text)
    assert np.isfinite(words.scores).all()
    assert words.spans.tolist() == scored.spans.tolist()
    example = module.labelled(words, 0.5)
    kept = np.array(example.labels)
    assert kept.sum() == round(len(kept) / 2)
    assert words.scores[kept].min() >= words.scores[~kept].max()
    assert [len(words_of(piece)) for piece in module.pieces_of(["a b c d", "e"], 3, 2)] == [2, 2, 1]


def test_domains_stand_side_by_side(script: Any) -> None:
    table = script("prompt_tables").table

    def row(domain: str, name: str, ratio: float | None, each: list[float]) -> Row:
        cell = Cell(experiment="prompt_tables", task=f"{domain}: continuation", model="m", model_hash="", policy=name,
                    slots=8, context=64, dtype="float32", settings=dict(ratio=ratio))  # fmt: skip
        figure = Figure(metric="nats per token", value=sum(each) / 2, tokens=5, samples=2, state_bytes=0,
                        details=dict(each=each))  # fmt: skip
        return Row(cell, figure, MADE, at="")

    bounds = [row(domain, name, None, each) for domain in ("logs", "json")
              for name, each in (("whole", [1.0, 2.0]), ("nothing", [3.0, 3.0]))]  # fmt: skip
    lines = table([*bounds, row("logs", "random", 2.0, [1.5, 2.7]), row("json", "random", 5.0, [1.0, 2.0])])
    assert "|  | logs | json |" in lines
    assert "| whole of the context | 1.500 | 1.500 |" in lines
    assert "| `random`, 2 × | 0.600 ± 0.100 |  |" in lines
    assert "| `random`, 5 × |  | 0.000 ± 0.000 |" in lines
    assert not any("random" in line for line in table([row("logs", "random", 2.0, [1.5, 2.7])]))


def test_what_is_timed_one_after_another_is_compiled_before(script: Any) -> None:
    prompts = [np.arange(length) for length in (5, 100, 128, 129, 1000, 4000)]
    widths = lambda some: {call.width for one in some for call in calls("streaming", len(one), chunk=1, segment=128)}
    warm = script("speed_engine").of_each_width(prompts, 128)
    assert widths(warm) == widths(prompts)
    assert max(map(len, warm)) <= 256


def test_a_soak_tells_what_does_not_hold(script: Any) -> None:
    faults_of = script("soak_server").faults_of
    ended = dict(code=-15, stopped=True)
    rows = [dict(found={"whole: right": 3}, mib=[90, 100, 100]), dict(found={"right": 2}, cut=3, told=1), dict(code=2)]
    assert faults_of([*rows, ended]) == []
    wrong = [dict(found={"whole: WRONG 500": 1}, mib=[90, 100, 130]), dict(found={}, cut=3, told=0), dict(code=0)]
    assert len(faults_of([*wrong, dict(ended, stopped=False)])) == 5


def test_links_are_no_bound(script: Any) -> None:
    entry = script("plan").entry
    row = lambda bound: made(
        settings=dict(machine="v5e-8"), details=dict(mesh="tensor=8", fixed=1e9, row=1e9, bound=bound)
    )
    assert [entry(row(bound))[-2] for bound in ("links", "memory")] == ["~1", "1"]


def test_f1_deletes_punctuation_as_squad_does(script: Any) -> None:
    f1 = script("tova_documents").f1
    assert f1(["The U.S. state-of-the-art"], "us stateoftheart")["F1"] == 100


def test_evidence_has_one_model_for_each_name(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = script("training_evidence")
    for given in (("a=one", "a=two"), ("as it is=one",)):
        with pytest.raises(SystemExit):
            script.models_of(script.Arguments(trained=given))
        assert "names another model already" in capsys.readouterr().err


@pytest.mark.parametrize(("saved", "own"), [(None, False), ("full", False), ("tova", True)])
def test_evidence_reads_a_control_with_the_given_policies(
    saved: str | None, own: bool, script: Any, tmp_path: Path
) -> None:
    """`train --policy full` saves that policy too, but a full cache is no policy of a model's own."""
    if saved is not None:
        save_policy(SavedPolicy(saved, {}), tmp_path)
    assert script("training_evidence").has_its_own(SimpleNamespace(folder=tmp_path)) == own


def test_a_mixture_reads_what_it_is_told(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = script("training_mixture")
    for name in ("Dracula", "Emma"):
        (tmp_path / f"{name}.txt").write_text("A text.")
    given = script.Arguments(texts=(tmp_path,), hold_out=("Dracula",))
    assert [file.stem for file in script.files_of(given.texts, given.hold_out)] == ["Emma"]
    with pytest.raises(SystemExit):
        script.files_of([tmp_path], ["Dracula", "dracula"])
    assert "--hold-out names no file of --texts: dracula; they are Dracula, Emma" in capsys.readouterr().err
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"document": "One."}\n{"text": "Two.", "id": 3}\n[]\n')
    with pytest.raises(SystemExit):
        script.texts_in(lines, "document")
    assert "lines.jsonl, line 2: no text under 'document' (--field); the line has text, id" in capsys.readouterr().err
    lines.write_text('{"document": "One."}\n')
    assert script.texts_in(lines, "document") == ["One."]


def test_methods_of_reinforcement(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module, command = script("train_reinforced"), script("command")
    assert command.arguments(module.QUICK, ["--methods", "full"]).methods == ("full",)
    with pytest.raises(SystemExit):
        command.arguments(module.QUICK, ["--methods", "bounded", "bonded"])
    assert "bonded" in capsys.readouterr().err


def test_a_policy_ships_with_how_it_was_trained(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that goes on says so before its model is another one."""
    of_run = script("ship_policy").policy_of_run
    (tmp_path / "model").mkdir()
    save_policy(SavedPolicy("dms", dict(norms="1"), dict(inner=np.ones(2))), tmp_path / "model")
    settings = dict(steps=6, rows=1, length=8, horizon=1.0, ratio=4.0, learning_rate=1.0, seed=0)
    record = dict(settings=settings, data=dict(tokens=9))
    for saved in ({}, dict(saved=3)):
        (tmp_path / "run.json").write_text(json.dumps(record | saved))
        with pytest.raises(SystemExit):
            of_run(tmp_path)
        assert f"of {saved.get('saved', 'no')} steps, and the run goes to 6: finish it" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps(record | dict(saved=6)))
    trained = of_run(tmp_path).settings["trained"]
    assert trained == dict(steps=6, rows=1, length=8, ratio=4.0, learning_rate=1.0, seed=0, tokens_of_data=9)

"""Corpora of records: every one as by itself, in both formats, stopped and taken up again, on Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxcompress.cli import main
from jaxcompress.prompt import BudgetTooSmall, Compressor, EncoderTokenizer, corpus, keep
from jaxcompress.prompt.corpus import CorpusJob, CorpusReport, compress_corpus, compress_part
from jaxcompress.prompt.corpus_files import Record, parts_of, read_part
from jaxcompress.prompt.dataset import read_examples

FOLDER = Path(__file__).parents[1] / "fixtures" / "prompt" / "bert"
TEXT = "The harbor was quiet that night. Ships, ships, and more ships lay at anchor; nobody spoke."


@pytest.fixture(scope="module")
def compressor() -> Compressor:
    return Compressor.load(FOLDER)


def records(n: int) -> list[Record]:
    return [dict(id=at, text=" ".join([TEXT] * (at % 3)), more=["x", at]) for at in range(n)]


def jsonl(path: Path, rows: list[Record]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # empty lines are no records
    return path


def written(target: Path) -> list[Record]:
    files = sorted(target.glob("part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_each_record_is_shortened_by_itself(compressor: Compressor, tmp_path: Path) -> None:
    given = records(7)
    source = jsonl(tmp_path / "given.jsonl", given)
    job = CorpusJob(source, tmp_path / "out", rate=0.4, protect=("negations",), labels=True, rows=3)
    seen: list[int] = []
    report = compress_corpus(compressor, job, progress=seen.append)
    found = written(job.target)
    assert seen == [0, 3, 3, 1]
    assert (report.parts, report.made, report.records) == (3, 3, 7)
    for before, after in zip(given, found, strict=True):
        alone = keep(compressor(before["text"]), compressor.counter, rate=0.4, protect=["negations"])
        assert after["compressed"] == alone.text
        assert {key: after[key] for key in before} == before
        assert (after["tokens_before"], after["tokens_after"]) == (alone.tokens_before, alone.tokens_after)
    assert report.tokens_after == sum(one["tokens_after"] for one in found)
    examples = read_examples(sorted(job.target.glob("*.jsonl"))[0])
    assert [one.text for one in examples] == [one["text"] for one in given[:3]]
    assert [sum(one.labels) for one in examples] == [sum(one["labels"]) for one in found[:3]]


def test_the_example_of_the_module(compressor: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(Path("documents.jsonl"), records(2))
    lines = [line.strip() for line in str(corpus.__doc__).splitlines() if line.startswith("    ")]
    exec("\n".join(lines), dict(vars(corpus), compressor=compressor))
    assert len(written(Path("shorter"))) == 2


def test_words_are_not_forced_where_sentences_are_kept(compressor: Compressor, tmp_path: Path) -> None:
    job = CorpusJob(jsonl(tmp_path / "given.jsonl", records(2)), tmp_path / "out", force=("quiet",))
    by_sentence = replace(compressor, unit="sentence")
    with pytest.raises(ValueError, match="force takes white space where sentences are kept whole"):
        compress_corpus(by_sentence, job)
    with pytest.raises(ValueError, match="force takes white space where sentences are kept whole"):
        compress_part(by_sentence, job, parts_of(job.source, job.rows)[0])
    assert not job.target.exists()


def test_lines_that_are_no_records(tmp_path: Path) -> None:
    """What is white to one reader of the file is white to the other: no record is read twice."""
    source, given = tmp_path / "given.jsonl", records(4)
    white = ("\u00a0", "\u2028 ", "\x1c", "\ufeff")
    source.write_text("".join(f"{line}\n{json.dumps(row)}\n" for line, row in zip(white, given, strict=True)))
    parts = parts_of(source, 2)
    assert [part.records for part in parts] == [2, 2]
    assert [row for part in parts for row in read_part(source, part)] == given


def test_goes_on_where_it_stopped(compressor: Compressor, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "given.jsonl", records(9))
    whole, job = (CorpusJob(source, tmp_path / name, rows=2) for name in ("whole", "stopped"))
    compress_corpus(compressor, whole)

    class Stop(Exception):
        pass

    done = 0

    def stop_after_four(n: int) -> None:
        nonlocal done
        done += n
        if done >= 4:
            raise Stop

    with pytest.raises(Stop):
        compress_corpus(compressor, job, progress=stop_after_four)
    killed, working = (job.target / f".part-000003.jsonl.{n}.partial" for n in ("0123", "4567"))
    for left in (killed, working):
        left.write_text("half a rec")
    os.utime(killed, (0, 0))
    seen: list[int] = []
    assert compress_corpus(compressor, job, progress=seen.append) == CorpusReport(
        5, 3, 5, 0, *(sum(one[key] for one in written(whole.target)[4:]) for key in ("tokens_before", "tokens_after"))
    )
    assert seen == [4, 2, 2, 1]
    assert (killed.exists(), working.exists()) == (False, True)
    assert written(job.target) == written(whole.target)
    assert compress_corpus(compressor, job).made == 0
    with pytest.raises(ValueError, match="another rate"):
        compress_corpus(compressor, CorpusJob(source, job.target, rate=0.4, rows=2))
    other = EncoderTokenizer(FOLDER.parent / "xlm-roberta")
    counting = lambda text: compressor.tokens(text) + text.count("é")  # the same of nearly every text
    for changed, what in (
        (replace(compressor, tokenizer=other), "tokenizer"),
        (replace(compressor, count=counting), "reader"),
    ):
        with pytest.raises(ValueError, match=f"another {what}"):
            compress_corpus(changed, job)
    begun = CorpusJob(source, tmp_path / "begun", rows=2)  # killed while the settings were written
    begun.target.mkdir()
    (begun.target / ".corpus.json.0123.partial").write_text("{")
    assert compress_corpus(compressor, begun).made == 5
    with pytest.raises(ValueError, match="choose a new folder"):
        compress_corpus(compressor, CorpusJob(source, tmp_path))
    source.write_bytes(source.read_bytes().swapcase())  # as many bytes
    with pytest.raises(ValueError, match="another content"):
        compress_corpus(compressor, job)


def test_parquet(compressor: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow", reason='pip install "jaxcompress[parquet]"')
    pq = pytest.importorskip("pyarrow.parquet")
    given = records(11)
    for row in given:
        row["more"] = row["more"][:1]
    source = tmp_path / "given.parquet"
    pq.write_table(pa.Table.from_pylist(given), source, row_group_size=4)
    decoded: list[int] = []
    decode = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda file, n: decoded.append(n) or decode(file, n))
    assert [row for part in parts_of(source, 3) for row in read_part(source, part)] == given
    assert decoded == [0, 1, 2]  # each group once, though parts share them
    job = CorpusJob(source, tmp_path / "out", labels=True, rows=3)
    compress_corpus(compressor, job)
    found = pa.concat_tables(pq.read_table(file) for file in sorted(job.target.glob("*.parquet"))).to_pylist()
    same = CorpusJob(jsonl(tmp_path / "given.jsonl", given), tmp_path / "lines", labels=True, rows=3)
    compress_corpus(compressor, same)
    assert found == written(same.target)


def test_what_is_protected_stays_beyond_the_rate(compressor: Compressor, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "given.jsonl", [dict(text="Pay 4,200 by 9:45, not later."), dict(text=TEXT)])
    job = CorpusJob(source, tmp_path / "out", rate=0.2, protect=("numbers",))
    assert compress_corpus(compressor, job).over == 1
    first, second = written(job.target)
    assert "4,200" in first["compressed"]
    assert "9:45" in first["compressed"]
    assert second["tokens_after"] == int(0.2 * second["tokens_before"] + 0.5)
    with pytest.raises(BudgetTooSmall):
        compressor.compress("Pay 4,200 by 9:45, not later.", rate=0.2, protect=["numbers"])


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ('{"text": "a"}\n{"title": "b"}\n', "record 2: the text should be in 'text'; it has 'title'"),
        ('{"text": null}\n', "record 1: the text should be in 'text'; it holds no string there"),
        ('{"text": "a", "compressed": 1}\n', "record 1: 'compressed' is there already"),
        ("[1]\n", "record 1 is no JSON object, but list"),
        ("{\n", "record 1 is not JSON"),
        (b'{"text": "caf\xe9"}\n', "record 1 is not UTF-8"),
    ],
)
def test_records_that_are_none(compressor: Compressor, tmp_path: Path, lines: Any, why: str) -> None:
    source = tmp_path / "given.jsonl"
    source.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(ValueError, match=why.replace("(", r"\(")):
        compress_corpus(compressor, CorpusJob(source, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("part-*"))


def test_on_the_command_line(
    compressor: Compressor, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "as it is")
    source = jsonl(tmp_path / "given.jsonl", records(5))
    command = ["compress-corpus", str(source), str(tmp_path / "out"), "--model", str(FOLDER), "--rate", "0.4"]
    assert main([*command, "--rows", "2", "--protect", "none", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["parts"] == 3
    assert "3 of 3 parts made, 5 records" in told.err
    compress_corpus(compressor, same := CorpusJob(source, tmp_path / "same", rate=0.4, rows=2))
    assert written(tmp_path / "out") == written(same.target)
    wrong = (
        (["--rate", "0"], "--rate"),
        (["--field", "body"], "'body'"),
        (["--protect", "none", "urls"], "not a mixture"),
    )
    for flags, why in wrong:
        assert main([*command[:2], str(tmp_path / "other"), *command[3:5], *flags]) == 2
        assert why in capsys.readouterr().err
    for given, why in ((tmp_path, "is a folder"), (tmp_path / "none.jsonl", "there is no file")):
        assert main(["compress-corpus", str(given), str(tmp_path / "out")]) == 2
        assert why in capsys.readouterr().err


ON_RAY = """
import os
import signal
import sys
from pathlib import Path

import ray

from jaxcompress.prompt import Compressor
from jaxcompress.prompt.corpus import CorpusJob
from jaxcompress.prompt.on_ray import compress_corpus_on_ray

FOLDER, SOURCE, TARGET, MARK = map(Path, sys.argv[1:])
STARTER = os.getpid()


def load():
    if os.getpid() != STARTER and not MARK.exists():  # the first actor dies
        MARK.write_text("dead")
        os.kill(os.getpid(), signal.SIGKILL)
    return Compressor.load(FOLDER)


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
report = compress_corpus_on_ray(load, CorpusJob(SOURCE, TARGET, rows=3), workers=2)
ray.shutdown()
print(tuple(report))
"""


def test_on_ray(compressor: Compressor, tmp_path: Path) -> None:
    """Two workers, of which one is killed, make what one process makes."""
    pytest.importorskip("ray", reason='pip install "jaxcompress[ray]"')
    source = jsonl(tmp_path / "given.jsonl", records(12))
    script, mark = tmp_path / "on_ray.py", tmp_path / "mark"
    script.write_text(ON_RAY)
    whole, spread = (CorpusJob(source, tmp_path / name, rows=3) for name in ("whole", "spread"))
    command = [sys.executable, str(script), *map(str, (FOLDER, source, spread.target, mark))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    assert done.stdout.strip().splitlines()[-1] == str(tuple(compress_corpus(compressor, whole)))
    assert written(spread.target) == written(whole.target)

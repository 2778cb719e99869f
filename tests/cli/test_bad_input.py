"""The command line and what nobody should give it: the documented exit code, one line, never a traceback."""

from __future__ import annotations

import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from test_cli import Ran, folder, run  # noqa: F401  fixtures

from jaxcompress.cli import COMMANDS, main
from jaxcompress.cli.info import Info
from jaxcompress.cli.paths import PathMark

# ruff: noqa: F811  pytest's fixtures

GENERATE = ("generate", "--prompt", "a")
ENCODER = Path(__file__).parents[1] / "fixtures" / "prompt" / "bert"


def refused(ran: Ran, *says: str, code: int = 2) -> None:
    assert (ran.code, ran.err.count("\n")) == (code, 1), ran.err
    assert ran.err.startswith("jaxcompress: ")
    assert "Traceback" not in ran.err
    for part in says:
        assert part in ran.err


def put(path: Path, what: str) -> Path:
    """A file that is no use: by what is wrong with it."""
    contents = {
        "empty": b"", "latin-1": b"caf\xe9", "utf-16": "text".encode("utf-16"), "zeros": "text".encode("utf-16-le"),
        "binary": bytes(range(256)), "gzip": b"\x1f\x8b\x08\x00\x00", "deep": b"[" * 100_000, "cut": b'{"text": "a',
    }  # fmt: skip
    if what == "folder":
        path.mkdir()
    elif what != "missing":
        path.write_bytes(contents[what])
    return path


FILES = {
    "generate": ("--file",),
    "perplexity": ("--file",),
    "compare": ("--policies", "tova", "--file"),
    "retention": ("--out", "page.html", "--file"),
    "trace": ("--out", "t.npz", "--prompt-tokens", 1, "--file"),
    "trace ": ("--out", "t.npz", "--prompt-tokens", 1, "--token-ids"),
    "train": ("--out", "run", "--data"),
    "train ": ("--out", "run", "--data", "x", "--config"),
    "train  ": ("--out", "run", "--resume", "--data"),
    "compress-prompt": ("--json-text", "--file"),
}


@pytest.mark.parametrize("what", ["missing", "folder", "empty", "latin-1", "utf-16", "zeros", "binary", "gzip", "deep"])
@pytest.mark.parametrize("command", FILES)
def test_files(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, what: str) -> None:
    if what == "deep" and command not in ("trace ", "train ", "compress-prompt"):
        pytest.skip("brackets are text")
    if what == "empty" and command == "train ":
        pytest.skip("a file without settings")
    if what == "folder" and command in ("train", "train  "):
        pytest.skip("a folder of texts")
    monkeypatch.chdir(tmp_path)
    path = put(tmp_path / ("wrong.jsonl" if command == "train  " else "wrong"), what)
    how = dict(model=ENCODER) if command == "compress-prompt" else {}
    ran = run(command.strip(), *FILES[command], path, **how)
    refused(ran, "UTF-16" if what in ("utf-16", "zeros") and command != "trace " else "")


WRONG = {
    "generate --file no.txt": "there is no file no.txt",
    "generate --file no.txt --chat --prompt a": "there is no file no.txt",
    "perplexity --file no.txt": "there is no file no.txt",
    "perplexity --file latin-1": "latin-1 is not UTF-8",
    "compare --file no.txt": "there is no file no.txt",
    "retention --out page.html --file no.txt": "there is no file no.txt",
    "trace --out t.npz --file no.txt": "there is no file no.txt",
    "trace --out t.npz --token-ids no.npy": "there is no file no.npy",
    "compress-prompt --file no.txt": "there is no file no.txt",
    "compress-prompt --messages no.json": "there is no file no.json",
    "compress-corpus no.jsonl shorter": "there is no file no.jsonl",
    "compress-corpus t t": "t is a file; give a folder",
    "ruler --haystack no.txt": "there is no text in ",
    "ruler --puzzles no.json": "there are no questions in ",
    "ruler --puzzles t": "t is not JSON",
    "train --out run --data no.txt": "there is no file or folder no.txt",
    "train --out run --data t --tokenizer no": "no has no tokenizer.",
    "train --out t --data t": "t is a file; give a folder",
    "train --out run --data t --config no.toml": "there is no file no.toml",
    "train --out run --data t --policy no.py:Far": "there is no file no.py to take a policy from",
    "serve --prefixes t": "t is a file; give a folder",
    "serve --more-pools no.py:Far:64": "there is no file no.py",
    "generate --prompt a --policy no.py:Far/every4": "there is no file no.py",
    "generate --prompt a --policy mix(0.5*tova,0.5*no.py:Far)": "there is no file no.py",
    "perplexity --policies tova no.py:Far": "there is no file no.py",
    "compare --policies tova no.py:Far": "there is no file no.py",
    "ruler --policies tova no.py:Far": "there is no file no.py",
    "retention --out page.html --compare no.py:Far": "there is no file no.py",
    "perplexity --profile t": "t is a file; give a folder",
    "generate --prompt a --policy tvoa": "unknown policy 'tvoa', did you mean tova?",
    "perplexity --policies full snapkv+0": "at least 1",
    "serve --more-pools no:5": "unknown policy 'no'",
    "train --out run --data t --policy retenton": "Policies to be learned: retention, ",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_path_or_policy_is_told_before_anything_is_loaded(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    loaded = lambda *source, **how: pytest.fail("the model was loaded first")
    monkeypatch.setattr("jaxcompress.checkpoints.load", loaded)
    monkeypatch.setattr("jaxcompress.prompt.Compressor.load", loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("word " * 64)
    put(tmp_path / "latin-1", "latin-1")
    refused(run(*command.split()), WRONG[command])


def test_every_path_of_a_command_is_looked_at() -> None:
    later = {"out", "figure", "page", "kvpress"}  # files that are written: `check_writable`
    before = {"config", "haystack", "puzzles", "rows"}  # read before anything is loaded
    for kind in COMMANDS.values():
        for field in fields(kind):
            hint = get_type_hints(kind, include_extras=True)[field.name]
            marked = any(isinstance(mark, PathMark) for mark in getattr(hint, "__metadata__", ()))
            assert "Path" not in str(hint) or marked or field.name in later | before, (kind, field.name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*GENERATE, "--temperature", "nan"), "--temperature must be a number"),
        ((*GENERATE, "--seed", 10**30), "--seed must lie between"),
        ((*GENERATE, "--slots", 10**12), "--slots must lie between"),
        ((*GENERATE, "--top-k", 5), "--top-k does nothing at --temperature 0"),
        ((*GENERATE, "--chunk", 5), "--chunk is for --mode chunked"),
        ((*GENERATE, "--chunk", 0, "--mode", "chunked"), "--chunk must be at least 1"),
        ((*GENERATE, "--stop", ""), "not empty"),
        ((*GENERATE, "--stop-id", 300_000), "--stop-id 300000 is outside the vocabulary"),
        ((*GENERATE, "--stop-id", -1), "--stop-id -1 is outside"),
        ((*GENERATE, "--dtype", "int16"), "must be a floating-point type"),
        ((*GENERATE, "--dtype", "bf15"), "must be a floating-point type, not 'bf15'; known: float32"),
        ((*GENERATE, "--dtype", ""), "must be a floating-point type, not ''"),
        ((*GENERATE, "--shorten", 0), "--shorten must be in (0, 1]"),
        ((*GENERATE, "--policy", ""), "unknown policy ''"),
        ((*GENERATE, "--policy", "tova/every99999999999999999999"), ""),
        (("generate", "--file", "t", "--mode", "oneshot"), "use --mode streaming or chunked"),
        ((*GENERATE, "--seed", 1), "--seed does nothing at --temperature 0"),
        ((*GENERATE, "--policy", "full", "--placement", "slot"), "--placement does nothing for full"),
        (("perplexity", "--policies", "full", "--placement", "slot"), "--placement does nothing for full"),
        (("compare", "--policies", "full", "--placement", "compact"), "--placement does nothing for full"),
        (("compare", "--policies", "full", "--fractions", 4), "--fractions does nothing for full"),
        (("trace", "--out", "x", "--prompt", "a", "--policy", "full", "--placement", "slot"), "does nothing"),
        (("retention", "--out", "x", "--policy", "full", "--placement", "slot"), "--placement does nothing for full"),
        (("perplexity", "--context", 1), "--context must be 0"),
        (("perplexity", "--context", -5), "--context must be 0"),
        (("perplexity", "--rows", 0), "--rows must be at least 1"),
        (("perplexity", "--slots", 0), "--slots must be at least 1"),
        (("perplexity", "--prompt-tokens", 3), "--prompt-tokens is for --mode oneshot"),
        (("perplexity", "--context", 0, "--rows", 3), "--rows does nothing with --context 0"),
        (("perplexity", "--out", "."), "is a folder"),
        (("perplexity", "--figure", "x.jpgg"), "cannot be drawn into x.jpgg: give a name with one of ."),
        (("compare", "--figure", "x.txt"), "cannot be drawn into x.txt"),
        (("perplexity", "--out", "no/where.json"), "there is no folder no"),
        (("perplexity", "--context", 16, "--policies", "full", "--slots", 4), "--slots does nothing for full"),
        (("perplexity", "--context", 16, "--policies", "tova/once4", "--slots", 4), "the name says what is kept"),
        (("perplexity", "--context", 16, "--policies", "window+4", "--slots", 2), "too few: window+4 needs 5"),
        (("compare", "--context", 0), "--context must be at least 2"),
        (("compare", "--fractions", 0), "--fractions must be at least 1"),
        (("compare", "--context", 16, "--fractions", 32), "--context must"),
        (("trace", "--out", "t.npz", "--prompt-tokens", 1, "--file", "t", "--limit", 0), "--limit must be at least 1"),
        (("retention", "--out", "no/where.html"), "there is no folder no"),
        (("train", "--data", "t", "--out", "r", "--policy", "full", "--slots", 4), "--slots does nothing with"),
        (("train", "--data", "t", "--out", "r", "--ratio", 4), "--ratio does nothing with --policy tova"),
        (("train", "--data", "t", "--out", "r", "--policy", "dms", "--bptt-segments", 4), "which learns from plain"),
        (("train", "--data", "t", "--out", "r", "--split", "test"), "--split does nothing with files"),
        (("train", "--data", "t", "--out", "r", "--learning-rate", "nan"), "--learning-rate must be a number"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_settings(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("word " * 64)
    more = ("--file", "t") if arguments[0] in ("perplexity", "compare") else ()
    refused(run(*arguments, *more), says)


@pytest.mark.parametrize(
    "template", ['{{ raise_exception("roles must alternate") }}', "{% if %}", "{{ 1 + 'a' }}", "{{ a.b.c }}"]
)
def test_templates(run: Any, tmp_path: Path, folder: Path, template: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    refused(run(*GENERATE, "--chat", model=tmp_path / "model"), "chat template")


@pytest.mark.parametrize(
    "arguments", [("\udce9",), ("generate", "--prompt", "caf\udce9"), ("generate", "--stop=\udce9")]
)
def test_arguments_that_are_not_utf_8(run: Any, arguments: tuple[str, ...]) -> None:
    flag = next((a.partition("=")[0] for a in arguments if a.startswith("--")), "argument 1")
    refused(run(*arguments, model=None), f"{flag} is not UTF-8: byte 0xe9 in ")
    refused(run(*GENERATE, "--stop", "\ud83d", model=None), "--stop is not UTF-8: half of a character")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError("Unable to allocate 9 TiB"), 2, "out of memory (Unable to allocate 9 TiB); ask for fewer --slots"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n\nmore"), 2, "out of memory (RESOURCE_EXHAUSTED: Out of"),
        (ImportError("pip install x"), 2, "pip install x"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (ValueError("two\n  lines"), 2, "two lines"),
        (ValueError(), 2, "ValueError"),
        (FloatingPointError("not finite"), 1, "not finite"),
        (KeyError("x"), 3, "a fault of jaxcompress: KeyError: 'x' (test_bad_input.py, line "),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, says: str
) -> None:
    def fails(self: Info) -> None:
        raise error

    monkeypatch.setattr(Info, "run", fails)
    monkeypatch.setattr("jaxcompress.cli._silence", lambda: None)
    ran = Ran()
    ran.code, ran.err = main(["info"]), capsys.readouterr().err
    refused(ran, says, code=code)


def test_standard_streams_that_are_closed(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setattr(Info, "run", lambda self: None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert main(["info"]) == 0
    monkeypatch.setattr(sys, "stdin", None)
    refused(run("perplexity", "--file", "-"), "standard input is closed")


@pytest.mark.parametrize(
    "command",
    [
        ("perplexity", "--policies", "window", "tova", "--context", 0),
        ("trace", "--policy", "window", "--prompt-tokens", 8, "--out", "out"),
        ("retention", "--policy", "window", "--compare", "tova", "--out", "out"),
    ],
    ids=lambda command: command[0],
)
def test_positions_that_the_model_does_not_know_are_told_once(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[Any, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t").write_text("a " * 70)
    ran = run(*command, "--slots", 4, "--file", "t")
    assert (ran.code, ran.err.count("\n")) == (0, 1), ran.err
    assert "the model was trained for 128" in ran.err


def test_perplexity_tells_what_it_leaves_out(run: Any, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a b c d " * 20)
    how = ("perplexity", "--policies", "window", "--slots", 4, "--file", tmp_path / "t", "--context", 16, "--rows", 2)
    ran = run(*how)
    assert "reads 2 of " in ran.err
    table = run(*how, "--json").json
    (row,) = table["table"]
    assert row["tokens"] + row["left_out"] == table["of"] > table["read"]
    assert ran.endswith(f"\n30 of the text's {table['of']} tokens are predicted, {row['left_out']} left out\n")

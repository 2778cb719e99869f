"""The commands of the README and of the documentation: each is one that its program takes."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT, name

from jaxcompress.cli import command_of, main
from jaxcompress.embedded.corpus import held_out

EXPERIMENTS = ROOT / "experiments"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
PROGRAM = re.compile(r"^(?:jaxcompress [a-z-]+|make [a-z-]+|(?:python )?experiments/\w+\.py)\b")


def in_blocks(text: str) -> list[str]:
    """Lines of shell blocks, comments left out and continued lines joined."""
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if line.strip()]


def simple(line: str) -> list[list[str]]:
    """The commands of a line as words: those of a pipe apart, without redirections."""
    found: list[list[str]] = [[]]
    words = iter(shlex.split(line, comments=True))
    for word in words:
        if word == "|":
            found.append([])
        elif word == ">":
            next(words)
        else:
            found[-1].append(word)
    return found


def in_sentences(text: str) -> list[str]:
    """Commands between the words of a page."""
    flat = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in INLINE.findall(flat)]
    return [span for span in spans if PROGRAM.match(span)]


def ours(lines: list[str]) -> list[list[str]]:
    """The commands whose programs are ours."""
    return [words for line in lines for words in simple(line) if PROGRAM.match(" ".join(words))]


def commands(page: Path) -> list[list[str]]:
    text = page.read_text(encoding="utf-8")
    return ours(in_blocks(text) + in_sentences(text))


EVERY = [(name(page), words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", [words for _, words in EVERY], ids=[f"{page}: {' '.join(w)}" for page, w in EVERY])
def test_a_command_is_taken_by_its_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = [word for word in words if word not in ("python", "...")]
    program, given = given[0], given[1:]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert given[0] in targets
    elif program == "jaxcompress":
        every = {
            "train": {"--data": "books", "--out": "no/run"},
            "retention": {"--out": "page.html"},
            "board": {"--rows": "rows.jsonl"},
        }
        needed = every.get(given[0], {})
        more = [word for flag, value in needed.items() if flag not in given for word in (flag, value)]
        command_of([*given, *more])
    else:
        monkeypatch.syspath_prepend(EXPERIMENTS)
        if "*" in program:
            assert list(ROOT.glob(program))
            return
        script = importlib.import_module(Path(program).stem)
        arguments = importlib.import_module("command").arguments
        assert isinstance(arguments(script.QUICK, given), type(script.QUICK))


def test_what_a_block_installs_has_the_commands_that_follow() -> None:
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            extras = re.findall(r'pip install "jaxcompress\[([a-z,-]+)\]"', block)
            if extras and re.search(r"^jaxcompress ", block, re.MULTILINE):
                assert {"cli", "all"} & set(extras[0].split(",")), f"{name(page)} installs {extras[0]} only"


def test_no_block_is_left_out() -> None:
    """Only blocks that say their language are read."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= {"sh", "python", "bibtex"}, page


# The README's commands as they stand, followed by sizes for seconds. Those of compare, train and vision-demo run in
# their own tests.
SHORT = {
    "generate": "--max-new-tokens 4 --slots 16",
    "perplexity": "--context 64 --rows 1 --slots 16 32",
    "trace": "--slots 16 --prompt-tokens 32 --limit 64",
    "retention": "--slots 16 --limit 64",
    "compress-prompt": "",
}
BLOCKS = ours(in_blocks((ROOT / "README.md").read_text(encoding="utf-8")))
README = [words for words in BLOCKS if words[0] == "jaxcompress" and words[1] in SHORT]


@pytest.mark.parametrize("words", README, ids=" ".join)
def test_readme_commands_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = held_out("topics/assignment")[0].text[:400]
    for file in ("book.txt", "minutes.txt", "dracula.txt"):
        (tmp_path / file).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = [word for word in words if word not in ("--model", "smollm2")]  # a model that tests do not fetch
    with open("book.txt", encoding="utf-8") as book:
        monkeypatch.setattr("sys.stdin", book)
        assert main([*words[1:], *SHORT[words[1]].split()]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    out: Any = words[words.index("--out") + 1] if "--out" in words else None
    assert (tmp_path / out).stat().st_size if out else printed

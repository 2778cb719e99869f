"""jaxcompress compress-prompt: what it prints where, and what it says when something is wrong."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from jaxcompress.cli import compress_prompt, main
from jaxcompress.cli.compress_prompt import Protect
from jaxcompress.embedded import decoder_folder
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.prompt import KINDS, Compressor

FOLDER = Path(__file__).parents[1] / "fixtures" / "prompt" / "bert"
TEXT = "The harbor was quiet that night in 2021. Ships, ships, and more ships lay at anchor;\nnobody spoke. 会議は。"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "as it is")

    def run(*arguments: Any, text: str = TEXT) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8"))))
        code = main(["compress-prompt", "--model", str(FOLDER), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_from_standard_input(run: Any) -> None:
    compressor = Compressor.load(FOLDER)
    code, out, err = run("--tokens", 12, "--force", ".", "\\n", "--protect", "numbers")
    expected = compressor.compress(TEXT, tokens=12, force=[".", "\n"], protect=["numbers"])
    assert (code, out) == (0, expected.text + "\n")
    assert f"{expected.tokens_before} tokens to 12, ratio {expected.ratio:.2f}, {expected.saved} saved" in err


def test_files_and_json(run: Any, tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(TEXT, encoding="utf-8")
    code, out, _ = run("--file", *files, "--rate", 0.3, "--scope", "corpus", "--json", "--contexts", 1)
    printed = json.loads(out)
    assert code == 0
    assert printed["tokens_after"] == int(0.3 * printed["tokens_before"] + 0.5)
    assert len(printed["words"]) == len(printed["labels"]) == len(printed["scores"])


def test_shown_in_colour(run: Any) -> None:
    code, out, _ = run("--show")
    assert code == 0
    assert re.sub(r"\x1b\[[\d;]*m", "", out).rstrip("\n") == TEXT
    kept = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", out)
    (document,) = Compressor.load(FOLDER).compress(TEXT, protect=KINDS).documents
    assert kept == [word for word, label in zip(document.scored.words, document.labels, strict=True) if label]


def test_other_ways(run: Any) -> None:
    compressor = Compressor.load(FOLDER)
    assert run("--budget", "official")[1] == compressor.official.compress(TEXT).output["compressed_prompt"] + "\n"
    assert run("--stream")[1] == compressor.compress(TEXT, protect=KINDS).text + "\n"
    assert run("--stream", "--rate", 1, "--prompt", "a b", "--prompt", "c")[1] == "a b\n\nc\n"
    tagged = f"<llmlingua, compress=False>Keep this.</llmlingua><llmlingua, rate=0.2>{TEXT}</llmlingua>"
    assert (
        run("--structured", text=tagged)[1]
        == "Keep this." + compressor.compress(TEXT, rate=0.2, protect=KINDS).text + "\n"
    )
    assert json.loads(run("--json-text", text=json.dumps({"a": TEXT}))[1]) == {
        "a": compressor.compress(TEXT, protect=KINDS).text
    }
    assert run(text="")[:2] == (0, "\n")


def test_numbers_of_json_stay_as_they_are_written(run: Any) -> None:
    numbers = '[12345678901234567890.25, 1e5, 1E+400, -0.10, 12345678901234567890, null, true, {"é": "", "b": {}}]'
    assert run("--json-text", text=numbers)[:2] == (0, numbers + "\n")
    request = f'{{"seed": 0.30000000000000000001, "messages": [], "x": {numbers}}}'
    assert run("--messages", "-", text=request)[:2] == (0, request + "\n")
    halves = run("--json-text", text='{"a\\ud83d": NaN}')
    assert (halves[0], halves[1]) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", 0], "rate must be in (0, 1]"),
        (["--rate", 1.1, "--budget", "official"], "rate must be in (0, 1]"),
        (["--rate", 0.5, "--tokens", 5], "not both"),
        (["--reader", "/no/such/folder"], "--reader: there is no folder /no/such/folder"),
        (["--tokens", 1, "--force", "."], "more than the 1 asked for"),
        (["--stream", "--tokens", 5], "--stream takes --rate, not --tokens"),
        (["--stream", "--structured"], "structured and stream exclude each other"),
        (["--json-text"], "the text is not JSON"),
        (["--file", "no-such-file"], "no-such-file"),
        (["--budget", "official", "--json"], "do not go with official"),
        (["--budget", "official", "--protect", "urls"], "official knows --protect numbers only"),
        (["--protect", "no-urls", "numbers"], "not a mixture"),
        (["--rate", 0.05, "--force", ".", ","], "asked for; ask for at least"),
        (["--messages", "-", "--prompt", "a"], "give one of them"),
        (["--messages", "-"], "standard input is not JSON"),
        (["--roles", "user"], "--roles is for --messages"),
        (["--messages", "-", "--roles", "system"], "system is none of user, assistant"),
        (["--price", 3], "--price is for --report"),
        (["--report", "--reader-speed", 0], "--reader-speed must be above 0"),
    ],
)
def test_refused(run: Any, arguments: list[Any], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_tokens_of_the_reader(run: Any) -> None:
    tokens = lambda text: len(Tokenizer(decoder_folder()).encode(text, add_bos=False))
    code, out, err = run("--rate", 0.4, "--reader", "embedded")
    assert (code, tokens(out.removesuffix("\n"))) == (0, int(tokens(TEXT) * 0.4 + 0.5))
    assert f"{tokens(TEXT)} tokens to" in err
    assert run("--rate", 0.4, "--reader", decoder_folder(), "--stream")[1] == out


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress-prompt", "--model", "/no/such/folder"]) == 2
    assert "there is no folder /no/such/folder" in capsys.readouterr().err


def test_protected_by_default(run: Any) -> None:
    compressor = Compressor.load(FOLDER)
    text = "The ships lay there. " * 4 + "Do not open /etc/hosts in 2021."
    for flags, kinds in (
        ([], KINDS),
        (["--protect", "no-paths", "no-numbers"], ["negations"]),
        (["--protect", "none"], []),
    ):
        expected = compressor.compress(text, rate=0.5, protect=kinds).text  # pyright: ignore[reportArgumentType]
        assert run("--rate", 0.5, *flags, text=text)[1] == expected + "\n"
    assert set(get_args(Protect)) == {*KINDS, *(f"no-{kind}" for kind in KINDS), "none"}


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_binary_files_are_refused(run: Any, flags: list[str]) -> None:
    code, out, err = run(*flags, text="ELF\0\1")
    assert (code, out.strip()) == (2, "")
    assert "standard input has NUL characters, so it is binary" in err


def test_messages_and_report(run: Any) -> None:
    request = {"model": "m", "tools": [{"name": TEXT}], "messages": [{"role": "tool", "content": TEXT}]}
    flags = ["--rate", 0.5, "--messages", "-", "--report", "--price", 3, "--reader-speed", 1]
    code, out, err = run(*flags, text=json.dumps(request))
    shorter = json.loads(out)
    assert code == 0
    assert {**shorter, "messages": request["messages"]} == request
    assert 0 < len(shorter["messages"][0]["content"]) < len(TEXT)
    assert json.loads(run(*flags[:4], text=json.dumps(request["messages"]))[1]) == shorter["messages"]
    for told in (
        r"[\d.]+ s to compress \([\d,]+ tokens/s\)",
        r"less at 3 per million tokens",
        "pay.* for a reader of 1 tok",
    ):
        assert re.search(told, err), told


@pytest.mark.parametrize("flags", [[], ["--stream"], ["--messages", "-"], ["--budget", "official"]])
def test_seconds_are_those_of_compressing(run: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    """Not those of reading, printing and what is recovered: here only these take any."""
    now = 0.0

    def slow(function: Any) -> Any:
        def slowed(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += 100
            return function(*arguments, **options)

        return slowed

    module = "jaxcompress.cli.compress_prompt"
    monkeypatch.setattr(f"{module}.perf_counter", lambda: now)
    for name in ("read_text", "_without_nul", "_report", "_recovered"):
        monkeypatch.setattr(f"{module}.{name}", slow(getattr(compress_prompt, name)))
    text = json.dumps([{"role": "user", "content": TEXT}]) if "--messages" in flags else TEXT
    code, _, err = run("--report", *flags, text=text)
    assert (code, now >= 200) == (0, True)
    assert re.search(r"(?<!\d)0\.00 s to compress", err)

"""A file and a question about it in a chat template: what is read is what the template writes of the whole text."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import GREEDY, TEXT, folder, model, run, tokenizer  # noqa: F401  fixtures

from jaxcompress.cli.file_message import Pieces, frame, framed, joined, written
from jaxcompress.generation import Tokenizer, encode_stream, generate
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies import TOVA

# ruff: noqa: F811  pytest's fixtures

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
TRIMMING = PLAIN.replace("m.content", "m.content | trim")


@pytest.fixture(params=[PLAIN, TRIMMING], ids=["plain", "trimming"])
def chatty(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    return _with_template(folder, tmp_path, request.param)


def _with_template(folder: Path, tmp_path: Path, template: str) -> Path:
    shutil.copytree(folder, tmp_path / "chatty")
    (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
    return tmp_path / "chatty"


def cut(text: str, size: int) -> Iterator[str]:
    return (text[at : at + size] for at in range(0, len(text), size))


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("question", [None, "Who remembers? "])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_frame_makes_what_the_template_makes(
    chatty: Path, system: str | None, question: str | None, size: int
) -> None:
    tokenizer = Tokenizer(chatty)
    content = f" \n\n {TEXT} \n x {{{{ y }}}}  \n\n "
    whole = written(tokenizer, joined(content, question), system, {})
    around = frame(tokenizer, system, question, {})
    assert "".join(framed(around, cut(content, size))) == whole
    ids = np.concatenate(list(encode_stream(Pieces(framed(around, cut(content, size))), tokenizer, add_bos=False)))
    assert ids.tolist() == tokenizer.encode(whole, add_bos=False).tolist()


def test_generate_asks_about_a_file(
    run: Any, chatty: Path, model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(chatty)
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    how = ("--chat", "--system", "Be brief.", "--prompt", "Who?", *GREEDY, "--json")
    (told,) = run("generate", "--file", tmp_path / "book.txt", *how, model=chatty).json
    text = written(tokenizer, joined(TEXT, "Who?"), "Be brief.", {})
    ids = tokenizer.encode(text, add_bos=False)
    (tokens,) = np.concatenate(list(generate(model, [ids], TOVA(), 6, max_new_tokens=10, stream_every=8)), axis=1)
    assert told["text"] == tokenizer.decode(tokens)
    assert told["prompt"] == "Who?"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert run("generate", "--file", "-", *how, model=chatty).json == [told]


def test_a_system_message_goes_before_prompts(run: Any, chatty: Path, model: Decoder) -> None:
    tokenizer = Tokenizer(chatty)
    told = run(
        "generate", "--chat", "--system", "S", "--prompt", "a", "--prompt", "bc", *GREEDY, "--json", model=chatty
    )
    texts = [written(tokenizer, prompt, "S", {}) for prompt in ("a", "bc")]
    ids = [tokenizer.encode(text, add_bos=False) for text in texts]
    tokens = np.concatenate(list(generate(model, ids, TOVA(), 6, max_new_tokens=10, stream_every=8)), axis=1)
    assert [row["text"] for row in told.json] == [tokenizer.decode(row) for row in tokens]


@pytest.mark.parametrize(
    "change", ["m.content | upper", "m.content | e", "m.content[:9]", "m.content | replace('b', '')"]
)
def test_a_template_that_changes_the_content(run: Any, folder: Path, tmp_path: Path, change: str) -> None:
    changing = _with_template(folder, tmp_path, PLAIN.replace("m.content", change))
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    ran = run("generate", "--chat", "--file", tmp_path / "book.txt", model=changing)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "changes the content of a message" in ran.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt", "a", "--system", "S"), "--system is for --chat"),
        (("--prompt", "a", "--template-args", "{{}}"), "--template-args is for --chat"),
        (("--chat", "--prompt", "a", "--template-args", "[1]"), "--template-args must be a JSON object"),
        (("--chat", "--prompt", "a", "--template-args", "x"), "--template-args"),
        (("--chat", "--system", "S"), "give --prompt or --file"),
        (("--chat", "--file", __file__, "--prompt", "a", "--prompt", "c"), "--file takes one --prompt, not 2"),
        (("--file", __file__, "--prompt", "a"), "with --chat, --prompt is a question about the file"),
        (("--chat", "--file", "nowhere"), "nowhere"),
        (("--chat", "--file", "{empty}", "--prompt", "a"), "is empty"),
    ],
)
def test_what_is_wrong(run: Any, folder: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    chatty = _with_template(folder, tmp_path, PLAIN)
    (tmp_path / "empty").write_text("")
    ran = run("generate", *(argument.format(empty=tmp_path / "empty") for argument in arguments), model=chatty)
    assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
    assert says in ran.err

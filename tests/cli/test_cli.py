"""The command line, on a tiny model folder: what it prints and writes, and what it says when something is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import tiny_decoder
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

import jaxcompress
from jaxcompress.checkpoints import save
from jaxcompress.cli import COMMANDS, main
from jaxcompress.evaluation.perplexity import Perplexity
from jaxcompress.evaluation.results import read_rows
from jaxcompress.evaluation.sweep import Row
from jaxcompress.evaluation.tracing import Trace, trace
from jaxcompress.generation import Tokenizer, generate
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies import TOVA
from jaxcompress.policies.names import NAMES

SENTENCE = "The slots of a small memory hold what the newest query looked at; the rest is gone.\n"
TEXT = SENTENCE + "Grüße, 你好 😀: nobody remembers everything.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte-level tokenizer that begins a text with nothing."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    source = tmp_path_factory.mktemp("tokenizer")
    fast.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return save(decoder(fast.get_vocab_size()), tmp_path_factory.mktemp("models") / "tiny", tokenizer_from=source)


def decoder(vocabulary: int) -> Decoder:
    return tiny_decoder(vocabulary, max_position=128)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return decoder(tokenizer.vocab_size)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


class Ran(str):
    """What a command printed; `code`, `err`."""

    code: int
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self)


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "as it is")  # then the command leaves the tests' own alone

    def run(command: str, *arguments: Any, model: Path | None = folder) -> Ran:
        given = [] if model is None else ["--model", str(model)]
        code = main([command, *map(str, arguments), *given])
        printed = capsys.readouterr()
        ran = Ran(printed.out)
        ran.code = code
        ran.err = re.sub(r"jaxcompress: step \d+ of .* s left\n", "", printed.err)  # told where it takes long
        return ran

    return run


GREEDY = ("--policy", "tova", "--slots", 6, "--max-new-tokens", 10)


def expected(model: Decoder, tokenizer: Tokenizer, *prompts: str) -> list[np.ndarray]:
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    return list(np.concatenate(list(generate(model, ids, TOVA(), 6, max_new_tokens=10, stream_every=8)), axis=1))


class TestGenerate:
    """jaxcompress generate"""

    def test_writes_on(self, run: Any, model: Decoder, tokenizer: Tokenizer) -> None:
        ran = run("generate", "--prompt", SENTENCE, *GREEDY)
        (tokens,) = expected(model, tokenizer, SENTENCE)
        assert ran.code == 0
        assert ran.rstrip("\n") == tokenizer.decode(tokens).rstrip("\n")
        as_json = run("generate", "--prompt", SENTENCE, *GREEDY, "--json").json
        assert as_json == [dict(prompt=SENTENCE, text=tokenizer.decode(tokens), tokens=10, stopped=False)]

    def test_several_prompts_are_a_batch(self, run: Any, model: Decoder, tokenizer: Tokenizer) -> None:
        ran = run("generate", "--prompt", SENTENCE, "--prompt", "The rest", *GREEDY, "--json").json
        tokens = expected(model, tokenizer, SENTENCE, "The rest")
        assert [row["text"] for row in ran] == [tokenizer.decode(row) for row in tokens]
        plain = run("generate", "--prompt", SENTENCE, "--prompt", "The rest", *GREEDY)
        assert plain.startswith(f"--- 0: {SENTENCE}\n{ran[0]['text']}\n--- 1: The rest\n")

    def test_a_file_is_a_prompt(
        self, run: Any, text: Path, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tokens,) = expected(model, tokenizer, TEXT)
        ran = run("generate", "--file", text, *GREEDY, "--json").json
        assert ran == [dict(prompt=str(text), text=tokenizer.decode(tokens), tokens=10, stopped=False)]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        assert run("generate", "--file", "-", *GREEDY, "--json").json[0]["text"] == ran[0]["text"]

    def test_stops_at_a_text_that_it_does_not_print(self, run: Any, model: Decoder, tokenizer: Tokenizer) -> None:
        free = tokenizer.decode(expected(model, tokenizer, SENTENCE)[0])
        stop = next(character for character in free[1:] if character.isalnum())
        (ran,) = run("generate", "--prompt", SENTENCE, *GREEDY, "--stop", "never", "--stop", stop, "--json").json
        assert ran["stopped"]
        assert ran["tokens"] <= 10
        assert ran["text"] == free[: free.index(stop)]

    def test_warns_of_positions_that_the_model_has_not_seen(self, run: Any) -> None:
        how = ("generate", "--prompt", "The", "--policy", "window", "--slots", 4)
        assert run(*how, "--max-new-tokens", 130).err.count("--placement slot or compact") == 1
        assert run(*how, "--max-new-tokens", 10).err == ""


def test_perplexity(run: Any, text: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "rows.jsonl", tmp_path / "figure.png"
    how = ("--file", text, "--context", 16, "--rows", 2, "--policies", "full", "tova", "--slots", 8, 4)
    ran = run("perplexity", *how, "--json", "--out", out, "--figure", figure)
    assert ran.code == 0
    table = ran.json
    rows = read_rows(out)
    assert [row.figure.details for row in rows] == table["table"]
    assert [(row.cell.experiment, row.cell.policy, row.cell.slots, row.cell.context) for row in rows] == [
        ("perplexity", row["policy"], row["slots"], 16) for row in table["table"]
    ]
    assert [row.figure.value for row in rows] == [row["nats"] for row in table["table"]]
    assert (table["rows"], table["context"], table["text"]) == (2, 16, str(text))
    assert [(row["policy"], row["slots"]) for row in table["table"]] == [("full", 16), ("tova", 4), ("tova", 8)]
    assert all(tuple(row) == Row._fields for row in table["table"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "rows.jsonl", "text.txt"]
    again = run("perplexity", *how, "--json", "--out", out)
    assert again.json == table
    assert "3 cells were in" in again.err
    assert read_rows(out) == rows


def test_perplexity_draws_what_could_be_measured(
    run: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(model: Any, tokens: Any, policy: Any, slots: int, **how: Any) -> Perplexity:
        if slots == 4:
            raise ValueError("it broke")
        return Perplexity(2.0, 10, 1.0, 1)

    monkeypatch.setattr(sys.modules["jaxcompress.evaluation.sweep"], "perplexity", measured)
    figure = tmp_path / "figure.svg"
    how = ("--file", text, "--context", 16, "--policies", "tova", "--slots", 4, 8, "--figure", figure)
    ran = run("perplexity", *how)
    assert (ran.code, figure.exists()) == (4, True), ran.err
    assert ran.splitlines()[-1].endswith("left out")
    assert "1 of 2 cells failed" in ran.err


def test_perplexity_of_one_endless_row_is_a_table(run: Any, text: Path) -> None:
    ran = run("perplexity", "--file", text, "--context", 0, "--policies", "window", "--slots", 4, 8)
    lines = ran.splitlines()
    assert lines[0].split()[:3] == ["policy", "slots", "perplexity"]
    assert [line.split()[:2] for line in lines[1:-1]] == [["window", "4"], ["window", "8"]]
    assert lines[-1].endswith("tokens are predicted, 0 left out")


def test_an_interrupted_sweep_leaves_what_was_finished(
    run: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "rows.jsonl", []

    def interrupted(*arguments: Any, **how: Any) -> Perplexity:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Perplexity(2.0, 10, 1.0, 1)

    monkeypatch.setattr(sys.modules["jaxcompress.evaluation.sweep"], "perplexity", interrupted)
    ran = run(
        "perplexity", "--file", text, "--context", 16, "--policies", "tova", "--slots", 2, 4, 8, "--json", "--out", out
    )  # fmt: skip
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert [row["slots"] for row in ran.json["table"]] == [row.cell.slots for row in read_rows(out)] == [2, 4]


TRACED = ("--prompt-tokens", 6, "--mode", "oneshot", "--policy", "tova", "--slots", 4)


def _check_trace(out: Path, model: Decoder, ids: np.ndarray) -> None:
    with np.load(out) as file:
        arrays = dict(file)
    batch, total = ids.shape
    steps = total - 6 + 1
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        "positions": ((2, steps, batch, 1, 5), np.int32),
        "logits": ((steps, batch, model.config.vocab_size), np.float32),
        "death": ((2, batch, 1, total), np.int32),
    }
    same = trace(model, ids, TOVA(), 4, prompt=6)
    np.testing.assert_array_equal(arrays["positions"], same.positions)
    np.testing.assert_array_equal(arrays["death"], same.death)
    np.testing.assert_allclose(arrays["logits"], same.logits, atol=1e-4)


@pytest.mark.parametrize("batch", [None, 2])
def test_trace_of_tokens(run: Any, tmp_path: Path, model: Decoder, batch: int | None) -> None:
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch or 1, 12))
    np.save(tmp_path / "ids.npy", ids[0] if batch is None else ids)
    ran = run("trace", "--token-ids", tmp_path / "ids.npy", "--out", tmp_path / "trace.npz", *TRACED)
    assert ran.code == 0
    assert f"2 layers, 7 steps, batch {batch or 1}, 1 set of slots" in ran
    _check_trace(tmp_path / "trace.npz", model, ids.astype(np.int32))


def test_the_picture_of_a_trace_names_all_capacities(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    fake = Trace(np.zeros((2, 3, 1, 1, 4), np.int32), np.zeros((3, 1, 9), np.float32), np.zeros((2, 1, 1, 8), np.int32))
    draw = lambda trace, path, title: titles.append(title)
    monkeypatch.setattr("jaxcompress.evaluation.tracing.trace", lambda *_, **__: fake)
    monkeypatch.setattr("jaxcompress.evaluation.figures.death_times", draw)
    np.save(tmp_path / "ids.npy", np.arange(8))
    how = ("--policy", "tova", "--slots", 4, 3, "--prompt-tokens", 6, "--figure", tmp_path / "drawn.png")
    assert run("trace", "--token-ids", tmp_path / "ids.npy", "--out", tmp_path / "trace.npz", *how).code == 0
    assert titles == ["tova, 4, 3 slots"]


def test_trace_of_tokens_needs_no_tokenizer(run: Any, folder: Path, tmp_path: Path, model: Decoder) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    ids = np.arange(12)
    np.save(tmp_path / "ids.npy", ids)
    out = tmp_path / "trace.npz"
    assert run("trace", "--token-ids", tmp_path / "ids.npy", "--out", out, *TRACED, model=bare).code == 0
    _check_trace(out, model, ids[None].astype(np.int32))


def test_trace_of_text(run: Any, text: Path, tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    out, figure = tmp_path / "trace.npz", tmp_path / "deaths.png"
    assert run("trace", "--file", text, "--limit", 12, "--out", out, "--figure", figure, *TRACED).code == 0
    _check_trace(out, model, tokenizer.encode(TEXT)[None, :12])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_info(run: Any) -> None:
    facts = run("info", "--json", model=None).json
    assert facts["policies"] == [*NAMES, "learned"]
    assert {"jax", "flax"} <= facts["versions"].keys()
    assert facts["devices"]
    assert facts["attention"] == "jnp on cpu"
    assert (facts["compiled"], facts["compiled_mib"]) == ("as it is", 0)
    plain = run("info", model=None)
    assert re.search(r"policies +full, window", plain)


class TestWrong:
    """What went wrong and the exit code."""

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (
                ("generate", "--prompt", "a", "--policy", "tovaa"),
                "unknown policy 'tovaa', did you mean tova?; known: full, window",
            ),
            (("generate", "--prompt", "a", "--slots", 0), "at least 1 slot per layer, slots=0"),
            (("generate", "--prompt", "a", "--slots", 4, 4, 4), "slots has 3 entries, the model has 2 layers"),
            (("generate", "--prompt", "a", "--max-new-tokens", 0), "--max-new-tokens must be at least 1, not 0"),
            (("generate", "--prompt", ""), "prompt 0 is empty"),
            (("generate",), "give --prompt or --file"),
            (("generate", "--prompt", "a", "--file", __file__), "give --prompt or --file, not both"),
            (("generate", "--prompt", "a", "--chat"), "has no chat template"),
            (("generate", "--prompt", "a", "--temperature", -1), "temperature must be"),
            (("generate", "--prompt", "a", "--policy", "full", "--slots", 4), "do not fit into the 4 slots"),
            (("generate", "--file", "nowhere.txt"), "nowhere.txt"),
            (("perplexity", "--file", "nowhere.txt"), "nowhere.txt"),
            (("trace", "--prompt-tokens", 3, "--out", "x.npz"), "give one of --file, --prompt and --token-ids"),
            (("trace", "--prompt-tokens", 3, "--out", "x.npz", "--token-ids", "nowhere.npy"), "nowhere.npy"),
        ],
    )
    def test_arguments(self, run: Any, arguments: tuple[Any, ...], says: str) -> None:
        ran = run(*arguments)
        assert ran.code == 2
        assert ran.err.startswith("jaxcompress: ")
        assert says in ran.err
        assert "Traceback" not in ran.err

    def test_a_folder_that_is_not_there(self, run: Any, tmp_path: Path) -> None:
        ran = run("generate", "--prompt", "a", model=tmp_path / "nothing")
        assert (ran.code, ran.err) == (2, f"jaxcompress: there is no folder {tmp_path / 'nothing'}\n")

    @pytest.mark.parametrize(
        "command",
        [("generate", "--file"), ("perplexity", "--file"), ("trace", "--out", "x.npz", "--prompt-tokens", 1, "--file")],
        ids=lambda command: command[0],
    )
    @pytest.mark.parametrize(
        ("data", "says"), [(b"caf\xe9 au lait", "0xe9 at offset 3"), (b"", "")], ids=["latin-1", "empty"]
    )
    def test_files(self, run: Any, tmp_path: Path, command: tuple[Any, ...], data: bytes, says: str) -> None:
        path = tmp_path / "wrong.txt"
        path.write_bytes(data)
        ran = run(*command, path)
        assert ran.code == 2
        assert ran.err.startswith("jaxcompress: ")
        assert says in ran.err

    @pytest.mark.parametrize(
        ("ids", "says"),
        [
            (np.array([1, 2, 70_000, 3]), "token id 70000 at index 2 is outside the vocabulary"),
            (np.array([1, -2, 3]), "token id -2 at index 1"),
            (np.array([1.5, 2.5]), "holds float64 (2,); expected integers"),
            (np.zeros((1, 2, 3), int), "expected integers, [tokens] or [batch, tokens]"),
        ],
    )
    def test_token_files(self, run: Any, tmp_path: Path, ids: np.ndarray, says: str) -> None:
        np.save(tmp_path / "ids.npy", ids)
        ran = run("trace", "--token-ids", tmp_path / "ids.npy", "--prompt-tokens", 1, "--out", tmp_path / "trace.npz")
        assert ran.code == 2
        assert says in ran.err
        assert not (tmp_path / "trace.npz").exists()

    @pytest.mark.parametrize("value", [np.nan, 3e38], ids=["weights", "logits"])
    def test_numbers(self, run: Any, tmp_path: Path, folder: Path, model: Decoder, value: float) -> None:
        name = "norm" if np.isnan(value) else "head"
        spoil = lambda path, x: x.at[0].set(value) if jax.tree_util.keystr(path).startswith(f".{name}") else x
        spoilt = save(
            jax.tree_util.tree_map_with_path(spoil, model), tmp_path / "spoilt", tokenizer_from=folder
        )  # fmt: skip
        for command in [
            ("generate", "--prompt", SENTENCE, *GREEDY),
            ("perplexity", "--file", tmp_path / "text.txt", "--context", 0, "--policies", "tova", "--slots", 4),
            ("trace", "--file", tmp_path / "text.txt", "--limit", 12, "--out", tmp_path / "trace.npz", *TRACED),
        ]:
            (tmp_path / "text.txt").write_text(SENTENCE)
            ran = run(*command, model=spoilt)
            measured = command[0] == "perplexity" and not np.isnan(value)  # a sweep goes on
            assert ran.code == (4 if measured else 1)
            assert "finite" in ran.err

    def test_unknown_words_are_refused_by_the_parser(self, run: Any) -> None:
        for arguments, says in [
            (("nothing",), "unknown command 'nothing'; known: demo, "),
            (("generate", "--prompt", "a", "--mode", "whole"), "invalid choice 'whole' for argument '--mode'"),
            (("generate", "--promt", "a"), "unrecognized options: --promt, a; perhaps you meant --prompt; see "),
            (("generate", "--seed", "x"), "error parsing --seed"),
            (("trace",), "missing: --out; see jaxcompress trace --help"),
            (("perplexity", "--slots"), "--slots needs at least one value"),
            (("train", "--out", "run"), "missing: --data; see jaxcompress train --help"),
            (("train", "--config"), "missing value for argument '--config'"),
        ]:
            ran = run(*arguments, model=None)
            assert (ran.code, ran.err.count("\n"), ran) == (2, 1, "")
            assert ran.err.startswith("jaxcompress: ")
            assert says in ran.err

    def test_no_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        assert capsys.readouterr().err.startswith("jaxcompress: give a command: demo, chat, compare, ")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert not caught.value.code
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"Example: {'cat book.txt | ' * (command == 'generate')}jaxcompress {command}" in shown
    assert "{None}" not in shown  # a flag that may be left out shows what it takes


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxcompress {jaxcompress.__version__}\n"
    assert main(["--version", "info"]) == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error(unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxcompress.cli", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()
    assert (process.returncode, complaint) == (0, b"")


@pytest.mark.slow
def test_a_trace_is_written(tmp_path: Path) -> None:
    short = ("--prompt", "def", "--slots", "8", "--max-new-tokens", "1")
    assert main(["generate", *short, "--profile", str(tmp_path / "trace")]) == 0
    assert [*(tmp_path / "trace").rglob("*.xplane.pb")]

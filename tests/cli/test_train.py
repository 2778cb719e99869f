"""jaxcompress train: from text to a folder that `load` opens, stopped and taken up again, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import folder, model, run, tokenizer  # noqa: F401  fixtures

from jaxcompress.checkpoints import load, save
from jaxcompress.cli import command_of, main
from jaxcompress.cli.train import Train, train_defaults
from jaxcompress.cli.train.command import _optimizer
from jaxcompress.cli.train.presets import PRESETS
from jaxcompress.cli.train.record import recorded_settings, unchanged
from jaxcompress.models.decoder import Decoder
from jaxcompress.pallas_kernels import devices
from jaxcompress.training import checkpointing, trainer
from jaxcompress.training.loss import token_losses
from jaxcompress.training.optimizer import SCHEDULES

# ruff: noqa: F811  pytest's fixtures

SMALL = ("--length", 16, "--rows", 2, "--steps", 6, "--save-every", 2, "--warmup", 1, "--learning-rate", 3e-3)
FULL = ("--policy", "full", *SMALL)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [f"The slots of memory {i} hold what the newest query looked at; the rest is gone.\n" for i in range(40)]
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("".join(lines))
    return path


def curve(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("tokens_per_second", "mfu")} for row in rows]


class TestTrain:
    """A whole run with plain attention."""

    @pytest.fixture(scope="class")
    def done(self, tmp_path_factory: pytest.TempPathFactory, book: Path, folder: Path) -> tuple[Path, str]:
        """Where the run is, and what it printed."""
        out, told = tmp_path_factory.mktemp("runs") / "a", io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(told):
            patch.setenv("JAX_COMPILATION_CACHE_DIR", "as it is")
            assert main(["train", "--data", str(book), "--out", str(out), *map(str, FULL), "--model", str(folder)]) == 0
        return out, told.getvalue()

    @pytest.fixture
    def out(self, done: tuple[Path, str]) -> Path:
        return done[0]

    def test_trains_and_saves(self, done: tuple[Path, str], model: Decoder, folder: Path) -> None:
        out, told = done
        before, after = (float(x) for x in re.findall(r"held-out loss .*: (\d+\.\d+)", told))
        assert after < before - 0.1
        rows = curve(out)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert {"loss", "gradient_norm", "parameter_norm", "tokens", "learning_rate"} <= rows[0].keys()
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["4", "6"]
        trained = load(out / "model")
        assert trained.config == model.config
        assert (out / "model" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        policy = trained.saved_policy
        assert policy is not None
        assert policy.name == "full"
        moved = [
            float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (trained.model, model)), strict=True)
        ]
        assert min(moved) > 0

    def test_a_run_is_not_overwritten(self, run: Any, book: Path, out: Path) -> None:
        ran = run("train", "--data", book, "--out", out, *FULL)
        assert ran.code == 2
        assert f"{out} holds a run already; give --resume" in ran.err

    def test_a_finished_run_tells_again(self, run: Any, out: Path) -> None:
        """Even if an older version began it, which knew fewer settings."""
        lines = (out / "metrics.jsonl").read_bytes()
        record = json.loads((out / "run.json").read_text())
        for name in ("recent", "mode", "preset"):
            del record["settings"][name]
        (out / "run.json").write_text(json.dumps(record))
        ran = run("train", "--out", out, "--resume", model=None)
        assert ran.code == 0
        assert "continuing from step 6" in ran
        assert len(re.findall(r"held-out loss .*: (\d+\.\d+)", ran)) == 2
        assert (out / "metrics.jsonl").read_bytes() == lines

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--steps", 3), "the run in {out} has taken 6 steps; --steps 3 is less: give more"),
            (("--seed", 1), "--seed was 0"),
            (("--data", "{other}"), "{other} has changed since the run in {out} began: "),
            (("--optimizer", "muon"), "checkpoint {out}/checkpoints/6 is of another model or optimizer: optimizer.1."),
            (("--model", "{wide}"), "params.layers.attention.key_norm.scale is absent there, [2, 8] float32 here"),
            (("--model", "{moved}"), "holds other weights than when the run in {out} began"),
        ],
    )
    def test_a_run_goes_on_as_it_began(
        self, run: Any, out: Path, tmp_path: Path, folder: Path, model: Decoder, arguments: Any, says: str
    ) -> None:
        from tiny import tiny_decoder

        names = dict(out=out, other=tmp_path / "other.txt", wide=tmp_path / "wide", moved=tmp_path / "moved")
        save(jax.tree.map(lambda x: 2 * x, model), names["moved"], tokenizer_from=folder)
        (tmp_path / "other.txt").write_text("Another text. " * 200)
        save(
            tiny_decoder(model.config.vocab_size, max_position=128, qk_norm=True), names["wide"], tokenizer_from=folder
        )
        given = [str(argument).format(**names) for argument in arguments]
        if arguments[-1] in ("{other}", "{moved}"):  # the same name, other contents
            settings = json.loads((out / "run.json").read_text())
            changed = tmp_path / "run"
            changed.mkdir()
            (changed / "checkpoints").symlink_to(out / "checkpoints")
            settings["settings"][given[0].strip("-")] = given[1]
            (changed / "run.json").write_text(json.dumps(settings))
            names["out"], given = changed, []
        ran = run("train", "--out", names["out"], "--resume", *given, model=None)
        assert ran.code == 2
        assert says.format(**names) in ran.err
        assert ran.err.count("\n") == 1


def test_a_run_that_was_stopped_goes_on(run: Any, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("train", "--data", book, "--out", tmp_path / "whole", *FULL).code == 0
    cut = tmp_path / "cut"
    real = checkpointing.Checkpoints.save

    def stopped(self: Any, step: int, state: Any, data: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        real(self, step, state, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.Checkpoints, "save", stopped)
        assert run("train", "--data", book, "--out", cut, *FULL).code == 130
    assert len(curve(cut)) == 4
    ran = run("train", "--out", cut, "--resume", "--save-every", 3, model=None)
    assert "continuing from step 2" in ran
    assert curve(cut) == curve(tmp_path / "whole")
    assert "--save-every is 3 from now on; it was 2" in ran
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (cut, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_a_finished_run_is_extended(run: Any, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates are those of a run of so many steps, and the model is that of the last one. What is told of held-out
    rows is of the last step, where schedules end. Numbers stay what they were on another kind of device."""
    out, measured, make = tmp_path / "run", [], trainer.make_measure
    spy = lambda *given, **how: measured.append((how["step"], how["compute_dtype"])) or make(*given, **how)
    monkeypatch.setattr(trainer, "make_measure", spy)
    assert run("train", "--data", book, "--out", out, *FULL, "--steps", 2).code == 0
    first = (out / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(devices, "device", lambda: ("tpu", "TPU v4"))
    ran = run("train", "--out", out, "--resume", "--steps", 4, model=None)
    assert ran.code == 0, ran.err
    assert "--steps is 4 from now on; it was 2" in ran
    assert "learning rate: to 0.003 in 1 steps, then cosine to step 4; " in ran
    assert "held-out loss after 4 steps" in ran
    rows, schedule = curve(out), SCHEDULES["cosine"](3e-3, 4, warmup=1)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    np.testing.assert_allclose([row["learning_rate"] for row in rows[2:]], [schedule(2), schedule(3)], 1e-5)
    assert (out / "model" / "model.safetensors").read_bytes() != first
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "metrics.jsonl", "model", "run.json"]
    assert json.loads((out / "run.json").read_text())["settings"]["steps"] == 4
    assert measured == [(1, "float32"), (3, "float32")]


def test_a_run_goes_on_with_the_policy_it_began_with(tmp_path: Path) -> None:
    how, path = Train(data="x", out=tmp_path, policy="my.py:Far"), tmp_path / "run.json"
    data, made = dict(tokens=9, checksum=1), dict(base="b", policy_hash="old")
    path.write_text(json.dumps(dict(data=data, settings=recorded_settings(how), **made)))
    assert unchanged(how, path, data, made, 1)["policy_hash"] == "old"
    with pytest.raises(ValueError, match="the code of --policy my.py:Far has changed since the run in"):
        unchanged(how, path, data, made | dict(policy_hash="new"), 1)


def test_adapters(run: Any, book: Path, folder: Path, model: Decoder, tmp_path: Path) -> None:
    """They change what they are beside and nothing else; a warmup that does not fit is told."""
    out = tmp_path / "run"
    ran = run("train", "--data", book, "--out", out, *FULL, "--lora", 2, "--warmup", 20, "--learning-rate", 0.1)
    assert (ran.code, ran.err) == (0, "")
    assert "learning rate: to 0.1 in 5 steps (--warmup 20 does not fit into 6 steps), then cosine to step 6" in ran
    before, after = (float(x) for x in re.findall(r"held-out loss .*: (\d+\.\d+)", ran))
    assert after < before
    moved = {
        jax.tree_util.keystr(path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(load(out / "model").model), jax.tree.leaves(model), strict=True
        )
        if (a != b).any()
    }
    assert moved == {f".layers.attention.{name}.kernel.value" for name in ("query", "key", "value", "out")}


def test_the_loss_is_that_of_the_rows(run: Any, tmp_path: Path, model: Decoder) -> None:
    """Token ids through the whole command: what is told as held-out loss is the model's on the last row."""
    ids = np.random.default_rng(0).integers(2, model.config.vocab_size, 16 * 4 - 2).tolist()
    (tmp_path / "ids.jsonl").write_text(json.dumps({"tokens": ids}))  # and </s>, <s>: four rows
    ran = run("train", "--data", tmp_path / "ids.jsonl", "--out", tmp_path / "run", *FULL, "--steps", 1)
    told = float(re.findall(r"held-out loss before: (\d+\.\d+)", ran)[0])
    row = jnp.array([[0, *ids[48:], 1, 0]])
    losses = jax.jit(lambda model: token_losses(model(row[:, :-1]), row[:, 1:]))(model)
    assert told == pytest.approx(float(losses[0, :-1].mean()), abs=2e-4)  # <s> after </s> is not learned


def test_nothing_is_held_out(run: Any, book: Path, tmp_path: Path) -> None:
    ran = run("train", "--data", book, "--out", tmp_path / "run", *FULL, "--steps", 2, "--held-out", 0)
    assert (ran.code, ran.err, "held-out" in ran) == (0, "", False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--data", "{book}", "--rows", 0), "--rows must be at least 1, not 0"),
        (("--data", "{book}", "--warmup", -1), "--warmup must be at least 0, not -1"),
        (("--data", "{book}", "--bptt-segments", 0), "--bptt-segments must be at least 1, not 0"),
        (("--data", "{book}", "--held-out", -5), "--held-out must be at least 0, not -5"),
        (("--data", "{book}", "--clip", 0), "--clip must be above 0, not 0"),
        (("--data", "{book}", "--learning-rate", -1), "--learning-rate must be above 0, not -1"),
        (("--data", "{book}", "--weight-decay", -0.1), "--weight-decay must be at least 0, not -0.1"),
        (
            ("--data", "{book}", "--policy", "learned"),
            "no policy was trained for the model",
        ),
        (
            ("--data", "{book}", "--policy", "learned/every4"),
            "--policy learned/every4: a model is trained through its own policy as that is; give --policy learned, and",
        ),
        (
            ("--data", "{book}", "--policy", "learned", "--from-learned"),
            "--from-learned does nothing with --policy learned, whose network stays as it is",
        ),
        (
            ("--data", "{book}", "--from-learned", "--policy", "tova", "--segment", 8),
            "--from-learned does nothing with",
        ),
        (
            ("--data", "{book}", "--from-learned", "--policy", "retention"),
            "--from-learned: the model has no policy of its own; without the flag a new one is learned",
        ),
        (("--data", "{book}", "--optimizer", "muon", "--lora", 2), "--optimizer does nothing with --lora, whose"),
        (
            ("--data", "{book}", "--optimizer", "muon", "--policy", "dms"),
            "--optimizer does nothing with --policy dms, ",
        ),
        (("--data", "{book}", "--lora", 0), "the rank of an adapter is at least 1, not 0"),
        (("--data", "{book}", "--policy", "dms", "--lora", 2), "--lora trains adapters of a model; dms trains"),
        (("--data", "{book}", "--policy", "retention", "--lora", 2), "of its own; with --distill it trains both"),
        (("--resume",), "there is no run in {tmp}/run to continue: {tmp}/run/run.json does not exist; --data begins"),
        (
            ("--data", "{book}", "--rows", 4, "--accumulate", 3),
            "--rows 4 cannot be taken in --accumulate 3 equal parts",
        ),
        (("--data", "{book}", "--policy", "tova", "--segment", 32), "--length 16 is less than one --segment of 32"),
        (
            ("--data", "{book}", "--policy", "dms", "--segment", 8, "--mode", "chunked", "--chunk", 12),
            "--segment 8 is no multiple of --chunk 12, and tokens would be selected at the end of each segment too; "
            "give --segment 12",
        ),
        (("--data", "{book}", "--policy", "tovaa", "--segment", 8), "unknown policy 'tovaa'"),
        (("--data", "{book}", "--policy", "retenion"), "Policies to be learned: retention, retention-layer, "),
        (("--data", "{book}", "--policy", "dms", "--distill"), "--distill is for states that evict by a policy"),
        (
            ("--data", "{book}", "--policy", "tova", "--segment", 8, "--bptt_segments", 3),
            "cannot be cut into windows of 3",
        ),
        (("--data", "{book}", "--length", 100_000), "give more data, shorter rows (--length) or fewer (--rows)"),
        (("--data", "{book}", "--rows", 1000), "one step needs 1000"),
        (("--data", "{short}"), "the data has 7 tokens, 0 rows of 16; one step needs 2"),
        (("--data", "./nowhere"), "there is no file or folder ./nowhere"),
        (("--data", "{ids}"), "document 0: token id 100000 at index"),
        (("--data", "{book}", "--tokenizer", "{larger}"), "the model's vocabulary only"),
        (("--data", "{book}", "--tokenizer", "{tmp}"), "tokenizer.json does not exist"),
        (("--data", "{book}", "--config", "{tmp}/none.toml"), "there is no file"),
        (
            ("--data", "{book}", "--config", "{tmp}/wrong.toml"),
            "unknown setting 'stepz' in {tmp}/wrong.toml; known: model, ",
        ),
        (("--data", "{book}", "--config", "{tmp}/bad.toml"), "bad.toml is not TOML: "),
    ],
)
def test_what_is_refused(
    run: Any, book: Path, folder: Path, tmp_path: Path, arguments: tuple[Any, ...], says: str
) -> None:
    names = dict(
        book=book, tmp=tmp_path, short=tmp_path / "short.jsonl", ids=tmp_path / "ids.jsonl", larger=tmp_path / "l"
    )
    names["short"].write_text('{"tokens": [2, 3, 4, 5, 6]}')
    names["ids"].write_text('{"tokens": [2, 100000]}')
    (tmp_path / "wrong.toml").write_text("stepz = 4")
    (tmp_path / "bad.toml").write_text("steps: 4")
    names["larger"].mkdir()
    fast = json.loads((folder / "tokenizer.json").read_text())
    more = max(fast["model"]["vocab"].values()) + 1
    fast["added_tokens"].append({**fast["added_tokens"][0], "id": more, "content": "<new>"})
    (names["larger"] / "tokenizer.json").write_text(json.dumps(fast))
    out = tmp_path / "run"
    ran = run("train", "--out", out, *FULL, *(str(argument).format(**names) for argument in arguments))
    assert ran.code == 2
    assert ran.err.startswith("jaxcompress: ")
    assert says.format(**names) in ran.err
    assert ran.err.count("\n") == 1
    assert not (out / "metrics.jsonl").exists()
    assert not (out / "model").exists()


def test_numbers_that_are_not_finite(run: Any, book: Path, tmp_path: Path) -> None:
    how = (*FULL, "--learning-rate", 1e30, "--clip", 1e9)
    ran = run("train", "--data", book, "--out", tmp_path / "run", *how)
    assert ran.code == 1
    assert re.match(r"jaxcompress: step \d is not finite: loss .*A lower learning rate may help\n", ran.err)
    assert not (tmp_path / "run" / "model").exists()


class TestSettings:
    """Flags, TOML, and what the run began with."""

    def test_flags_win_over_toml_and_toml_over_the_run(self, tmp_path: Path) -> None:
        config = tmp_path / "a.toml"
        config.write_text('learning_rate = 1e-3\nslots = [4, 8]\ntensorboard = true\npolicy = "h2o"\nsteps = 7\n')
        given = ["train", "--config", str(config), "--out", str(tmp_path), "--learning-rate=2", "--steps", "9"]
        known: dict[str, Any] = dict(config=config, out=tmp_path, learning_rate=2.0, steps=9)
        toml: dict[str, Any] = dict(slots=(4, 8), policy="h2o")
        asked = command_of([*given, "--data", "x", "--no-tensorboard"])
        assert asked == Train(data="x", tensorboard=False, **known, **toml)
        stored = dict(data="y", policy="tova", bptt_segments=None, seed=3, tensorboard=False, steps=1)
        (tmp_path / "run.json").write_text(json.dumps(dict(settings=stored)))
        asked = command_of([*given, "--resume"])
        assert asked == Train(
            data="y", resume=True, bptt_segments=None, seed=3, tensorboard=True, **known, **toml
        )  # fmt: skip
        assert command_of(["train", "--data", "x", "--out", "y"]) == Train(data="x", out=Path("y"))

    def test_home_is_written_short(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By no shell: in TOML, and after an equals sign."""
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.toml").write_text('out = "~/run"\n')
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text(json.dumps(dict(settings=dict(data="y"))))
        for given in (["--out=~/run"], ["--config", str(tmp_path / "a.toml")]):
            asked = command_of(["train", *given, "--resume"])
            assert (asked.out, asked.data) == (tmp_path / "run", "y")

    @pytest.mark.parametrize("line", ["tensorboard = 1", "steps = true", "data = {a = 1}"])
    def test_types(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "a.toml").write_text(line)
        with pytest.raises(ValueError, match="cannot be"):
            train_defaults(["--config", str(tmp_path / "a.toml")])

    def test_settings_are_used(self, run: Any, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Train] = []
        monkeypatch.setattr(Train, "run", lambda self: seen.append(self))
        (tmp_path / "a.toml").write_text(
            f'data = "{book}"\nout = "{tmp_path}/x"\nslots = 5\ncompute_dtype = "bfloat16"\n'
        )
        assert (
            run("train", "--config", tmp_path / "a.toml", "--bptt_segments", "None", "--rows", 7, model=None).code == 0
        )
        assert seen == [
            Train(
                data=str(book), out=tmp_path / "x", slots=(5,), compute_dtype="bfloat16", bptt_segments=None, rows=7,
                config=tmp_path / "a.toml",
            )
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "read"),
    [
        (dict(policy="full"), ""),
        (dict(policy="h2o", slots=(4, 8)), " --policy learned --slots 4 8"),
        (dict(policy="my own.py:Far"), " --policy 'my own.py:Far' --slots 128"),
        (dict(placement="slot", mode="chunked"), " --policy learned --slots 128 --placement slot --mode chunked"),
        (dict(mode="chunked", chunk=4), " --policy learned --slots 128 --chunk 4 --mode chunked"),
    ],
)
def test_what_is_to_be_tried(how: Any, read: str, tmp_path: Path) -> None:
    """It reads as the model was trained; a policy of one's own is never run because a checkpoint says so."""
    made = Train(data="x", out=tmp_path / "run", **how)
    assert made.tried == f"jaxcompress generate --model {tmp_path / 'run' / 'model'}{read} --prompt ..."


def test_operations_of_a_step(folder: Path) -> None:
    """What is learned alone reads with plain attention; a retention head needs nothing that goes backwards."""
    loaded = load(folder)
    of = lambda **how: Train(data="x", out=Path("y"), length=64, slots=(8,), **how)._flops(loaded)
    assert of(policy="full") == of(policy="dms") == of(policy="dmc") == pytest.approx(3 * of(policy="retention"))
    assert of(policy="full") > of(policy="tova") == of(policy="retention", distill=True)


@pytest.mark.slow
def test_kill_9_at_any_moment(folder: Path, book: Path, tmp_path: Path) -> None:
    """A run that is killed again and again, in steps and in saves, is bit by bit one that was left alone."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    how = ("--policy", "full", "--length", 16, "--rows", 2, "--steps", 60, "--save-every", 2, "--optimizer", "adamw")

    def start(out: Path) -> subprocess.Popen[bytes]:
        given = ("--model", folder, "--data", book, "--out", out, "--resume", *how)
        command = [sys.executable, "-m", "jaxcompress.cli", "train", *map(str, given)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finish(process: subprocess.Popen[bytes]) -> None:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(whole))
    rng, kills, died_in_a_save = random.Random(0), 0, 0
    while kills < 5:
        process = start(cut)
        size = lambda: (cut / "metrics.jsonl").stat().st_size if (cut / "metrics.jsonl").exists() else 0
        before, wanted = None, rng.randint(0, 2000)
        while process.poll() is None:  # until some lines are written, then a moment more
            before = size() if before is None or size() < before else before
            if size() - before >= wanted and (wanted or (cut / "run.json").exists()):
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:  # it was faster
            break
        kills += 1
        died_in_a_save += any("tmp" in path.name for path in (cut / "checkpoints").glob("*"))
    assert kills >= 3
    print(f"{kills} kills, {died_in_a_save} of them in a save")
    finish(start(cut))
    assert curve(cut) == curve(whole)
    assert [row["step"] for row in curve(cut)] == list(range(1, 61))
    files = [(out / "model" / "model.safetensors").read_bytes() for out in (cut, whole)]
    assert files[0] == files[1]
    assert not list((cut / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "name", "more"),
    [
        ("retention-layer", "retention-layer", ("--distill", "--segment", 8)),
        ("retention-layer", "retention-layer", ("--distill", "--segment", 8, "--lora", 2)),
        ("retention-layer", "retention-layer", ()),
        ("dms-pool", "dms-window3-pool", ("--window", 3)),
        ("dmc", "tova-kv_head/dmc", ()),
    ],
)
def test_a_policy_that_is_learned(
    run: Any, book: Path, folder: Path, tmp_path: Path, policy: str, name: str, more: tuple[Any, ...]
) -> None:
    """It is saved with the model, comes back with it, and is what `learned` stands for."""
    out = tmp_path / "run"
    ran = run("train", "--data", book, "--out", out, "--policy", policy, "--slots", 12, *SMALL, *more)
    fading = {"dms-pool": "divergence", "dmc": "prediction"}.get(policy)
    assert ran.code == 0
    if fading is None:
        assert ran.err == ""
    else:
        assert re.fullmatch(r"jaxcompress: the share kept is .*, far above the 0.12 of --ratio 8: .*\n", ran.err)
    assert ("then cosine to step 6, 10 times that for the network" in ran) == (policy == "dmc" or "--distill" in more)
    told = re.findall(r"held-out (.*) before: \d+\.\d+ \((.*)\)", ran)
    assert told[0] == ("loss", "nats per token")
    other = ["foresight"] if fading is None else [f"{fading} while tokens fade", "share kept"]
    assert [name for name, _ in told[1:]] == ["divergence"] * ("--distill" in more) + other
    assert [name for name, _ in told] == re.findall(r"held-out (.*) after 6 steps: \d", ran)
    after = dict(re.findall(r"held-out (loss|foresight) after 6 steps: (\d+\.\d+)", ran))
    ran = run("train", "--out", out, "--resume")
    assert (ran.code, "continuing from step 6" in ran) == (0, True)
    further = "--data", book, "--out", tmp_path / "further", "--policy", policy, "--slots", 12, *SMALL, *more
    if policy == "retention-layer":
        ran = run("train", *further, "--from-learned", model=out / "model")
        begun = dict(re.findall(r"held-out (loss|foresight) before: (\d+\.\d+)", ran))
        assert (ran.code, begun.keys()) == (0, after.keys())
        assert all(float(begun[name]) == pytest.approx(float(after[name]), abs=2e-4) for name in after)
    if policy == "retention-layer" and not more:
        through = "--data", book, "--out", tmp_path / "through", "--policy", "learned", "--slots", 12, *SMALL
        ran = run("train", *through, "--segment", 8, "--lora", 2, model=out / "model")
        assert (ran.code, ran.err, "--policy learned --slots 12 " in ran) == (0, "", True)
        left, had = load(tmp_path / "through" / "model"), load(out / "model")
        assert left.saved_policy is not None
        assert had.saved_policy is not None
        assert left.saved_policy.make().name == name
        jax.tree.map(np.testing.assert_array_equal, left.saved_policy.weights, had.saved_policy.weights)
        assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), left.model, had.model))
    loaded = load(out / "model")
    saved = loaded.saved_policy
    assert saved is not None
    assert saved.make().name == name
    assert saved.settings["slots"] == [12]
    before, after = load(folder).model, loaded.model
    same = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))
    assert same == (policy != "dmc" and "--distill" not in more)
    assert any(np.abs(saved.weights["outer"]).reshape(-1) > 0)
    reading = "--file", book, "--slots", 12, "--context", 64, "--json"
    ran = run("perplexity", *reading, "--policies", "learned", "learned/protect-recent2", model=out / "model")
    assert ran.code == 0, ran.err
    assert name in ran
    ran = run("perplexity", *reading, "--policies", "learned")
    assert (ran.code, "no policy was trained for the model" in ran.err) == (2, True)
    other = "--data", book, "--out", tmp_path / "other", "--policy", "retention-pool", *SMALL, "--from-learned"
    ran = run("train", *other, model=out / "model")
    says = f"the model's own policy is {name}, and the one to be learned retention-pool"
    assert (ran.code, says in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("how", "rates"),
    [
        (dict(policy="tova"), (1e-4,)), (dict(policy="dms"), (3e-3,)), (dict(policy="retention-pool"), (3e-3,)),
        (dict(policy="dmc"), (1e-4, 1e-3)), (dict(policy="dmc", learning_rate=1e-2), (1e-2, 1e-1)),
        (dict(policy="retention", distill=True), (1e-4, 1e-3)), (dict(policy="dms", learning_rate=1e-5), (1e-5,)),
    ],
)  # fmt: skip
def test_networks_learn_faster(how: Any, rates: tuple[float, ...]) -> None:
    """What is trained takes its first step of Adam: as long as its learning rate."""
    made = Train(data="x", out=Path("y"), warmup=0, weight_decay=0.0, **how)
    _, optimizer = _optimizer(made)
    weights = tuple({"kernel": jnp.ones(2)} for _ in rates)
    updates, _ = optimizer.update(weights, optimizer.init(weights), weights)
    np.testing.assert_allclose([-one["kernel"][0] for one in updates], rates, rtol=1e-3)
    assert recorded_settings(made)["learning_rate"] == rates[0]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_what_nothing_else_gives(name: Any, tmp_path: Path) -> None:
    """A file and flags win over it; a run that goes on keeps what it began with."""
    (tmp_path / "run.toml").write_text("length = 512\n")
    out = tmp_path / "run"
    asked = "--preset", name, "--config", tmp_path / "run.toml", "--data", "text", "--out", out
    made = train_defaults([str(one) for one in asked])
    assert made.preset == name
    assert {key: getattr(made, key) for key in PRESETS[name]} == {**PRESETS[name], "length": 512}
    replace(made, data="text", out=out).check()
    if name == "joint":  # what a preset says for its own policy is not held against another one
        replace(made, data="text", out=out, policy="tova").check()
    out.mkdir()
    settings = recorded_settings(replace(made, data="text", out=out, slots=(8,)))
    del settings["recent"]  # as an older version wrote it, whose preset said nothing of it either
    (out / "run.json").write_text(json.dumps(dict(settings=settings)))
    again = train_defaults(["--out", str(out), "--resume"])
    assert (again.preset, again.slots, again.policy) == (name, (8,), PRESETS[name]["policy"])
    assert again.recent == 0

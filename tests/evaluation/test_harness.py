"""The model of lm-evaluation-harness: against reading each text by itself, and through the harness's own tasks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_chat import chat_folder

import jaxcompress as jc
from jaxcompress.models.decoder import read
from jaxcompress.models.init_state import init_state

pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install "jaxcompress[lm-eval]"')
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from jaxcompress.evaluation.harness import HarnessModel  # noqa: E402
from jaxcompress.lm_eval import main, register  # noqa: E402

SLOTS = 12
PAIRS = [
    ("The mill stands where the river turns", " and"), ("The mill stands where the river turns", " or not"),
    ("A much longer context, of which the first words are forgotten long before its end", " it is"), ("", "Alone"),
    ("Ends with a space ", "here"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def bounded(folder: Path) -> HarnessModel:
    return HarnessModel(str(folder), policy="tova", slots=SLOTS, batch_size=3)


@pytest.fixture(scope="module")
def full(folder: Path) -> HarnessModel:
    return HarnessModel(str(folder), batch_size=3, dtype="float32")


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]  # type: ignore[arg-type]


def alone(harness: HarnessModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A text by itself, in one call of `read`."""
    model = harness.loaded.model
    tokens = np.array([context + continuation], np.int32)
    padded = np.pad(tokens[:, :-1], [(0, 0), (0, 128 - tokens.shape[1] + 1)])
    valid = np.arange(padded.shape[1])[None] < tokens.shape[1] - 1
    state = init_state(model.config, harness.policy, harness.slots or 128)
    done = jax.jit(lambda tokens, valid, state: read(model, tokens, state, harness.policy, valid=valid, chunk=1))(
        padded, valid, state
    )
    scores = np.asarray(jax.nn.log_softmax(model.logits(done.hidden)[0]))[len(context) - 1 : tokens.shape[1] - 1]
    right = scores.argmax(-1) == np.array(continuation)
    return float(scores[np.arange(len(continuation)), continuation].sum()), bool(right.all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bounded", "full"])
def test_continuations(kind: str, request: pytest.FixtureRequest) -> None:
    """Contexts of different lengths in batches, two continuations of one context, an empty context."""
    harness = request.getfixturevalue(kind)
    given = harness.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(PAIRS, given, strict=True):
        spaces = len(context) - len(context.rstrip())
        parts = context.rstrip(), " " * spaces + continuation
        ids = [harness.tok_encode(part, add_special_tokens=False) for part in parts]
        wanted, best = alone(harness, ids[0] or [harness.prefix_token_id], ids[1])
        assert score == pytest.approx(wanted, abs=1e-3)
        assert greedy == best
    again = harness.loglikelihood(instances("loglikelihood", PAIRS[::-1]), disable_tqdm=True)[::-1]
    np.testing.assert_allclose([score for score, _ in again], [score for score, _ in given], atol=1e-4)


def test_texts_in_windows(bounded: HarnessModel, folder: Path) -> None:
    text = "One window is not enough for it."
    (whole,) = bounded.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    ids = bounded.tok_encode(text)
    assert whole == pytest.approx(alone(bounded, [bounded.prefix_token_id], ids)[0], abs=1e-3)
    short = HarnessModel(str(folder), policy="tova", slots=SLOTS, batch_size=3, max_length=20)
    (cut,) = short.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    first = alone(bounded, [bounded.prefix_token_id], ids[:20])[0]
    second = alone(bounded, ids[len(ids) - 21 : 20], ids[20:])[0]
    assert cut == pytest.approx(first + second, abs=1e-3)


def test_what_it_writes(full: HarnessModel) -> None:
    prompts = [one for one, _ in PAIRS[:3]]
    rows = [full.tok_encode(one) for one in prompts]
    (tokens,) = jc.generate(full.loaded.model, rows, full.policy, 200, max_new_tokens=20, mode="oneshot")
    wanted = [full.loaded.tokenizer.decode(row) for row in tokens]
    ask = lambda **how: full.generate_until(
        instances("generate_until", [(one, dict(max_gen_toks=20, **how)) for one in prompts])
    )
    assert ask(until=[]) == wanted
    stop = wanted[0][3:5]
    assert ask(until=[stop])[0] == wanted[0].partition(stop)[0]
    assert ask(until=[], do_sample=False, temperature=0.7) == wanted  # not sampled
    with pytest.raises(ValueError, match="num_beams are not known"):
        ask(until=[], num_beams=4)


def test_each_request_draws_for_itself(full: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task with `repeats` asks the same several times; what is drawn depends on the seed, not on the batch."""
    how: dict[str, Any] = dict(max_gen_toks=20, until=[], do_sample=True, temperature=1.0)
    draw = lambda: full.generate_until(instances("generate_until", [("Hi", how)] * 4))
    written = draw()
    assert len(set(written)) == 4
    monkeypatch.setattr(full, "seed", 1)
    assert draw()[:3] == written[1:]
    monkeypatch.setattr(full, "seed", 0)
    monkeypatch.setattr(full, "batch_size", 1)
    assert draw() == written


def test_conversations(full: HarnessModel) -> None:
    said = [dict(role="user", content="Hi"), dict(role="assistant", content="Well,")]
    assert full.apply_chat_template(said[:1]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    begun = full.apply_chat_template(said, add_generation_prompt=False)
    assert begun == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell,"
    assert "im_start" in str(full.chat_template(True))
    assert full.chat_template(False) is None
    assert full.tok_encode("<s>a") == full.tok_encode("<s>a", add_special_tokens=False)


def test_what_is_missing_or_wrong_is_told(folder: Path) -> None:
    for how, why in (
        (dict(policy="tova"), "give slots"), (dict(batch_size="auto"), "batch_size"), (dict(mode="fast"), "mode"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            HarnessModel(str(folder), **how)  # type: ignore[arg-type]


TASKS = {
    "mill_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "mill_write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "mill_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks of our own over a local file; nothing is fetched."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "mill.jsonl"
    rows = [dict(question=f"Where is mill number {n}?", choices=["here", "over there"]) for n in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test"
        (tmp_path / f"{name}.yaml").write_text(head + rest)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports
def test_the_harness_runs_it(
    tasks: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register()
    register()
    assert get_model("jaxcompress") is HarnessModel
    out = tasks / "results"
    monkeypatch.setattr(sys, "argv", [
        "lm_eval", "--model", "jaxcompress", "--model_args", f"pretrained={folder},policy=tova,slots={SLOTS}",
        "--tasks", ",".join(TASKS), "--include_path", str(tasks), "--batch_size", "3", "--apply_chat_template",
        "--output_path", str(out), "--log_samples",
    ])  # fmt: skip
    assert main() == 0
    assert "mill_choice" in capsys.readouterr().out
    (results,) = [json.loads(file.read_text()) for file in out.rglob("results*.json")]
    assert set(results["results"]) == set(TASKS)
    (samples,) = [file.read_text() for file in out.rglob("samples_mill_write*.jsonl")]
    first = json.loads(samples.splitlines()[0])
    assert first["arguments"]["gen_args_0"]["arg_0"].endswith("<|im_start|>assistant\n")

"""Every script of `experiments/` runs with `--quick`; one that needs what is not installed says so."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

FOLDER = Path(__file__).parents[2] / "experiments"
PARTS = {
    "command",
    "paper_tables",
    "prompt_domains",
    "sentences",
    "sharded_step",
    "vision_parity_models",
}  # imported, no programs
SCRIPTS = sorted({path.stem for path in FOLDER.glob("*.py")} - PARTS)
NEEDS = {  # a module that the tests do not install, and the command that does
    "aot_gpu": ("nvidia", "make aot-gpu"),
    "aot_gpu_mesh": ("nvidia", "make aot-gpu"),
    "aot_kernels": ("libtpu", "make aot"),
    "kvpress_parity": ("torch", 'pip install "torch==2.13.0" transformers "kvpress==0.5.5"'),
    "aot_mesh": ("libtpu", "make aot"),
    "lm_eval_parity": ("torch", 'pip install -e ".[parity,lm-eval]"'),
    "make_gguf_fixtures": ("sentencepiece", "pip install sentencepiece"),
    "make_modernbert_fixtures": ("torch", 'pip install -e ".[parity]"'),
    "make_parity_fixtures": ("torch", 'pip install -e ".[parity]"'),
    "make_sampling_fixtures": ("torch", 'pip install -e ".[parity]"'),
    "make_vision_fixtures": ("torch", 'pip install -e ".[parity]"'),
    "tova_documents": ("rouge_score", 'pip install "jaxcompress[lm-eval]"'),
    "soak_server": ("uvicorn", 'pip install "jaxcompress[serve]"'),
}
SLOW = {
    "approximate_scores", "context_reconstruction", "finetune_prompt_compressor", "policy_pages", "position_bias",
    "prompt_continuation", "prompt_tables", "random_against_designed", "random_eviction", "reader_teachers",
    "real_model", "slot_sharing", "soak_server", "speed_decode", "speed_engine", "speed_kernels", "speed_peers",
    "speed_policies", "speed_prompt", "speed_training", "speed_vision", "storage", "teacher_tables", "tova_documents",
    "tova_extrapolation", "tova_generation", "tova_kept", "tova_perplexity", "tova_throughput", "train_bounded",
    "train_embedded", "train_prompt_compressor", "train_reinforced", "train_vision_demo", "training_evidence",
    "uniformity", "vision_tables",
}  # fmt: skip
"""Those that take more than 2 seconds of a processor."""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """As `python experiments/NAME.py ...` in an empty folder, but in this process, which has imported much already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)

    def run(name: str, *given: str) -> Ran:
        path = str(FOLDER / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *given])
        code: Any = 0
        with mock.patch.dict(os.environ):
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
        return Ran(code, *capfd.readouterr())

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SCRIPTS]
)
@pytest.mark.usefixtures("as_users_call_it")
def test_quick(name: str, run: Run, tmp_path: Path) -> None:
    module, command = NEEDS.get(name, (None, ""))
    ran = run(name, "--quick")
    if module is not None and find_spec(module) is None:
        assert ran.code == 2
        assert command in ran.err
        assert ran.err.count("\n") == 1
        return
    assert ran.code == 0, ran.err
    assert ran.out
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}


def test_other_arguments_beside_quick(run: Run) -> None:
    assert "0 of 0" not in run("llmlingua2_parity", "--quick", "--most", "1").out


def test_methods_that_cannot_keep_so_few_are_left_out(run: Run) -> None:
    ran = run("speed_vision", "--quick", "--methods", "sparsevlm+", "fitprune")
    assert ran.code == 0
    assert ran.out.count("is left out: no final number of visual tokens has a mean of 9") == 2


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("train_prompt_compressor", "--data"),
        ("tune_kernels --backend gpu", "needs"),
        ("tune_kernels", "needs"),
        ("tova_perplexity --table t.md --out no.jsonl", "there are no results in"),
        ("tova_perplexity --out no/rows.jsonl", "there is no folder no"),
        ("tova_perplexity --quick --policies tovva", "unknown policy 'tovva', did you mean tova?"),
        ("tova_perplexity --quick --texts a.txt b/a.txt", "would be one text, 'a'"),
        ("plan --quick --models Llama", "unknown name 'Llama' in --models"),
        ("plan --quick --machines v5", "unknown name 'v5' in --machines"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(command: str, why: str, run: Run) -> None:
    Path("b").mkdir()
    for name in ("a.txt", "b/a.txt"):
        Path(name).write_text("A text.")
    ran = run(*command.split())
    assert ran.code == 2
    assert why in ran.err
    assert ran.err.count("\n") == 1

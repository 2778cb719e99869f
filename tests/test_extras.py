"""Optional packages: what works without them, and what is said when one is missing."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from jaxcompress._extras import EXTRAS, FRAMEWORKS, MissingExtra, extra

ROOT = Path(__file__).parent.parent

# flax imports optax and Orbax itself, so both are installed wherever flax is. They are hidden from everything else.
HIDING = """
import sys
import flax.nnx

HIDDEN = {"optax", "orbax", "grain", "tqdm", "PIL", "matplotlib", "tyro", "datasets", "tensorboardX", "torch",
          "starlette", "uvicorn", "prometheus_client"}
hidden = lambda name: name.partition(".")[0] in HIDDEN

class Hide:
    def find_spec(self, name, path=None, target=None):
        if hidden(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in filter(hidden, list(sys.modules)):
    del sys.modules[name]
sys.meta_path.insert(0, Hide())
"""

INFERENCE = """
import numpy as np
import jaxcompress as jc

loaded = jc.load_embedded()
prompt = loaded.tokenizer.encode("def main(")
(tokens,) = jc.generate(loaded.model, [prompt], loaded.policy, 8, max_new_tokens=2)
assert tokens.shape == (1, 2)
assert jc.perplexity(loaded.model, prompt[None], jc.get_policy("tova"), 8, segment=8).tokens == len(prompt) - 1
assert jc.trace(loaded.model, prompt[None], jc.get_policy("tova"), 8).death.shape[-1] == len(prompt)
for room in jc._ROOMS:
    getattr(jc, room)
jc.budgets.pyramid(16, 4), jc.training.token_losses, jc.prompt.Compressor
"""

FIRST_NEEDED = {
    "train": ("jaxcompress.training.trainer", "jaxcompress.training.optimizer", "jaxcompress.training.checkpointing",
              "jaxcompress.training.data", "jaxcompress.prompt.learning", "jaxcompress.budgets.calibration"),
    "vision": ("jaxcompress.generation.pictures",),
    "plots": ("jaxcompress.evaluation.figures", "jaxcompress.evaluation.dropped"),
    "serve": ("jaxcompress.server.app", "jaxcompress.server.metrics", "jaxcompress.server.run"),
}  # fmt: skip


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process, which finds what this one compiled."""
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"]),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | compiled)


def test_inference_needs_no_extra_and_each_missing_one_is_named() -> None:
    imports = [(name, module) for name, modules in FIRST_NEEDED.items() for module in modules]
    missing = """
import importlib
for name, module in IMPORTS:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(name, module, type(error).__name__, error)
from jaxcompress.checkpoints import load_embedded_vision
for name, call in {
    "vision": lambda: load_embedded_vision().processor,
    "data": lambda: importlib.import_module("jaxcompress.training.data"),
    "train": lambda: jc.training.fit,
    "tensorboard": lambda: importlib.import_module("jaxcompress.training.metrics").tensorboard("x"),
}.items():
    try:
        call()
    except ImportError as error:
        print(name, "call", type(error).__name__, error)
import jaxcompress.__main__
print("cli", jaxcompress.__main__.main())
"""
    done = run(HIDING + INFERENCE + missing.replace("IMPORTS", repr(imports)))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.pop() == "cli 2"
    assert re.fullmatch(
        r'jaxcompress: the command line needs tyro, .* Run: pip install "jaxcompress\[cli\]"\n', done.stderr
    )
    assert [line.split(maxsplit=3)[:3] for line in lines[: len(imports)]] == [
        [name, module, "MissingExtra"] for name, module in imports
    ]
    for name, _, kind, said in (line.split(maxsplit=3) for line in lines):
        assert kind == "MissingExtra"
        needed = "train" if name == "data" else name  # the trainer's data come first
        assert said.startswith(f"{EXTRAS[needed].purpose} needs ")
        assert said.endswith(f'Run: pip install "jaxcompress[{needed}]"')
    assert len(lines) == len(imports) + 4


def test_other_errors_inside_are_raised_as_they_are() -> None:
    with pytest.raises(MissingExtra, match=r'training needs optax, .*"jaxcompress\[train\]"') as caught, extra("train"):
        raise ModuleNotFoundError("No module named 'optax.contrib'", name="optax.contrib")
    assert caught.value.name == "optax"
    with pytest.raises(ModuleNotFoundError, match="nowhere"), extra("train"):
        importlib.import_module("nowhere")
    with pytest.raises(ZeroDivisionError), extra("train"):
        _ = 1 / 0


def test_extras_are_those_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(declared) == {*EXTRAS, "all", "dev", "docs", "parity"}
    assert set(declared["all"][0].removeprefix("jaxcompress[").removesuffix("]").split(",")) == set(EXTRAS) - FRAMEWORKS
    assert declared["dev"][0] == "jaxcompress[all]"


def test_nothing_is_said_about_pytorch() -> None:
    done = run("""
import os
from jaxcompress import embedded
from jaxcompress.checkpoints import load_embedded_vision, load_encoder

load_encoder(embedded.compressor_folder()).tokenizer
loaded = load_embedded_vision()
loaded.tokenizer, loaded.processor
print("TRANSFORMERS_NO_ADVISORY_WARNINGS" in os.environ)
""")
    assert (done.stdout, done.stderr) == ("False\n", "")

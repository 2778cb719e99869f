"""Two processes of four devices each measure, write and learn what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
PERPLEXITY = ("perplexity", "--policies", "tova", "--slots", "32", "--context", "64", "--json")
GENERATE = ("generate", *("--prompt", "def f(") * 8, "--slots", "32", "--max-new-tokens", "6", "--json")


def start(arguments: tuple[str, ...], devices: int) -> subprocess.Popen[str]:
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"] or ""),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "jaxcompress", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    out, said = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    return out


def start_both(arguments: tuple[str, ...]) -> list[subprocess.Popen[str]]:
    """Two processes of four devices each, of one command."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    together = ("--mesh", "data=2,fsdp=4", "--coordinator", f"localhost:{port}", "--processes", "2", "--process-id")
    return [start((*arguments, *together, str(number)), 4) for number in range(2)]


def finish_both(arguments: tuple[str, ...]) -> str:
    """What the first of two processes prints; the second prints nothing."""
    first, second = map(ended, start_both(arguments))
    assert second == ""
    return first


def both(arguments: tuple[str, ...]) -> tuple[Any, Any]:
    """What one process prints, and what the first of two does."""
    return json.loads(ended(start(arguments, 1))), json.loads(finish_both(arguments))


@pytest.mark.slow
def test_perplexity() -> None:
    alone, together = both(PERPLEXITY)
    assert abs(alone["table"][0]["nats"] - together["table"][0]["nats"]) < 1e-5


@pytest.mark.slow
def test_generate() -> None:
    alone, together = both(GENERATE)
    assert alone == together


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    """The losses, and the weights after the steps, whose difference is that of the gradients; both processes are killed
    while they train and save, and go on."""
    book = tmp_path / "book.txt"
    book.write_text("".join(f"Line {i} says that the slots of memory hold what was looked at.\n" for i in range(300)))
    told = ("train", "--data", str(book), "--policy", "tova", "--slots", "16", "--length", "32", "--segment", "16",
            "--rows", "8", "--steps", "6", "--save-every", "1", "--warmup", "1", "--out")  # fmt: skip
    ended(start((*told, str(tmp_path / "one")), 1))
    two = *told, str(tmp_path / "two")
    running = start_both(two)
    while not (tmp_path / "two" / "checkpoints" / "2").exists() and all(one.poll() is None for one in running):
        time.sleep(0.02)
    for one in reversed(running):
        one.kill()
        one.communicate()
    assert "continuing from step" in finish_both((*two, "--resume"))
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for name in ("loss", "gradient_norm", "parameter_norm"):
        np.testing.assert_allclose([row[name] for row in one], [row[name] for row in two], rtol=1e-5, atol=1e-5)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name, x in weights[0].items():
        np.testing.assert_allclose(x, weights[1][name], rtol=2**-7, atol=1e-5)  # stored in bfloat16

"""Two processes of four devices each measure and write what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).parents[2]
PERPLEXITY = ("perplexity", "--policies", "tova", "--slots", "32", "--context", "64", "--json")
GENERATE = ("generate", *("--prompt", "def f(") * 8, "--slots", "32", "--max-new-tokens", "6", "--json")


def start(arguments: tuple[str, ...], devices: int) -> subprocess.Popen[str]:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
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


def both(arguments: tuple[str, ...]) -> tuple[Any, Any]:
    """What one process prints, and what the first of two does; the second prints nothing."""
    alone = ended(start(arguments, 1))
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    together = ("--mesh", "data=2,fsdp=4", "--coordinator", f"localhost:{port}", "--processes", "2", "--process-id")
    running = [start((*arguments, *together, str(number)), 4) for number in range(2)]
    first, second = map(ended, running)
    assert second == ""
    return json.loads(alone), json.loads(first)


@pytest.mark.slow
def test_perplexity() -> None:
    alone, together = both(PERPLEXITY)
    assert abs(alone["table"][0]["nats"] - together["table"][0]["nats"]) < 1e-5


@pytest.mark.slow
def test_generate() -> None:
    alone, together = both(GENERATE)
    assert alone == together

"""The same program on one device and on eight: the same tokens, losses and gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

PROGRAM = Path(__file__).with_name("eight_devices.py")
POLICIES = ("layer", "head", "h2o", "snapkv", "retention")
SOME = ("generate-layer-int8", "generate-snapkv-float32", "train-layer", "exchange-layer", "step-layer")
OTHERS = (
    *(case for name in POLICIES for case in (f"generate-{name}-float32", f"generate-{name}-int8", f"train-{name}")),
    *(f"exchange-{name}" for name in ("head", "h2o", "retention")),
    *(f"step-{name}" for name in ("head", "h2o", "retention")),
)


def results(cases: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.values["jax_compilation_cache_dir"] or ""),
        "JAX_PLATFORMS": "cpu",
    }
    package = {"PYTHONPATH": str(PROGRAM.parents[2])}
    command = [sys.executable, str(PROGRAM), *cases]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache | package, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return {line["case"]: line for line in map(json.loads, run.stdout.splitlines())}


def check(case: str, found: dict[str, Any]) -> None:
    if case.startswith("exchange"):
        assert found["shapes"]
        held = [shape for shape in found["shapes"] if found["slots"] in shape and found["width"] in shape]
        assert not held, f"keys or values that are held move between devices: {held}"
        return
    if case.startswith("step"):
        assert found["share"] == [1]
        rows, layers, shared = found["rows"], found["layers"], found["sets"] == 1
        sums = {f"all-reduce of {rows * found['embed']}": 2 * layers}  # after attention and MLP
        if shared:  # the mean of the heads' scores
            sums[f"all-reduce of {rows * found['slots']}"] = layers
        large = {what: times for what, times in found["exchanged"].items() if int(what.split()[-1]) > rows}
        assert large == sums
        return
    assert found["moved_one"] == found["moved_eight"] == []
    if case.startswith("generate"):
        assert np.min(found["one"]) >= 0
        assert found["one"] == found["eight"]
    else:
        np.testing.assert_allclose(found["one"], found["eight"], rtol=0, atol=1e-5)
        assert found["apart"] < 1e-5


@pytest.mark.slow
def test_one_and_eight_devices_agree() -> None:
    for case, found in results(SOME).items():
        check(case, found)


@pytest.mark.slow
def test_one_and_eight_devices_agree_for_every_policy() -> None:
    found = results(tuple(case for case in OTHERS if case not in SOME))
    for case in found:
        check(case, found[case])

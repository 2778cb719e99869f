"""What a run says about itself."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.extend.backend
import pytest
from flax import nnx
from tiny import tiny_decoder

from jaxcompress.models.decoder import Decoder
from jaxcompress.models.experts_config import ExpertsConfig
from jaxcompress.training import metrics
from jaxcompress.training.metrics import (
    MetricsFile,
    Throughput,
    flops_per_token,
    mean_attended,
    peak_flops,
    tensorboard,
)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_file_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsFile(path) as told:
        for step in range(1, 6):
            told(step, {"loss": step / 3, "mfu": None})
            assert lines(path)[-1] == {"step": step, "loss": step / 3, "mfu": None}  # at once
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with MetricsFile(path, after=3) as told:
        told(4, {"loss": 0.5})
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 0.5)]
    with MetricsFile(path):
        assert path.read_text() == ""
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_damaged_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n[]\n{"loss": 1}\n{"step": 2}\n')
    MetricsFile(path, after=9).close()
    assert lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_six_per_weight_and_those_of_attention(tied: bool) -> None:
    model = tiny_decoder(tied=tied)
    config = model.config
    multiplied = sum(x.size for x in jax.tree.leaves(model)) - (0 if tied else 61 * 32)
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * 10
    assert flops_per_token(model, 10.0) == 6 * multiplied + attention


def test_experts_that_are_not_chosen_cost_nothing() -> None:
    make = lambda n: nnx.eval_shape(
        lambda: Decoder(replace(tiny_decoder().config, mlp="experts", experts=ExpertsConfig(n, 2)), rngs=nnx.Rngs(0))
    )
    router = make(2).config.hidden_size * make(2).config.num_layers
    assert flops_per_token(make(8), 10.0) - flops_per_token(make(2), 10.0) == 6 * 6 * router


def test_keys_attended_to() -> None:
    assert mean_attended(9) == 5
    assert mean_attended(4, 2) == (1 + 2 + 3 + 3) / 4
    assert mean_attended(4, 100) == mean_attended(4)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("cpu", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(kind: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: SimpleNamespace(device_kind=kind))
    assert peak_flops() == peak


def test_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 12.0, 16.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    told = Throughput(1e6)
    assert told(100) == dict(tokens_per_second=None, mfu=None)
    assert told(100) == dict(tokens_per_second=50.0, mfu=None)  # a CPU's peak is not known
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e9)
    told = Throughput(1e6, devices=4)
    told(100)
    assert told(100) == dict(tokens_per_second=25.0, mfu=25.0 * 1e6 / 1e9 / 4)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None):
            written.append((folder, purge_step))

        def add_scalar(self, *scalar: object) -> None:
            written.append(scalar)

        def flush(self) -> None:
            written.append("flush")

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    tensorboard(tmp_path, after=4)(5, {"loss": 1.5, "mfu": None})
    assert written == [(str(tmp_path), 5), ("loss", 1.5, 5), "flush"]
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"jaxcompress\[tensorboard\]"):
        tensorboard(tmp_path)

"""Logs of a training run: a JSONL file, TensorBoard, tokens per second, model FLOP/s utilisation (MFU)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend
import numpy as np

from jaxcompress._extras import extra
from jaxcompress.inputs.whole_file import whole_file
from jaxcompress.models.decoder import Decoder

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets. The first name that is a prefix of the device's
# kind and a dash is used.
_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,  # v6e: "TPU v6 lite"
    "TPU7": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4-": 121e12,  # no L40
    "NVIDIA L40S": 362e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Dense bfloat16 FLOP/s of a device (the default device if None). None if not known: CPUs, other models."""
    kind = f"{(device or jax.extend.backend.get_default_device()).device_kind}-"
    return next((peak for name, peak in _PEAK.items() if kind.startswith(name)), None)


def flops_per_token(model: Decoder, attended: float) -> float:
    """FLOPs that training on one token needs, forward and backward.

        6 N + 12 L H D A

    N is the number of weights that a token is multiplied with: all, except an embedding that is only looked up (a tied
    embedding is also the output projection) and experts that are not chosen. Each weight costs a multiplication and an
    addition in the forward pass, and twice that in the backward pass: 6. The second term is attention: scores and sums
    of values, for every query head, width and attended key, forward and backward (Chowdhery et al. 2022, appendix B,
    where A = T). Rematerialisation does not count.

    Args:
      attended: A, how many keys a query attends to on average: (T + 1) / 2 for causal attention over T tokens; see
        `mean_attended`.
    """
    config = model.config
    weights = sum(x.size for x in jax.tree.leaves(model))
    if not config.tied:
        weights -= config.vocab_size * config.hidden_size
    if config.experts is not None:
        parts = jax.tree_util.tree_leaves_with_path(model.layers.mlp)
        of_experts = sum(x.size for path, x in parts if "router" not in jax.tree_util.keystr(path))
        weights -= of_experts * (config.experts.count - config.experts.chosen) // config.experts.count
    return 6.0 * weights + 12.0 * config.num_layers * config.num_heads * config.head_dim * attended


def mean_attended(length: int, slots: int | None = None) -> float:
    """How many keys a query attends to, as a mean over `length` tokens; each query sees at most `slots` + 1."""
    attended = np.arange(1, length + 1)
    return float((attended if slots is None else np.minimum(attended, slots + 1)).mean())


class Throughput:
    """Tokens per second between two calls, and model FLOP/s utilisation.

    Args:
      flops_per_token: FLOPs that the model needs per token; without it, utilisation is None.
      devices: how many work on it.
    """

    def __init__(self, flops_per_token: float | None = None, devices: int = 1):
        peak = peak_flops()
        self._share = None if flops_per_token is None or peak is None else flops_per_token / peak / devices
        self._last: float | None = None

    def __call__(self, tokens: int) -> dict[str, float | None]:
        """`tokens_per_second` and `mfu` for `tokens` tokens since the last call. None at the first, which compiled."""
        last, self._last = self._last, time.perf_counter()
        speed = None if last is None else tokens / (self._last - last)
        return dict(tokens_per_second=speed, mfu=None if speed is None or self._share is None else speed * self._share)


class MetricsFile:
    """A log with one JSON object per line, one line per step.

    When a run is resumed at step n, lines after n and an incomplete last line are dropped, so the file has each step
    once.

    Args:
      path: created, with its folder, if it does not exist.
      after: the step from which the run continues; 0 empties the file.

    Raises:
      OSError: the file cannot be written.
    """

    def __init__(self, path: str | Path, *, after: int = 0):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            with whole_file(path) as part:
                part.write_bytes(b"".join(line for line in lines if _step(line, after) <= after))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()  # data that the operating system holds outlives this process

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _step(line: bytes, after: int) -> int:
    """The step of a line. An incomplete line gets a step that is dropped."""
    if not line.endswith(b"\n"):
        return after + 1
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return after + 1


def tensorboard(folder: str | Path, *, after: int = 0) -> Callable[[int, Mapping[str, Any]], None]:
    """Logs every number for TensorBoard.

    Args:
      after: the step from which the run continues; TensorBoard then ignores what an earlier run wrote after it.

    Raises:
      ImportError: tensorboardX is not installed.
    """
    with extra("tensorboard"):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    writer = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if value is not None:
                writer.add_scalar(name, value, step)
        writer.flush()

    return log

"""What a training run says about itself: a JSONL file, TensorBoard, tokens per second, model FLOP/s utilisation."""

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
from jaxcompress.models.decoder import Decoder

# Dense bfloat16 FLOP/s of one device as JAX counts them, from the makers' data sheets. The first name that the
# device's kind begins with counts.
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
    "NVIDIA L4-": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device | None = None) -> float | None:
    """Dense bfloat16 FLOP/s of a device (the default one if None), None where not known: CPUs, other models."""
    kind = (device or jax.extend.backend.get_default_device()).device_kind
    return next((peak for name, peak in _PEAK.items() if kind.startswith(name)), None)


def flops_per_token(model: Decoder, attended: float) -> float:
    """FLOPs that training on one token needs, forward and backward.

        6 N + 12 L H D A

    N counts the weights that a token is multiplied with: all, without an embedding that is only looked up (a tied one
    is also the output projection). Each costs a multiplication and an addition in the forward pass and twice that in
    the backward pass: 6. The second term is attention: scores and sums of values, 2 multiplications and additions per
    query head and width and attended key, three times (Chowdhery et al. 2022, appendix B, where A = T). What is
    computed again to save memory does not count.

    Args:
      attended: A, how many keys a query attends to on average: (T + 1) / 2 for causal attention over T tokens; see
        `mean_attended`.
    """
    config = model.config
    weights = sum(x.size for x in jax.tree.leaves(model))
    if not config.tied:
        weights -= config.vocab_size * config.hidden_size
    return 6.0 * weights + 12.0 * config.num_layers * config.num_heads * config.head_dim * attended


def mean_attended(length: int, slots: int | None = None) -> float:
    """Keys that a query attends to, on average over `length` tokens: those before it and its own, of which at most
    `slots` + 1 are held."""
    held = np.arange(1, length + 1)
    return float((held if slots is None else np.minimum(held, slots + 1)).mean())


class Throughput:
    """Tokens per second between two calls, and the share of the devices' peak that they amount to.

    Args:
      flops_per_token: None: no share is told.
    """

    def __init__(self, flops_per_token: float | None = None):
        peak = peak_flops()
        self._share = None if flops_per_token is None or peak is None else flops_per_token / peak / jax.device_count()
        self._last: float | None = None

    def __call__(self, tokens: int) -> dict[str, float | None]:
        """`tokens_per_second` and `mfu` of so many tokens since the last call; None at the first, which compiled."""
        last, self._last = self._last, time.perf_counter()
        speed = None if last is None else tokens / (self._last - last)
        return dict(tokens_per_second=speed, mfu=None if speed is None or self._share is None else speed * self._share)


class MetricsFile:
    """One JSON object per step and line, written at once.

    A run that is taken up again at step n drops the lines after n, and a line that was cut off: the file then has each
    step once, as if nothing had happened.

    Args:
      path: made if it is not there, with its folder.
      after: the step that the run goes on from; 0 empties the file.

    Raises:
      OSError: cannot be written.
    """

    def __init__(self, path: str | Path, *, after: int = 0):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            part = path.with_name(path.name + ".part")
            part.write_bytes(b"".join(line for line in lines if _step(line, after) <= after))
            part.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()  # what the operating system has outlives this process

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _step(line: bytes, after: int) -> int:
    """The step of a line; one that is to be dropped if the line is not whole."""
    if not line.endswith(b"\n"):
        return after + 1
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return after + 1


def tensorboard(folder: str | Path, *, after: int = 0) -> Callable[[int, Mapping[str, Any]], None]:
    """Logs every number for TensorBoard.

    Args:
      after: the step that the run goes on from; TensorBoard then ignores what an earlier run wrote after it.

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

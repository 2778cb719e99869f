"""Blocks of tokens whose products are done at once keep and give what single steps do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import Policy
from jaxcompress.recurrence import stream
from jaxcompress.recurrence.advance import Advanced, advance
from jaxcompress.state.attention_traits import AttentionTraits

from .harness import FAST_COMPILE, ROPE, SINKS, B, C, D, H, K

T = 23
rng = np.random.default_rng(0)
Q, KEYS, VALUES = (jnp.asarray(rng.normal(size=(B, T, h, D)) * 2, jnp.float32) for h in (H, K, K))
VALID = np.ones((B, T), bool)
VALID[0, :4], VALID[1, 9:12], VALID[2, -5:] = False, False, False
AT = jnp.asarray(np.where(VALID, VALID.cumsum(1) - 1, -1), jnp.int32)


def read(policy: Policy, slots: int, window: int | None, dtype: str, multiple: int) -> Advanced:
    config = DecoderConfig(8, H * D, 8, 1, H, K, D)
    (state,) = init_state(config, policy, slots, batch=B, dtype=dtype, slot_multiple=multiple)

    def run(*arrays: Any) -> Advanced:
        traits = AttentionTraits(3.0, jnp.asarray(SINKS))
        first = advance(*arrays[:4], state, 0, policy, rotate=ROPE, window=window, traits=traits)
        kept = first.state
        again = jnp.where(arrays[3] >= 0, arrays[3] + T, -1)  # a second segment, into a state that is full
        return advance(*arrays[:3], again, kept, 0, policy, rotate=ROPE, window=window, traits=traits)

    return jax.jit(run, compiler_options=FAST_COMPILE)(Q, KEYS, VALUES, AT)


@pytest.mark.parametrize(("policy", "slots", "window", "dtype", "multiple"), [
    (policies.TOVA(), C, None, "float32", 1),
    (policies.TOVA(), C, None, "int8", 1),
    (policies.TOVA(), C, 4, "float32", 1),
    (policies.H2O(2, "layer"), C, None, "float32", 8),
    (policies.Window(2), C, None, "bfloat16", 1),
    (policies.KeyDiff("layer"), C, None, "float32", 1),
    (policies.Scissorhands(history=5, recent=1, scope="layer"), C, None, "float32", 1),
    (policies.protect(policies.TOVA(), 1), C, None, "float32", 1),
    (policies.Full(), 2 * T, None, "float32", 1),
    (policies.Full(), 12, None, "float32", 1),
], ids=str)  # fmt: skip
def test_blocks_are_single_steps(
    policy: Policy, slots: int, window: int | None, dtype: str, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding at the start, within and at the end; where a token finds no slot, both report NaN."""
    monkeypatch.setattr(stream, "reads_blocks", lambda *_: False)
    single = read(policy, slots, window, dtype, multiple)
    monkeypatch.undo()
    monkeypatch.setattr("jaxcompress.recurrence.stream_block.FEWEST_SLOTS", 1)
    monkeypatch.setattr(stream, "BLOCK", 5)
    blocks = read(policy, slots, window, dtype, multiple)
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-5
    for row in range(B):
        np.testing.assert_allclose(
            np.asarray(blocks.out[row])[VALID[row]], np.asarray(single.out[row])[VALID[row]], rtol=0, atol=tolerance
        )
    held = lambda done: np.sort(np.asarray(done.state.positions))
    np.testing.assert_array_equal(held(blocks), held(single))
    np.testing.assert_array_equal(blocks.freed, single.freed)
    assert slots != 12 or np.isnan(np.asarray(blocks.out)).any()

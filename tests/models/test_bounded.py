"""What a state was made for: reading on with anything else is refused where it can be told."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_decoder

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import ReadResult, last_hidden, read
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import H2O, TOVA, Window, per_layer
from jaxcompress.policies.names import get_policy
from jaxcompress.recurrence.advance import advance
from jaxcompress.state.kv_state import State

pytestmark = pytest.mark.usefixtures("as_users_call_it")
MODEL = tiny_decoder()
TOKENS = jnp.zeros((1, 2), jnp.int32)
POLICIES = (
    "window", "streaming_llm+2-before", "tova", "tova-kv_head", "tova-query_head", "tova-pool/adaptive", "rkv-sketch8",
    "expected_attention",
)  # fmt: skip


def traced(state: State, policy: Any, tokens: Any = TOKENS, model: Any = MODEL) -> Any:
    """Nothing is compiled, and nothing computed."""
    return jax.eval_shape(lambda x: read(model, x, state, policy).hidden, tokens)


def test_a_state_is_read_with_its_policy() -> None:
    states = {name: init_state(MODEL.config, get_policy(name), 40) for name in POLICIES}
    for name, state in states.items():
        assert traced(state, get_policy(name)).shape == (1, 2, MODEL.config.hidden_size)
    refused = {
        pair for pair in permutations(POLICIES, 2) if _refused(states[pair[0]], pair[1])
    }  # fmt: skip
    # What keeps the same numbers, or none, for the same heads cannot be told apart.
    assert set(permutations(POLICIES, 2)) - refused == {("window", "streaming_llm+2-before")}


def _refused(state: State, policy: str) -> bool:
    try:
        traced(state, get_policy(policy))
    except ValueError as error:
        return "was not made for policy" in str(error)
    return False


@pytest.mark.parametrize("placement", ["slot", "compact"])
def test_the_tokens_of_a_pool_stand_at_absolute_positions(placement: Any) -> None:
    """Ranks and gaps are those of one head's tokens; a pool has them of all heads."""
    policy = get_policy("tova-pool/adaptive")
    state = init_state(MODEL.config, policy, 4)
    with pytest.raises(ValueError, match=f"pool of slots, .* absolute positions, not at placement '{placement}'"):
        jax.eval_shape(lambda x: read(MODEL, x, state, policy, placement=placement).hidden, TOKENS)


def test_arrays_without_a_model_need_a_policy_too() -> None:
    """What `read` says of a name in place of a policy, `advance` says."""
    (state,) = init_state(DecoderConfig(8, 8, 8, 1, 2, 2, 4), TOVA(), 4)
    x = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(ValueError, match="a policy is expected, .* not its name 'tova'"):
        advance(x, x, x, jnp.arange(2)[None], state, 0, "tova")  # type: ignore[arg-type]


def test_layers_that_are_stored_together_have_one_policy() -> None:
    state = init_state(MODEL.config, TOVA(), 4)
    with pytest.raises(ValueError, match="holds layers 0 to 1 together, and the policy has tova and window for them"):
        traced(state, per_layer(TOVA(), Window()))
    traced(state, per_layer(TOVA(), TOVA()))


def test_a_state_is_read_with_its_model_and_rows() -> None:
    state = init_state(MODEL.config, H2O(), 4)
    with pytest.raises(ValueError, match="the state has 1 rows, the tokens 3"):
        traced(state, H2O(), jnp.zeros((3, 2), jnp.int32))
    with pytest.raises(ValueError, match="the state has 1 layers, the model 2"):
        traced((state[0].take(0),), H2O())
    with pytest.raises(ValueError, match="a state is expected, as init_state makes it, not KVState"):
        traced(state[0], H2O())  # type: ignore[arg-type]


def test_the_last_hidden_state_is_that_of_the_last_token() -> None:
    """Padding at the right, at the left, and between tokens."""
    valid = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]], bool)
    hidden = jnp.arange(12.0).reshape(3, 4, 1)
    result = ReadResult(hidden, (), (), ())
    assert last_hidden(result, jnp.asarray(valid))[:, 0, 0].tolist() == [1.0, 7.0, 10.0]
    assert last_hidden(result, None)[:, 0, 0].tolist() == [3.0, 7.0, 11.0]

"""A state in a file: its sequences go on token for token, and a file of something else says what it is of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCABULARY, random_tokens, tiny_decoder, with_embedding
from tiny_chat import chat_folder

import jaxcompress as jc
from jaxcompress.checkpoints import load
from jaxcompress.generation import DecodeState, GenerationConfig, decode, init_decode_state, prefill
from jaxcompress.generation.state_file import Record, read_record, write_record
from jaxcompress.models.fingerprint import _places, fingerprint
from jaxcompress.policies import TOVA, Policy, Window, get_policy, policy
from jaxcompress.policies.forget_head import init_forget_head
from jaxcompress.policies.gates import dmc
from jaxcompress.policies.learned import DMS
from jaxcompress.policies.policy import leaf
from jaxcompress.state.storage import DTYPES

SAMPLED = GenerationConfig(temperature=0.9, repetition_penalty=1.2)
PER_HEAD = [[6, 4], [5, 6]]


@policy
class Longest(Policy):
    """A policy of one's own, with an array."""

    factor: Any = leaf()

    def score(self, stats: Any, held: Any) -> Any:
        return jnp.linalg.norm(held.values.mean(1, keepdims=True), axis=-1) * self.factor[0]


def head(outputs: int) -> Any:
    return init_forget_head(
        jax.random.key(0), layers=2, kv_heads=2, head_dim=8, hidden=4, start=tuple(map(float, range(outputs)))
    )


def begun(policy: Policy, slots: Any = 6, **options: Any) -> DecodeState:
    rows = random_tokens(2, 20)
    state = init_decode_state(tiny_decoder(), policy, slots, batch=2, seeds=[3, 4], **options)
    return prefill(tiny_decoder(), [rows[0], rows[1, :15]], state, segment=32)


CASES: dict[str, Callable[[], DecodeState]] = {
    **{dtype: lambda dtype=dtype: begun(TOVA(), dtype=dtype) for dtype in DTYPES},
    "per layer": lambda: begun(get_policy("per_layer(window+2,h2o)"), placement="slot"),
    "per head": lambda: begun(get_policy("tova-kv_head"), PER_HEAD, dtype="int8"),
    "pool": lambda: begun(get_policy("tova-pool/every4")),
    "rows have numbers": lambda: begun(get_policy("expected_attention")),
    "learned": lambda: begun(get_policy("learned/sampled4", DMS(head(2), window=2))),
    "gates": lambda: begun(dmc(head(2))),
}


@pytest.mark.parametrize("case", CASES)
def test_goes_on_token_for_token(case: str, tmp_path: Path) -> None:
    model, state = tiny_decoder(), CASES[case]()
    jc.save_state(state, tmp_path / "state", model)
    again = jc.load_state(tmp_path / "state", model)
    assert (again.policy, again.placement) == (state.policy, state.placement)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    configs = [SAMPLED, GenerationConfig()] if case in ("float32", "int4") else [SAMPLED]
    for config in configs:
        (expected, _), (found, _) = (decode(model, one.copy(), 10, config) for one in (state, again))
        assert np.array_equal(expected, found)
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_conversation_goes_on(tmp_path: Path, sampled: bool) -> None:
    """C16: until tomorrow, with its policy and placement."""
    loaded = load(chat_folder(tmp_path))
    config = GenerationConfig(temperature=0.8, top_k=50) if sampled else GenerationConfig()
    chat = jc.Chat(
        loaded, get_policy("h2o"), 8, system="Be brief.", arguments=dict(tools=[dict(name="look")]), max_new_tokens=9,
        config=config, seed=5, dtype="int8", placement="slot", mode="chunked", chunk=4,
    )  # fmt: skip
    chat.send("Who are you?")
    chat.save(tmp_path / "chat")
    again = jc.Chat.load(tmp_path / "chat", loaded)
    for name in ("messages", "policy", "slots", "config", "max_new_tokens", "arguments", "options", "nbytes", "held"):
        assert getattr(again, name) == getattr(chat, name), name
    assert again.tokens.tolist() == chat.tokens.tolist()
    for message in ("And then?", "Why?"):
        assert again.send(message) == chat.send(message)
    assert jc.load_state(tmp_path / "chat", loaded.model).placement == "slot"
    jc.save_state(chat.state, tmp_path / "bare", loaded.model)
    with pytest.raises(ValueError, match="a state without a conversation"):
        jc.Chat.load(tmp_path / "bare", loaded)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "state"
    jc.save_state(CASES["float32"](), path, tiny_decoder())
    return path


def test_a_state_of_another_model(saved: Path) -> None:
    with pytest.raises(ValueError, match="a model of the same shape with other weights: their fingerprint is"):
        jc.load_state(saved, with_embedding(tiny_decoder(), 7, 1.0))
    with pytest.raises(ValueError, match="another model, with norm_eps 1e-06 instead of 0.001"):
        jc.load_state(saved, tiny_decoder(norm_eps=1e-3))
    with pytest.raises(ValueError, match="another model, with vocab_size 61 instead of 62"):
        jc.load_state(saved, tiny_decoder(VOCABULARY + 1))


def test_a_state_of_another_policy(saved: Path, tmp_path: Path) -> None:
    model = tiny_decoder()
    with pytest.raises(ValueError, match="a state of the policy tova, not window"):
        jc.load_state(saved, model, Window(0))
    assert jc.load_state(saved, model, TOVA()).policy == TOVA()
    own = Longest(jnp.array([1.0, 2.0]))
    jc.save_state(begun(own), tmp_path / "own", model)
    with pytest.raises(ValueError, match="the policy Longest, which no name gives back; give it as policy="):
        jc.load_state(tmp_path / "own", model)
    with pytest.raises(ValueError, match="the policy Longest with other weights"):
        jc.load_state(tmp_path / "own", model, Longest(jnp.zeros(2)))
    assert jc.load_state(tmp_path / "own", model, own).policy == own


def test_a_state_of_another_version(saved: Path, tmp_path: Path) -> None:
    facts, arrays = read_record(saved)
    write_record(tmp_path / "later", Record({**facts, "format": 2}, arrays))
    with pytest.raises(ValueError, match="was written in format 2, this version of jaxcompress reads format 1"):
        jc.load_state(tmp_path / "later", tiny_decoder())


def test_a_damaged_file(saved: Path, tmp_path: Path) -> None:
    path, (facts, arrays), whole = tmp_path / "damaged", read_record(saved), saved.read_bytes()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        jc.load_state(path, tiny_decoder())
    for content in (b"", b"{}", whole[:100], whole[:-9], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no state that was saved"):
            jc.load_state(path, tiny_decoder())
    changed = [
        (facts, {name: x for name, x in arrays.items() if name != "kv.0.keys"}, "it has no array kv.0.keys"),
        (facts, arrays | {"logits": arrays["logits"][:, 1:]}, "logits is float32"),
        ({**facts, "parts": [{**facts["parts"][0], "slots": 3}]}, arrays, "expected float32"),
        ({**facts, "parts": []}, arrays, "expected|0 layers"),
        ({**facts, "parts": 3}, arrays, "its description of the state is wrong"),
        ({**facts, "batch": "two"}, arrays, "its description of the state is wrong"),
        ({**facts, "keys": "?"}, arrays, "keys|random|impl"),
        ({name: x for name, x in facts.items() if name != "policy"}, arrays, "its description of the state is wrong"),
    ]
    for told, numbers, says in changed:
        write_record(path, Record(told, numbers))
        with pytest.raises(ValueError, match=says):
            jc.load_state(path, tiny_decoder())


def test_a_state_that_cannot_be_saved(tmp_path: Path) -> None:
    state = begun(TOVA())
    decode(tiny_decoder(), state, 2)
    with pytest.raises(ValueError, match="this state was used before"):
        jc.save_state(state, tmp_path / "state", tiny_decoder())
    with pytest.raises(OSError, match="nowhere"):
        jc.save_state(begun(TOVA()), tmp_path / "nowhere" / "state", tiny_decoder())
    assert not os.listdir(tmp_path)


def test_a_kill_while_it_is_written_leaves_the_old_file(saved: Path, tmp_path: Path) -> None:
    code = """
import os, sys
from jaxcompress.generation.state_file import Record, read_record, write_record
facts, arrays = read_record(sys.argv[1])
write_record(sys.argv[2], Record(facts, arrays))
os.fsync = lambda file: os.kill(os.getpid(), 9)  # everything is written, and has no name yet
write_record(sys.argv[2], Record(facts, {"logits": arrays["logits"] + 1}))
"""
    path = tmp_path / "state"
    done = subprocess.run([sys.executable, "-c", code, str(saved), str(path)], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == saved.read_bytes()
    assert len(os.listdir(tmp_path)) == 2, "what was half written lies beside it"
    jc.save_state(jc.load_state(path, tiny_decoder()), path, tiny_decoder())
    assert os.listdir(tmp_path) == ["state"]


def test_the_fingerprint_of_a_model() -> None:
    model = tiny_decoder()
    mine = fingerprint(model)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    assert fingerprint(half) == mine
    assert fingerprint(jax.tree.map(np.asarray, model)) == mine
    assert fingerprint(with_embedding(model, 0, 1.0)) != mine
    rows, columns = _places((49152, 576))
    assert (len(set(rows.tolist())), len(set(columns.tolist()))) == (49152, 576)

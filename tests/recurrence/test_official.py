"""The numbers of the authors' own programs: every slot of every step, and the logits (see fixtures/official)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder, ReadResult, read
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import H2O, TOVA, Full, Policy, StreamingLLM

from .harness import FAST_COMPILE

FOLDER = Path(__file__).parents[1] / "fixtures" / "official"
SLOTS, PROMPT = 48, 96
numbers = cache(lambda name: dict(np.load(FOLDER / f"{name}.npz")))
step = jax.jit(read, static_argnames=("chunk", "placement"), compiler_options=FAST_COMPILE)
score = jax.jit(lambda model, hidden: model.logits(hidden))


class Official(NamedTuple):
    """A model and all its tokens [B, T], those of the prompt first."""

    model: Decoder
    ids: np.ndarray


@cache
def llama(name: str) -> Official:
    z = numbers(name)
    c = json.loads(str(z["config_json"]))
    config = DecoderConfig(
        vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"], num_heads=c["num_attention_heads"], num_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"], norm_eps=c["rms_norm_eps"],
    )  # fmt: skip
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)), compiler_options=FAST_COMPILE)()
    stack = lambda name: jnp.stack([z[f"w/model.layers.{i}.{name}.weight"].T for i in range(config.num_layers)])
    attention, mlp = model.layers.attention, model.layers.mlp
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        getattr(attention, ours).kernel[...] = stack(f"self_attn.{theirs}_proj")
    for name in ("gate", "up", "down"):
        getattr(mlp, name).kernel[...] = stack(f"mlp.{name}_proj")
    model.layers.attention_norm.scale[...] = stack("input_layernorm")
    model.layers.mlp_norm.scale[...] = stack("post_attention_layernorm")
    model.embedding[...] = jnp.asarray(z["w/model.embed_tokens.weight"])
    model.head[...] = jnp.asarray(z["w/lm_head.weight"].T)
    model.norm.scale[...] = jnp.asarray(z["w/model.norm.weight"])
    return Official(model, np.concatenate([z["input_ids"], z["cont_ids"]], 1).astype(np.int32))


def decode(official: Official, policy: Policy, prompt: int, total: int, placement: str) -> Iterator[ReadResult]:
    """The prompt at once (one-shot), then token by token up to `total` tokens."""
    model, ids = official
    state = init_state(model.config, policy, SLOTS if policy.evicts else total, batch=len(ids))
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, total))]:
        tokens = jnp.asarray(ids[:, start:end])
        done = step(model, tokens, state, policy, chunk=end - start, placement=placement)
        state = done.state
        yield done


def last_logits(model: Decoder, done: ReadResult) -> np.ndarray:
    return np.asarray(score(model, done.hidden[:, -1:]))[:, 0]


def positions(done: ReadResult) -> np.ndarray:
    """[L, B, P, SLOTS] sorted, the free slot left out."""
    held = np.concatenate([np.asarray(run.positions) for run in done.state])
    return np.sort(held, -1)[..., -SLOTS:]


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_full_cache(name: str) -> None:
    z, official = numbers(name), llama(name)
    model, ids = official
    logits = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(ids))
    np.testing.assert_allclose(logits[:, :PROMPT], z["full/prompt_logits"], atol=1e-3)
    np.testing.assert_allclose(logits[:, PROMPT:], z["full/cont_logits"], atol=1e-3)
    if name == "llama_mha":
        return
    steps = list(decode(official, Full(), PROMPT, ids.shape[1], "absolute"))
    np.testing.assert_allclose(model.logits(steps[0].hidden), z["full/prompt_logits"], atol=1e-3)
    for i, done in enumerate(steps[1:]):
        np.testing.assert_allclose(last_logits(model, done), z["full/cont_logits"][:, i], atol=1e-3)


@pytest.mark.parametrize(("run", "prompt"), [("long_prompt", PROMPT), ("short_prompt", 16)])
def test_tova(run: str, prompt: int) -> None:
    """One-shot prompt longer and shorter than the state, then steps. Some tokens go as soon as they came."""
    z, official = numbers("tova"), llama("llama_gqa")
    held = np.stack([z[f"{run}/pos{layer}"] for layer in range(3)])  # [L, steps, B, SLOTS]
    gone_at_once = 0
    for i, done in enumerate(decode(official, TOVA(), prompt, prompt + held.shape[1] - 1, "absolute")):
        ours = positions(done)[:, :, 0]
        assert (ours != np.sort(held[:, i], -1)).sum() == 0
        np.testing.assert_allclose(last_logits(official.model, done), z[f"{run}/logits"][i], atol=1e-3)
        gone_at_once += int((ours != prompt + i - 1).all(-1).sum()) if i else 0
    assert gone_at_once > 0 or run == "long_prompt"


def test_h2o() -> None:
    """A set per query head: one-shot prompt, then steps."""
    z, official = numbers("h2o"), llama("llama_mha")
    heavy, recent = z["h2o/hh_recent"].tolist()
    assert heavy + recent == SLOTS
    held = np.stack([z[f"h2o/pos{layer}"] for layer in range(3)])  # [L, steps, H, SLOTS]
    for i, done in enumerate(decode(official, H2O(recent), PROMPT, PROMPT + held.shape[1] - 1, "absolute")):
        assert (positions(done)[:, 0] != np.sort(held[:, i], -1)).sum() == 0
        np.testing.assert_allclose(last_logits(official.model, done)[0], z["h2o/logits"][i], atol=1e-3)


@pytest.mark.parametrize(("run", "evict"), [("stream_ppl", "after"), ("stream_space", "before")])
def test_streaming_llm(run: str, evict: str) -> None:
    """Token by token, and as one scan. The two ways to evict part at the first token that finds the state full."""
    z, official = numbers("streaming_llm"), llama("llama_mha")
    model, ids = official
    sinks, recent = z["stream/start_recent"].tolist()
    assert sinks + recent == SLOTS
    policy = StreamingLLM(sinks, evict)
    want = z[f"{run}/logits"]
    for i, done in enumerate(decode(official, policy, 1, ids.shape[1], "slot")):
        np.testing.assert_allclose(last_logits(model, done)[0], want[i], atol=1e-3)
        newest = range(max(sinks, i + 1 - recent), i + 1)
        assert positions(done)[0, 0, 0].tolist()[-min(i + 1, SLOTS) :] == [*range(min(sinks, i + 1)), *newest]
    state = init_state(model.config, policy, SLOTS)
    scan = step(model, jnp.asarray(ids), state, policy, chunk=1, placement="slot")
    np.testing.assert_allclose(score(model, scan.hidden)[0], want, atol=1e-3)
    other = z["stream_space/logits" if run == "stream_ppl" else "stream_ppl/logits"]
    apart = np.abs(want - other).max(-1) > 1e-3
    assert not apart[:SLOTS].any()
    assert apart[SLOTS]


def test_tova_as_a_scan() -> None:
    """Reading all tokens in one call, streaming, is what token by token gives; one-shot is something else."""
    model, ids = llama("llama_gqa")
    steps = list(decode(Official(model, ids), TOVA(), 1, ids.shape[1], "absolute"))
    state = init_state(model.config, TOVA(), SLOTS, batch=len(ids))
    scan = step(model, jnp.asarray(ids), state, TOVA(), chunk=1, placement="absolute")
    np.testing.assert_array_equal(positions(scan), positions(steps[-1]))
    hidden = np.concatenate([done.hidden for done in steps], 1)
    np.testing.assert_allclose(scan.hidden, hidden, atol=1e-3)
    shot = np.stack([numbers("tova")[f"long_prompt/pos{layer}"][0] for layer in range(3)])
    assert (positions(steps[PROMPT - 1])[:, :, 0] != shot).any(-1).all()

"""Prefill with fewer visual tokens: FLOPs of the language part, time, and bytes of the KV cache.

    python experiments/speed_vision.py [--keep 64] [--methods fastv mustdrop ...] [--out runs/speed_vision.json]

A random model in the shape of LLaVA-1.5 (32 layers, 576 patches), narrow enough for a laptop. Figures depend on shapes
only, not on weights. FLOPs are the compiler's count (`cost_analysis`) of every layer at the length that it sees, and of
the pruning steps between layers. They are counted layer by layer, because the compiler counts the body of a loop once.
Time is the median of whole prefills, with all methods run once per round. Ratios are to all patches.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from command import Command, arguments
from flax import nnx

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.init_state import init_state
from jaxcompress.models.llava import LlavaConfig
from jaxcompress.models.read_block import HiddenBlock, read_block
from jaxcompress.models.rope import rotate
from jaxcompress.models.tower_config import TowerConfig
from jaxcompress.policies import Full
from jaxcompress.recurrence.block_attention import causal_attention
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.vision import Method, get_method, get_method_for_mean, slots_per_layer
from jaxcompress.vision.layer_view import PruneContext
from jaxcompress.vision.reading import layer_prunings

BEFORE, AFTER, WRITTEN = 35, 29, 16
"""Words before the picture (LLaVA's system prompt), after it, and room for those written."""
PROGRESSIVE = ("mustdrop", "sparsevlm", "sparsevlm+", "fitprune")
"""Methods that drop tokens in several layers. Their token count is the mean over layers, as in their papers."""


@dataclass(frozen=True)
class Arguments(Command):
    """Prints a line per method."""

    keep: int = 64
    methods: tuple[str, ...] = ("grid", "fastv", "mustdrop")
    """Methods that cannot keep so few tokens are left out, and the script says why."""
    layers: int = 32
    width: int = 256
    side: int = 24
    """Patches per side of the picture."""
    runs: int = 5
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(quick=True, keep=9, methods=("fastv", "sparsevlm+"), layers=4, width=32, side=8, runs=1)


def shape(layers: int, width: int, side: int) -> LlavaConfig:
    tower = TowerConfig(64, 128, 24, 4, 4 * side, 4, pre_norm=True)  # not run here
    decoder = DecoderConfig(1000, width, width * 43 // 16 // 8 * 8, layers, width // 32, width // 32, 32)
    return LlavaConfig(tower, decoder, image_token=999, feature_layers=23)


def start(config: LlavaConfig, tokens: int, visual: int, seed: int = 0) -> HiddenBlock:
    """A prompt of words and `visual` patches, `tokens` in all."""
    hidden = jax.random.normal(jax.random.key(seed), (1, tokens, config.decoder.hidden_size))
    place = jnp.arange(tokens, dtype=jnp.int32)[None]
    patch = jnp.where((place >= BEFORE) & (place < BEFORE + visual), place - BEFORE, -1)
    return HiddenBlock(hidden, place, patch)


def flops(model: Decoder, config: LlavaConfig, method: Method) -> float:
    """FLOPs of all layers and pruning steps, each compiled by itself."""
    counts = method.tokens_per_layer(config)
    words = BEFORE + AFTER
    layers = sum(_layer_flops(model, words + count) for count in counts)
    steps = method.prune_steps(config.decoder, counts[0])
    between = sum(
        _step_flops(config, words + counts[step.layer], counts[step.layer], counts[0], step) for step in steps
    )
    return layers + between


@cache
def _layer_flops(model: Decoder, tokens: int) -> float:
    def one(model: Decoder, x: Any, positions: Any) -> Any:
        def attend(q, k, v, positions, layer, index, carry, xs):
            at = positions[..., None]
            rope = model.config.rope
            return causal_attention(rotate(q, at, rope), rotate(k, at, rope), v, positions), carry, xs

        return model.run_layers(x, positions, attend, layers=range(1))[0]

    x = jax.ShapeDtypeStruct((1, tokens, model.config.hidden_size), jnp.float32)
    return _count(jax.jit(one).lower(model, x, jax.ShapeDtypeStruct((1, tokens), jnp.int32)))


def _step_flops(config: LlavaConfig, tokens: int, left: int, visual: int, step: Any) -> float:
    decoder = config.decoder

    def one(hidden: Any, positions: Any, patch: Any, q: Any, k: Any, key: Any) -> Any:
        block = HiddenBlock(hidden, positions, patch)
        context = PruneContext(jnp.ones((1, tokens - left), bool), key, decoder.rope)
        attention = AttentionInputs(q, k, jnp.zeros((1, tokens)), positions)
        return step.rule(context, block, attention, step.keep)

    like = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct((1, *size), dtype)
    ints = like(tokens, dtype=jnp.int32)
    q, k = (like(tokens, heads, decoder.head_dim) for heads in (decoder.num_heads, decoder.num_kv_heads))
    key = like(visual, dtype=jnp.bool_)
    return _count(jax.jit(one).lower(like(tokens, decoder.hidden_size), ints, ints, q, k, key))


def _count(lowered: Any) -> float:
    return float(lowered.compile().cost_analysis()["flops"])


@partial(jax.jit, static_argnames=("config", "method"))
def prefill(model: Decoder, block: HiddenBlock, config: LlavaConfig, method: Method) -> Any:
    counts = method.tokens_per_layer(config)
    words = block.patch.shape[1] - counts[0]
    room = words + WRITTEN
    context = PruneContext(jnp.ones((1, words), bool), jnp.zeros((1, counts[0]), bool), config.decoder.rope)
    state = init_state(config.decoder, Full(), slots_per_layer(config, method, room))
    steps = method.prune_steps(config.decoder, counts[0])
    return read_block(model, block, state, Full(), prunings=layer_prunings(context, steps))


def chosen(options: Arguments, config: LlavaConfig) -> dict[str, Method]:
    """All patches, and the methods by name, without those that cannot keep so few tokens."""
    methods = {"full": get_method("full")}
    for name in options.methods:
        try:
            average = name in PROGRESSIVE
            methods[name] = (
                get_method_for_mean(config, name, options.keep) if average else get_method(name, options.keep)
            )
        except ValueError as error:
            print(f"{name} is left out: {error}", flush=True)
    return methods


def main(options: Arguments) -> None:
    config = shape(options.layers, options.width, options.side)
    model = Decoder(config.decoder, rngs=nnx.Rngs(0))
    methods = chosen(options, config)
    blocks, took = {}, {name: [] for name in methods}
    for name, method in methods.items():
        visual = method.tokens_per_layer(config)[0]
        blocks[name] = start(config, BEFORE + AFTER + visual, visual)
        jax.block_until_ready(prefill(model, blocks[name], config, method))
    for _ in range(options.runs):
        for name, method in methods.items():
            began = time.perf_counter()
            jax.block_until_ready(prefill(model, blocks[name], config, method))
            took[name].append(time.perf_counter() - began)
    rows = []
    for name, method in methods.items():
        counts = method.tokens_per_layer(config)
        state = jax.eval_shape(
            lambda m=method: init_state(config.decoder, Full(), slots_per_layer(config, m, BEFORE + AFTER))
        )
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        seconds = statistics.median(took[name])
        rows.append(
            dict(method=name, last=counts[-1], mean=method.mean_tokens(config), kv_bytes=held, seconds=seconds)
            | dict(flops=flops(model, config, method))
        )
    whole = rows[0]
    words = f"{BEFORE + AFTER} words, {options.side**2} patches"
    print(f"{options.layers} layers, width {options.width}, {words}, {jax.devices()[0]}")
    print(
        f"{'method':<14}{'last':>6}{'mean':>8}{'GFLOPs':>9}{'saved':>8}{'ms':>9}{'saved':>8}{'KV MiB':>9}{'saved':>8}"
    )
    for row in rows:
        saved = {key: 1 - row[key] / whole[key] for key in ("flops", "seconds", "kv_bytes")}
        row.update({f"{key}_saved": value for key, value in saved.items()})
        print(f"{row['method']:<14}{row['last']:>6}{row['mean']:>8.1f}{row['flops'] / 1e9:>9.2f}{saved['flops']:>8.1%}"
              f"{row['seconds'] * 1e3:>9.1f}{saved['seconds']:>8.1%}{row['kv_bytes'] / 2**20:>9.2f}"
              f"{saved['kv_bytes']:>8.1%}")  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(arguments(QUICK))

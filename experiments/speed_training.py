"""What training through a bounded state costs, beside plain full-attention training on as many tokens.

    python experiments/speed_training.py
    python experiments/speed_training.py --model smollm2 --policies tova --forms parallel --no-beside --repeats 1

  time    seconds of loss and gradient, by either exact form of the recurrence / with full attention (medians, in turn)
  heads   the same of a retention head, whose model is only read, and the tokens per second that this is
  memory  temporary memory of the compiled program at 8 times the length / at the length, truncated and whole

Full attention is this library's `causal_attention`, whose blocks are rematerialised; `jax.nn.dot_product_attention` is
shown beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from command import OfModel, arguments
from speed_decode import decoder_of_width, in_turn

import jaxcompress as jc
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.forget_head import ForgetHead
from jaxcompress.policies.names import get_policy
from jaxcompress.recurrence.parallel import parallel_gradient
from jaxcompress.training.loss import token_losses
from jaxcompress.training.recurrent import bounded_value_and_grad, rematerialised
from jaxcompress.training.retention_heads import init_retention, retention_loss

Form = Literal["parallel", "rematerialised"]


@dataclass(frozen=True)
class Arguments(OfModel):
    """Prints the ratios as JSON lines."""

    policies: tuple[str, ...] = ("tova", "h2o-layer", "window+4", "snapkv+16/every16")
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    slots: int = 128
    segment: int = 256
    tokens: int = 4096
    """Tokens of a batch; the number of rows is this divided by the length."""
    width: int = 256
    """Width of the model: 6 layers of random weights, if --model is not given."""
    repeats: int = 3
    beside: bool = True
    """Also `jax.nn.dot_product_attention`, which holds all probabilities at once."""
    heads: bool = True
    memory: bool = True
    forms: tuple[Form, ...] = ("parallel", "rematerialised")
    reaches: tuple[int, ...] = (1, 2)
    """Segments over which the gradient goes back, beside the whole row; `time` uses the first of these."""
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(
    quick=True,
    policies=("tova",),
    lengths=(64,),
    slots=16,
    segment=32,
    tokens=64,
    width=64,
    repeats=1,
    beside=False,
    forms=("parallel",),
    reaches=(),
)


@partial(jax.jit, static_argnames="library")
def full(model: Decoder, tokens: jax.Array, library: bool = True) -> Any:
    """Loss and gradient with full attention."""

    def unblocked(model: Decoder, x: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])

        def attend(q, k, v, positions, layer, index, carry, xs):
            q, k = layer.attention.constants(model.config, index).placed(q, k, positions)
            return jax.nn.dot_product_attention(q, k, v, is_causal=True), carry, xs

        return model.run_layers(x, positions, attend)[0]

    def loss(model: Decoder) -> jax.Array:
        x = model.embed(tokens[:, :-1])
        x = model.hidden_of(x) if library else unblocked(model, x)
        return token_losses(model.logits(model.norm(x)), tokens[:, 1:]).mean()

    return jax.value_and_grad(loss)(model)


@partial(jax.jit, static_argnames=("slots", "segment", "bptt_segments", "recurrence"))
def bounded(model: Decoder, tokens: jax.Array, policy: jc.Policy, slots: int, **how: Any) -> Any:
    weights = jnp.ones((tokens.shape[0], tokens.shape[1] - 1))
    return bounded_value_and_grad(model, tokens, policy, slots, weights=weights, **how)


@jax.jit
def head_alone(model: Decoder, tokens: jax.Array, head: ForgetHead) -> Any:
    """Loss and gradient of a retention head."""
    return jax.value_and_grad(lambda head: retention_loss(model, tokens, head, scope="layer"))(head)


FORMS: dict[Form, Any] = {"parallel": parallel_gradient, "rematerialised": rematerialised}


def measure_time(model: Decoder, args: Arguments) -> list[dict[str, Any]]:
    rows = []
    for length in args.lengths:
        batch = max(args.tokens // length, 1)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length + 1)))
        for name in args.policies:
            how: dict[str, Any] = dict(policy=get_policy(name), slots=args.slots, segment=args.segment)
            runs = {
                f"{form}, {bptt_segments or 'whole'}": partial(
                    bounded, model, tokens, bptt_segments=bptt_segments, recurrence=FORMS[form], **how
                )
                for form in args.forms
                for bptt_segments in (*args.reaches[:1], None)
            }
            plain = dict(full=partial(full, model, tokens))
            if args.beside:
                plain["dot_product_attention"] = partial(full, model, tokens, False)
            seconds = in_turn(args.repeats, **runs, **plain)
            for run in [*runs, *list(plain)[1:]]:
                row = dict(part="time", policy=name, length=length, rows=batch, form=run,
                           ratio=round(seconds[run] / seconds["full"], 3), seconds=round(seconds[run], 3))  # fmt: skip
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def measure_heads(model: Decoder, args: Arguments) -> list[dict[str, Any]]:
    rows, head = [], init_retention(model.config, jax.random.key(0))
    for length in args.lengths:
        batch = max(args.tokens // length, 1)
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, length + 1)))
        seconds = in_turn(args.repeats, heads=partial(head_alone, model, tokens, head))["heads"]
        rows.append(dict(part="heads", length=length, rows=batch, seconds=round(seconds, 3),
                         tokens_per_second=round(tokens.size / seconds)))  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_memory(model: Decoder, args: Arguments) -> list[dict[str, Any]]:
    rows, policy = [], get_policy("tova")
    for form in args.forms:
        for bptt_segments in (*args.reaches, None):
            sizes = []
            for length in (args.segment * 2, args.segment * 16):
                tokens = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
                program = bounded.lower(
                    model,
                    tokens,
                    policy=policy,
                    slots=args.slots,
                    segment=args.segment,
                    bptt_segments=bptt_segments,
                    recurrence=FORMS[form],
                ).compile()
                analysis: Any = program.memory_analysis()
                sizes.append(analysis.temp_size_in_bytes)
            row = dict(part="memory", form=form, bptt_segments=bptt_segments, mib=round(sizes[0] / 2**20, 1),
                       mib_at_8_times=round(sizes[1] / 2**20, 1), ratio=round(sizes[1] / sizes[0], 3))  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main(args: Arguments) -> None:
    model = decoder_of_width(args.width) if args.model is None else args.load().model
    shape = dict(width=model.config.hidden_size, layers=model.config.num_layers)
    about = dict(device=jax.devices()[0].device_kind, slots=args.slots, segment=args.segment, **shape)
    print(json.dumps(about), flush=True)
    rows = measure_time(model, args)
    rows += measure_heads(model, args) if args.heads else []
    rows += measure_memory(model, args) if args.memory else []
    if args.out is not None:
        args.out.write_text(json.dumps(dict(about, rows=rows), indent=2) + "\n")


if __name__ == "__main__":
    main(arguments(QUICK))

"""One case on eight virtual devices, set against one device: python eight_devices.py CASE ... prints JSON lines.

A program of its own, since the tests have two devices.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"  # before jax
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import optax
from tiny import random_tokens, tiny_decoder

from jaxcompress.distributed import ShardingRules, collectives, make_mesh
from jaxcompress.generation import GenerationConfig, decode, init_decode_state, prefill
from jaxcompress.generation.generate import _decode_loop
from jaxcompress.policies import Policy, get_policy
from jaxcompress.policies.learned import Retention
from jaxcompress.training.data import Batch
from jaxcompress.training.objectives import bounded
from jaxcompress.training.retention_heads import init_retention
from jaxcompress.training.trainer import init_train_state, make_step

jax.config.update("jax_platforms", "cpu")
SLOTS, ROWS, WIDTH = 12, 4, 8
MODEL = tiny_decoder()
RULES = ShardingRules(make_mesh("data=2,fsdp=2,tensor=2"))
POLICIES: dict[str, Callable[[], Policy]] = {
    "layer": lambda: get_policy("tova"),
    "head": lambda: get_policy("tova-kv_head"),
    "h2o": lambda: get_policy("h2o"),
    "snapkv": lambda: get_policy("snapkv+4"),
    "retention": lambda: Retention(init_retention(MODEL.config, jax.random.key(0))),
}


def moved(tree: Any, before: Any) -> list[str]:
    """The arrays that are no longer where they were."""
    stays = jax.tree.map(lambda x, where: x.sharding.is_equivalent_to(where, x.ndim), tree, before)
    return [jax.tree_util.keystr(path) for path, same in jax.tree_util.tree_leaves_with_path(stays) if not same]


def where(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def generates(policy: Policy, dtype: str) -> dict[str, Any]:
    """The tokens of both, and what left its place."""
    prompts = [random_tokens(n, seed=n) for n in (30, 21, 9, 17)]
    how: Any = dict(mode="oneshot") if policy.oneshot_only else dict(mode="streaming", segment=32)
    told: dict[str, Any] = {}
    for name, model, rules in (("one", MODEL, None), ("eight", RULES.put(MODEL), RULES)):
        state = init_decode_state(model, policy, SLOTS, batch=ROWS, dtype=dtype, sharding=rules)
        began = where(state.arrays)
        state = prefill(model, prompts, state, **how)
        tokens, state = decode(model, state, 8, GenerationConfig(temperature=1.0))
        told |= {name: np.asarray(tokens).tolist(), f"moved_{name}": moved(state.arrays, began)}
    return told


def trains(policy: Policy) -> dict[str, Any]:
    """The losses and the largest difference of weights after two steps, whose size is that of the gradient."""
    weights = np.ones((ROWS, 24), np.float32)
    weights[0, 15:] = 0
    batch = Batch(random_tokens(ROWS, 25, seed=3), weights)
    optimizer = optax.sgd(1.0, momentum=0.9)
    begin = lambda: init_train_state(MODEL, optimizer)
    ends, told = [], {}
    for name, state, rules in (("one", begin(), None), ("eight", RULES.init(begin), RULES)):
        began, losses = where(state), []
        step = make_step(bounded(policy, SLOTS, segment=12, bptt_segments=2), optimizer, sharding=rules)
        for _ in range(2):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        ends.append(state)
        told |= {name: losses, f"moved_{name}": moved(state, began)}
    apart = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), *ends)
    return told | dict(apart=max(jax.tree.leaves(apart)))


def exchanged(policy: Policy, rules: ShardingRules) -> tuple[Any, Any]:
    """What devices exchange while tokens are written, and the state."""
    state = init_decode_state(MODEL, policy, SLOTS, batch=8, sharding=rules)
    lowered = _decode_loop.lower(
        rules.put(MODEL), state.arrays, 4, policy, buffer=8, config=GenerationConfig(), placement=None
    )
    return collectives(lowered.compile()), state


def exchanges(policy: Policy) -> dict[str, Any]:
    """The shapes that are exchanged, and the number of slots."""
    found, state = exchanged(policy, RULES)
    shapes = [shape for one in found for shape in one.shapes]
    return dict(shapes=shapes, slots=state.kv[0].positions.shape[3], width=WIDTH)


def steps(policy: Policy) -> dict[str, Any]:
    """How many numbers are exchanged how often in the loop over layers, without `fsdp`, and each device's share of
    keys and values."""
    rules = ShardingRules(make_mesh("data=4,tensor=2"))
    found, state = exchanged(policy, rules)
    counted = Counter[str]()
    for one in found:
        if "while/body/while/body" in one.op:
            counted.update({f"{one.kind} of {math.prod(shape)}": one.times for shape in one.shapes})
    held = [state.kv[0].keys, state.kv[0].values]
    share = {sum(x.addressable_shards[i].data.nbytes for x in held) * 8 / sum(x.nbytes for x in held) for i in range(8)}
    sizes = dict(rows=2, embed=MODEL.config.hidden_size, slots=state.kv[0].positions.shape[3], layers=2)
    return dict(exchanged=counted, share=[*share], sets=state.kv[0].sets, **sizes)


def main() -> None:
    for case in sys.argv[1:]:
        kind, name, *dtype = case.split("-")
        given: Any = lambda policy, dtype="float32": generates(policy, dtype)
        run = {"generate": given, "train": trains, "exchange": exchanges, "step": steps}[kind]
        print(json.dumps({"case": case, **run(POLICIES[name](), *dtype)}), flush=True)


if __name__ == "__main__":
    main()

"""A pool over two devices gives the tokens that one device gives, and stays where it was put."""

from __future__ import annotations

from pathlib import Path

import pytest
from jax import monitoring
from test_engine import CONFIGS, MODEL, SEGMENT, alone, prompt, spec

from jaxcompress.distributed import ShardingRules, make_mesh
from jaxcompress.serving import Engine, PoolSpec, PrefixLimits, Request

COMPILED: list[str] = []


@monitoring.register_event_duration_secs_listener
def _note(event: str, duration: float, **_: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


def sharded(mesh: str) -> PoolSpec:
    rules = ShardingRules(make_mesh(mesh))
    return PoolSpec(
        rules.put(MODEL), spec().policy, spec().slots, rows=2, segment=SEGMENT, group=3, sharding=rules
    )  # fmt: skip


@pytest.mark.usefixtures("as_users_call_it")  # states are described by shapes
@pytest.mark.parametrize("mesh", ["data=2", "tensor=2"])
def test_the_same_tokens_and_prefixes(mesh: str, tmp_path: Path) -> None:
    one, text = sharded(mesh), prompt(2 * SEGMENT + 5)
    requests = [Request(prompt(length), 5, CONFIGS[length % 2], seed=length) for length in (21, 4, 9)]
    expected = [alone(request, spec()) for request in requests]
    asked = Request(text, 5)
    with Engine({"one": one}, prefixes=PrefixLimits(folder=tmp_path)) as engine:
        before = len(COMPILED)
        answers = [ticket.answer() for ticket in [engine.submit(request) for request in requests]]
        assert [answer.tokens.tolist() for answer in answers] == expected
        assert [engine.submit(asked).answer().known_tokens for _ in range(2)][1] == 2 * SEGMENT
        assert len(COMPILED) == before, "nothing is compiled after the start, whatever arrives"
        arrays = engine._batchers["one"].pool._arrays
        keys, began = arrays.kv[0].keys, one.fresh(2).kv[0].keys
        assert keys.sharding.is_equivalent_to(began.sharding, keys.ndim)
    with Engine({"one": one}, prefixes=PrefixLimits(folder=tmp_path)) as engine:  # its states come from files
        again = engine.submit(asked).answer()
    assert again.known_tokens == 2 * SEGMENT
    assert again.tokens.tolist() == alone(asked, spec())


def test_a_mesh_that_does_not_divide_the_rows() -> None:
    rules = ShardingRules(make_mesh("data=2"))
    with pytest.raises(ValueError, match="a batch of 3 cannot be spread over the 2 devices along data=2"):
        PoolSpec(MODEL, spec().policy, 4, rows=3, sharding=rules)

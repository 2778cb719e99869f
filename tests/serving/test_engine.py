"""The engine: every answer of a mixed load is that of the same request alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_tokens, tiny_decoder, with_embedding

from jaxcompress.generation import GenerationConfig, generate
from jaxcompress.policies.names import get_policy
from jaxcompress.serving import (
    Answer,
    Engine,
    EngineClosed,
    EngineFull,
    EngineLimits,
    Piece,
    PoolSpec,
    Request,
    Ticket,
)
from jaxcompress.serving.engine import AsyncPieces
from jaxcompress.serving.pool import Pool
from jaxcompress.serving.programs import put_row, read_row, take_row, write_tokens
from jaxcompress.serving.request import Times
from jaxcompress.serving.waiting import WaitingLine

SLOTS, SEGMENT = 6, 8
BROKEN = 60  # a token whose embedding is no number
MODEL = tiny_decoder(max_position=2**20)
CONFIGS = (
    GenerationConfig(),
    GenerationConfig(temperature=0.9, top_k=20),
    GenerationConfig(temperature=1.3, top_p=0.8, repetition_penalty=1.2),
    GenerationConfig(temperature=0.7, min_p=0.05, stop_token_ids=(3, 5, 7, 11)),
)


def spec(policy: str = "tova", rows: int = 3, **changes: Any) -> PoolSpec:
    return PoolSpec(MODEL, get_policy(policy), **(dict(slots=SLOTS, rows=rows, segment=SEGMENT, group=3) | changes))


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return random_tokens(length, seed=1000 * seed + length, vocabulary=BROKEN)


def alone(request: Request, one: PoolSpec) -> list[int]:
    """What `generate` gives."""
    (tokens,) = generate(
        one.model, [request.prompt], one.policy, one.slots, max_new_tokens=request.max_new_tokens,
        config=request.config, seeds=[request.seed], mode=one.mode, chunk=one.chunk, segment=one.segment,
        placement=one.placement, dtype=one.dtype,
    )  # fmt: skip
    return tokens[0][tokens[0] >= 0].tolist()


def programs() -> list[int]:
    return [program._cache_size() for program in (put_row, take_row, read_row, write_tokens)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine({"tova": spec(), "window": spec("window", rows=2)}, limits=EngineLimits(prompt_tokens=4000)) as engine:
        yield engine


def mixed_load(seed: int) -> list[tuple[str, Request, bool]]:
    """Pools, requests, and whether they are cancelled at once."""
    draw = np.random.default_rng(seed)

    def one() -> tuple[str, Request, bool]:
        length, written = int(draw.choice([1, 5, 8, 9, 30, 41])), int(draw.choice([1, 4, 9]))
        config, drawn = CONFIGS[draw.integers(4)], int(draw.integers(3))
        request = Request(prompt(length, drawn), written, config, drawn, logprobs=drawn == 0, client="ab"[drawn % 2])
        return ("tova", "window")[draw.integers(2)], request, bool(draw.random() < 0.2)

    return [one() for _ in range(20)]


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_load_gives_what_each_request_gives_alone(engine: Engine, seed: int) -> None:
    load = mixed_load(seed)
    tickets = [(engine.submit(request, pool), pool) for pool, request, _ in load]
    for (ticket, _), (*_, cancelled) in zip(tickets, load, strict=True):
        if cancelled:
            ticket.cancel()
    for ticket, pool in tickets:
        answer, expected = ticket.answer(), alone(ticket.request, engine.pools[pool])
        if answer.reason == "cancelled":
            assert ticket.cancelled
            expected = expected[: len(answer.tokens)]
        assert answer.tokens.tolist() == expected


def test_nothing_is_compiled_after_the_start(engine: Engine) -> None:
    before = programs()
    tickets = [
        engine.submit(Request(prompt(length), length % 7 + 1, CONFIGS[length % 4], seed=length), pool)
        for length in range(1, 60, 4)
        for pool in engine.pools
    ]
    assert [ticket.answer().reason in ("stop", "length") for ticket in tickets] == [True] * len(tickets)
    assert programs() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("h2o", dict(mode="chunked", chunk=4)),
        ("tova-kv_head", dict(dtype="int8", placement="slot")),
        ("full", dict(slots=64)),
    ],
)
def test_states_of_other_kinds_are_rows_too(policy: str, changes: dict[str, Any]) -> None:
    one = spec(policy, rows=2, **changes)
    requests = [Request(prompt(length), 5, CONFIGS[length % 2], seed=length) for length in (21, 4, 9)]
    with Engine({"one": one}) as engine:
        answers = [ticket.answer() for ticket in [engine.submit(request) for request in requests]]
    assert [answer.tokens.tolist() for answer in answers] == [alone(request, one) for request in requests]


def test_logprobs_are_those_of_the_model(engine: Engine) -> None:
    request = Request(prompt(9), 4, CONFIGS[2], seed=1, logprobs=True)
    answer = engine.submit(request).answer()
    assert len(answer.logprobs) == len(answer.tokens) == 4
    for token, told in zip(answer.tokens, answer.logprobs, strict=True):
        known = dict(zip(told.tokens, told.logprobs, strict=True))
        assert len(known) == 20
        assert list(told.logprobs) == sorted(told.logprobs, reverse=True)
        assert known.get(int(token), told.chosen) == told.chosen
        assert sum(map(np.exp, told.logprobs)) <= 1.001
    greedy = engine.submit(Request(prompt(9), 4, logprobs=True)).answer()
    assert [told.tokens[0] for told in greedy.logprobs] == greedy.tokens.tolist()


def test_what_a_row_holds_is_told(engine: Engine) -> None:
    pieces = list(engine.submit(Request(prompt(9), 4, watched=True)))
    held = pieces[-1].held
    assert held is not None
    assert held.shape == (13,)
    np.testing.assert_allclose(held.sum(), SLOTS)


def test_what_a_row_holds_in_a_pool_of_slots() -> None:
    """Each token has a slot for each head that holds it."""
    pool = Pool(spec("tova-pool", rows=1))
    (part,) = pool._arrays.kv
    heads = MODEL.config.num_kv_heads
    places = jnp.broadcast_to(jnp.arange(part.positions.shape[-1]) // heads, part.positions.shape)
    pool._arrays = pool._arrays._replace(kv=(replace(part, positions=places),))
    tokens = places.shape[-1] // heads
    assert pool.held(0, tokens).tolist() == [1] * tokens


def test_what_there_is_room_for() -> None:
    assert spec().room(10**6, 9) == 9
    full = spec("full", slots=20)
    assert [full.room(prompt, 9) for prompt in (5, 11, 12, 19, 20, 30)] == [9, 9, 8, 1, 0, 0]
    full.check_request(12, 8)
    with pytest.raises(ValueError, match="do not fit into the 20 slots"):
        full.check_request(12, 9)


def test_a_row_that_breaks_fails_alone() -> None:
    one = replace(spec(), model=with_embedding(MODEL, BROKEN, float("nan")))
    bad = Request(np.array([1, BROKEN, 2], np.int32), 5)
    good = [Request(prompt(7 + n), 4, CONFIGS[n % 2], seed=n) for n in range(5)]
    with Engine({"one": one}) as engine:
        tickets = [engine.submit(request) for request in (*good[:2], bad, *good[2:])]
        with pytest.raises(FloatingPointError, match="non-finite logits, first by position 2"):
            tickets.pop(2).answer()
        assert [ticket.answer().tokens.tolist() for ticket in tickets] == [alone(request, one) for request in good]


def test_a_call_that_fails_ends_its_requests_and_the_pool_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = engine._batchers["tova"].pool

    def fails(*_: Any) -> Any:
        monkeypatch.undo()
        for leaf in (pool._arrays.logits, pool._arrays.done):
            leaf.delete()
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(pool, "read", fails)
    with pytest.raises(RuntimeError, match="the rows of the pool were lost: RuntimeError: the device is gone"):
        engine.submit(Request(prompt(9), 5)).answer()
    request = Request(prompt(9), 5)
    assert engine.submit(request).answer().tokens.tolist() == alone(request, engine.pools["tova"])


def test_a_fault_of_the_one_who_asks_is_theirs(engine: Engine) -> None:
    def refuses(_: Piece) -> None:
        raise KeyError("no such thing")

    engine.submit(Request(prompt(9), 60_000), deliver=refuses)
    request = Request(prompt(9), 5)
    assert engine.submit(request).answer().tokens.tolist() == alone(request, engine.pools["tova"])


def test_a_long_prompt_delays_the_others_by_one_piece(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, done = engine._batchers["tova"].pool, []
    read, write = pool.read, pool.write
    monkeypatch.setattr(pool, "read", lambda row, *rest: (done.append(("read", row)), read(row, *rest))[1])
    monkeypatch.setattr(pool, "write", lambda rows: (done.append(("write", *rows)), write(rows))[1])
    first = engine.submit(Request(prompt(4), 60))
    next(first)  # it writes
    long = engine.submit(Request(prompt(20 * SEGMENT), 1))
    short = engine.submit(Request(prompt(3), 1))
    assert short.answer().reason == "length"
    assert long.times.first is None  # the short one did not wait for it
    first.answer(), long.answer()
    writer = done[0][1]
    reads = [n for n, (what, *_) in enumerate(done) if what == "read"]
    last = max(n for n, (what, *rows) in enumerate(done) if what == "write" and writer in rows)
    assert all(writer in done[n - 1][1:] and done[n - 1][0] == "write" for n in reads[1:] if n < last)


def test_deadlines_cancellation_and_the_end_of_the_engine() -> None:
    with Engine({"one": spec(rows=1)}, limits=EngineLimits(waiting=2)) as engine:
        endless = engine.submit(Request(prompt(4), 60_000))
        next(endless)
        waits = engine.submit(Request(prompt(4), 1, seconds=0.05))
        gone = engine.submit(Request(prompt(4), 1))
        with pytest.raises(EngineFull, match="2 requests wait for a row of pool 'one', as many as may"):
            engine.submit(Request(prompt(4), 1))
        gone.cancel()
        assert (waits.answer().reason, gone.answer().reason) == ("deadline", "cancelled")
        endless.cancel()
        cut = endless.answer()
        assert cut.reason == "cancelled"
        late = engine.submit(Request(prompt(4), 60_000, seconds=0.2)).answer()
        assert late.reason == "deadline"
        assert 0 < len(late.tokens) < 60_000
        last = engine.submit(Request(prompt(4), 60_000))
        next(last)
        engine.close(seconds=0.05)
        assert last.answer().reason == "closed"
        with pytest.raises(EngineClosed):
            engine.submit(Request(prompt(4), 1))


def test_requests_are_answered_before_the_end() -> None:
    engine = Engine({"one": spec(rows=1)})
    tickets = [engine.submit(Request(prompt(4), 3)) for _ in range(3)]
    engine.start()
    engine.close()
    assert [ticket.answer().reason for ticket in tickets] == ["length"] * 3
    assert not engine.alive


def test_nobody_waits_for_an_engine_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine({"one": spec(rows=1)})
    tickets = [engine.submit(Request(prompt(4), 3)) for _ in range(2)]

    def ends() -> None:
        raise SystemExit

    monkeypatch.setattr(engine, "_step", ends)
    engine.start()
    assert [ticket.answer().reason for ticket in tickets] == ["closed"] * 2
    with pytest.raises(EngineClosed):
        engine.submit(Request(prompt(4), 3))


def test_an_engine_that_never_started_ends_what_it_took() -> None:
    engine = Engine({"one": spec(rows=1)})
    ticket = engine.submit(Request(prompt(4), 3))
    engine.close()
    assert ticket.answer().reason == "closed"
    with pytest.raises(EngineClosed):
        engine.submit(Request(prompt(4), 3))


def test_an_engine_has_one_thread(engine: Engine) -> None:
    """Also where a `with` block has started it and the server starts it too: two would share the rows."""
    threads = lambda: [one.name for one in threading.enumerate()].count("engine")  # of other tests' engines too
    before = threads()
    engine.start()
    assert threads() == before
    assert engine.submit(Request(prompt(4), 1)).answer().reason == "length"


def test_free_rows_are_room_for_a_burst() -> None:
    """As many as there are rows, and those that may wait beside."""
    engine = Engine({"one": spec(rows=2)}, limits=EngineLimits(waiting=1))
    tickets = [engine.submit(Request(prompt(4), 1)) for _ in range(3)]
    with pytest.raises(EngineFull, match="1 requests wait"):
        engine.submit(Request(prompt(4), 1))
    with engine:
        assert [ticket.answer().reason for ticket in tickets] == ["length"] * 3


def test_clients_take_turns() -> None:
    line = WaitingLine()
    for n, client in enumerate("aaabca"):
        line.add(Ticket(Request([n], 1, client=client), np.array([n])))
    assert [int(ticket.prompt[0]) for ticket in line.leave(lambda ticket: ticket.prompt[0] == 1)] == [1]
    assert [int(line.next().prompt[0]) for _ in range(len(line))] == [0, 3, 4, 2, 5]
    with pytest.raises(IndexError):
        line.next()


@pytest.mark.usefixtures("as_users_call_it")
def test_requests_that_no_row_can_answer(engine: Engine) -> None:
    class Own(GenerationConfig):
        pass

    for request, why in (
        (Request([], 1), "the prompt is empty"),
        (Request([61], 1), "token id 61 at index 0 is outside the vocabulary"),
        (Request(prompt(4001), 1), "the prompt has 4,001 tokens, and the engine takes 4,000 at most"),
        (Request([1], 0), "max_new_tokens must be a whole number, at least 1"),
        (Request([1], 10**6), "the engine writes 65,536 at most"),
        (Request([1], 1, Own()), "the rows of a pool share one way to sample"),
        (Request([1], 1, GenerationConfig(stop_token_ids=tuple(range(17)))), "at most 16 stop tokens, not 17"),
        (Request([1], 1, seed=0.5), "seeds must be a whole number"),  # type: ignore[arg-type]
        (Request([1], 1, seconds=0), "seconds must be above 0"),
    ):
        with pytest.raises(ValueError, match=why):
            engine.submit(request)
    with pytest.raises(ValueError, match="unknown pool 'no'; known: tova, window"):
        engine.submit(Request([1], 1), "no")
    with pytest.raises(ValueError, match="a Request is expected"):
        engine.submit([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="policy full keeps every token: 12 tokens do not fit"):
        spec("full").check_request(10, 2)


@pytest.mark.usefixtures("as_users_call_it")
def test_what_cannot_be_pooled_says_why() -> None:
    with pytest.raises(ValueError, match="cannot be a row of a pool: the policy selects from a whole prompt"):
        spec("tova/once4")
    with pytest.raises(ValueError, match="mode oneshot reads a whole prompt at once"):
        spec(mode="oneshot")
    with pytest.raises(ValueError, match="rows must be a whole number, at least 1"):
        spec(rows=0)
    with pytest.raises(ValueError, match="pools are PoolSpec"):
        Engine({})


def test_asyncio(engine: Engine) -> None:
    request = Request(prompt(9), 30, CONFIGS[1], seed=2)
    expected = alone(request, engine.pools["tova"])

    async def use() -> tuple[Answer, list[Piece], list[Answer]]:
        pieces = [piece async for piece in engine.stream(request)]
        async with engine.stream(Request(prompt(9), 60_000)) as left:
            await anext(left)
        assert left.ticket.cancelled
        assert [piece async for piece in left] == []
        async for _ in (pieces_left := engine.stream(Request(prompt(9), 60_000))):
            break
        ticket = pieces_left.ticket
        assert not ticket.cancelled
        del pieces_left
        assert ticket.cancelled

        async def listen(stream: AsyncPieces) -> None:
            async for _ in stream:
                pass

        heard = engine.stream(Request(prompt(9), 60_000))
        listening = asyncio.create_task(listen(heard))
        await asyncio.sleep(0.05)
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening
        assert heard.ticket.cancelled
        stopped = asyncio.create_task(engine.answer(Request(prompt(9), 60_000)))
        await asyncio.sleep(0.05)
        stopped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopped
        together = await asyncio.gather(*(engine.answer(request) for _ in range(4)))
        return await engine.answer(request), pieces, together

    answer, pieces, together = asyncio.run(use())
    assert answer.tokens.tolist() == expected
    assert [token for piece in pieces for token in piece.tokens] == expected
    assert all(one.tokens.tolist() == expected for one in together)


def test_many_threads_may_submit(engine: Engine) -> None:
    wrong: list[Any] = []

    def ask(n: int) -> None:
        request = Request(prompt(5 + n % 3), 6, CONFIGS[n % 2], seed=n)
        if engine.submit(request).answer().tokens.tolist() != alone(request, engine.pools["tova"]):
            wrong.append(n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    stats = engine.stats()["tova"]
    assert stats.rows == 3
    assert stats.nbytes > 0
    assert stats.counts.written_tokens > 48
    assert Times().submitted <= time.monotonic()

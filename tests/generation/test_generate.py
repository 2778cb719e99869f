"""Reading and writing: against a plain loop, row by row, cut in every way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCABULARY, random_tokens, tiny_decoder, with_embedding

from jaxcompress.generation import (
    DecodeState,
    GenerationConfig,
    decode,
    decode_stream,
    generate,
    init_decode_state,
    prefill,
    prefill_stream,
)
from jaxcompress.models.decoder import Decoder, last_hidden, read
from jaxcompress.models.init_state import init_state
from jaxcompress.models.modes import MODES as READING
from jaxcompress.models.modes import calls
from jaxcompress.policies import TOVA, Full, Policy, Window, once, per_layer
from jaxcompress.policies.names import get_policy

SLOTS, SEGMENT, STEPS = 6, 8, 10
SAMPLED = GenerationConfig(temperature=0.9, top_k=40)
MODES: dict[str, dict[str, Any]] = {
    "streaming": dict(mode="streaming", segment=SEGMENT),
    "chunked": dict(mode="chunked", chunk=4, segment=SEGMENT),
    "oneshot": dict(mode="oneshot"),
}
PROMPTS = [random_tokens(n, seed=n) for n in (16, 9, 19)]


@pytest.fixture(scope="session")
def model() -> Decoder:
    return tiny_decoder()


def written(
    model: Decoder, prompts: Sequence[np.ndarray], policy: Policy, slots: int = SLOTS, **how: Any
) -> np.ndarray:
    """[B, steps]"""
    how = dict(max_new_tokens=STEPS, segment=SEGMENT) | how
    return np.concatenate(list(generate(model, prompts, policy, slots, **how)), axis=1)


def begun(model: Decoder, prompts: Sequence[np.ndarray], policy: Policy, slots: int = SLOTS, **how: Any) -> DecodeState:
    return prefill(
        model,
        prompts,
        init_decode_state(model, policy, slots, batch=len(prompts)),
        **(dict(segment=SEGMENT) | how),
    )


@jax.jit
def _step(model: Decoder, token: Any, state: Any, policy: Policy) -> Any:
    done = read(model, token, state, policy)
    return model.logits(last_hidden(done, None))[0, 0], done.state


def plain(model: Decoder, prompt: np.ndarray, policy: Policy, slots: int) -> list[int]:
    """Greedy tokens, one call of `read` for each."""
    state, tokens = init_state(model.config, policy, slots), list(map(int, prompt))
    for at in range(len(prompt) + STEPS - 1):
        logits, state = _step(model, np.array([[tokens[at]]], np.int32), state, policy)
        if at >= len(prompt) - 1:
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("policy", [TOVA(), Full()], ids=lambda policy: policy.name)
def test_greedy_tokens_are_those_of_a_plain_loop(model: Decoder, policy: Policy) -> None:
    slots = max(map(len, PROMPTS)) + STEPS if not policy.evicts else SLOTS
    expected = [plain(model, prompt, policy, slots) for prompt in PROMPTS]
    assert written(model, PROMPTS, policy, slots).tolist() == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


@pytest.mark.parametrize(
    ("policy", "mode"),
    [("tova", "streaming"), ("tova", "chunked"), ("tova", "oneshot"), ("h2o", "oneshot"), ("window", "streaming")],
)
def test_rows_of_a_batch_are_what_each_gives_alone(model: Decoder, policy: str, mode: str) -> None:
    how = dict(config=SAMPLED, **MODES[mode])
    together = written(model, PROMPTS, get_policy(policy), seeds=[7, 8, 9], **how)
    for row in (1,) if mode == "oneshot" else range(3):  # oneshot compiles once more for each length
        alone = written(model, PROMPTS[row : row + 1], get_policy(policy), seeds=[7 + row], **how)
        assert together[row].tolist() == alone[0].tolist()


def test_rows_draw_from_seeds_of_their_own(model: Decoder) -> None:
    same = [PROMPTS[0]] * 3
    counted = written(model, same, TOVA(), config=SAMPLED, seeds=5)
    assert counted.tolist() == written(model, same, TOVA(), config=SAMPLED, seeds=[5, 6, 7]).tolist()
    assert len({tuple(row) for row in counted}) == 3
    equal = written(model, same, TOVA(), config=SAMPLED, seeds=[3, 3, 3])
    assert len({tuple(row) for row in equal}) == 1


def test_modes_keep_different_tokens(model: Decoder) -> None:
    held = {
        mode: np.sort(begun(model, PROMPTS, TOVA(), **how).kv[0].positions, axis=-1).tobytes()
        for mode, how in MODES.items()
    }
    assert len(set(held.values())) == 3


@pytest.mark.parametrize("settings", [GenerationConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_writing_twice_is_writing_once_as_much(model: Decoder, settings: GenerationConfig) -> None:
    whole, end = decode(model, begun(model, PROMPTS, TOVA()), STEPS, settings)
    first, between = decode(model, begun(model, PROMPTS, TOVA()), STEPS // 2, settings)
    second, last = decode(model, between, STEPS // 2, settings)
    assert np.concatenate([first, second], axis=1).tolist() == np.asarray(whole).tolist()
    np.testing.assert_array_equal(end.kv[0].positions, last.kv[0].positions)
    np.testing.assert_array_equal(end.appeared, last.appeared)
    np.testing.assert_allclose(end.logits, last.logits, atol=1e-5)


def _greedy_stop(model: Decoder) -> tuple[np.ndarray, int, np.ndarray]:
    """What is written without a stop token, the stop token, and what has to be written with it."""
    free = written(model, PROMPTS, TOVA())
    stop = int(free[0, 3])
    ended = free.copy()
    for row in ended:
        hits = np.flatnonzero(row == stop)
        if len(hits):
            row[hits[0] + 1 :] = -1
    return free, stop, ended


def test_a_stop_token_ends_its_row_only(model: Decoder) -> None:
    free, stop, ended = _greedy_stop(model)
    assert (ended != free).any()
    assert (ended == free).all(axis=1).any()
    assert written(model, PROMPTS, TOVA(), config=GenerationConfig(stop_token_ids=(stop,))).tolist() == ended.tolist()


def test_the_loop_ends_with_the_last_row(model: Decoder) -> None:
    _, stop, ended = _greedy_stop(model)
    calls: list[int] = []

    class Counting(GenerationConfig):
        def sample(self, keys: Any, logits: Any, appeared: Any = None) -> Any:
            jax.debug.callback(lambda: calls.append(1))
            return super().sample(keys, logits, appeared)

    settings = Counting(stop_token_ids=(stop,))
    state = begun(model, PROMPTS[:1], TOVA())
    out, state = decode(model, state, 2_000, settings)
    jax.effects_barrier()
    length = int((ended[0] >= 0).sum())
    assert len(calls) == length
    assert np.asarray(out)[0, : length + 1].tolist() == [*ended[0, :length].tolist(), -1]
    assert state.done.tolist() == [True]
    more, _ = decode(model, state, STEPS, GenerationConfig(stop_token_ids=(stop,)))
    assert (np.asarray(more) == -1).all()


def test_a_conversation_goes_on_after_a_stop_token(model: Decoder) -> None:
    """Rows that have stopped, in different places, and rows that have not all read the next turn and are written to."""
    _, stop, ended = _greedy_stop(model)
    settings = GenerationConfig(stop_token_ids=(stop,))
    turns = [random_tokens(n, seed=n) for n in (5, 11, 3)]
    first, state = decode(model, begun(model, PROMPTS, TOVA()), STEPS, settings)
    assert np.asarray(first).tolist() == ended.tolist()
    assert len(set(state.done.tolist())) == 2
    state = prefill(model, turns, state, segment=SEGMENT)
    assert not state.done.any()
    second, state = decode(model, state, STEPS)
    assert not state.done.any()
    whole = [np.r_[prompt, row[row >= 0], turn] for prompt, row, turn in zip(PROMPTS, ended, turns, strict=True)]
    assert np.asarray(second).tolist() == written(model, whole, TOVA()).tolist()


def test_reading_on_goes_on_after_a_stop_token(model: Decoder) -> None:
    free, stop, _ = _greedy_stop(model)
    _, state = decode(model, begun(model, PROMPTS[:1], TOVA()), STEPS, GenerationConfig(stop_token_ids=(stop,)))
    assert state.done.tolist() == [True]
    ((count, state),) = prefill_stream(model, [PROMPTS[1][:4]], state, segment=SEGMENT)
    assert count == 4
    assert state.done.tolist() == [False]
    assert (np.asarray(decode(model, state, STEPS)[0]) >= 0).all()


def test_bursts_end_with_the_last_row(model: Decoder) -> None:
    _, stop, ended = _greedy_stop(model)
    bursts = list(generate(
        model, PROMPTS[:1], TOVA(), SLOTS, max_new_tokens=2000, stream_every=4,
        config=GenerationConfig(stop_token_ids=(stop,)), segment=SEGMENT
    ))  # fmt: skip
    assert len(bursts) <= 3
    joined = np.concatenate(bursts, axis=1)[0]
    assert joined[joined >= 0].tolist() == ended[0][ended[0] >= 0].tolist()


def test_a_stream_goes_on_until_every_row_has_stopped(model: Decoder) -> None:
    _, stop, ended = _greedy_stop(model)
    groups = list(generate(
        model, PROMPTS, TOVA(), SLOTS, max_new_tokens=STEPS, stream_every=2,
        config=GenerationConfig(stop_token_ids=(stop,)), segment=SEGMENT,
    ))  # fmt: skip
    assert np.concatenate(groups, axis=1).tolist() == ended.tolist()


def test_a_row_that_stopped_remembers_only_what_it_wrote(model: Decoder) -> None:
    _, stop, ended = _greedy_stop(model)
    _, state = decode(model, begun(model, PROMPTS, TOVA()), STEPS, GenerationConfig(stop_token_ids=(stop,)))
    for row, prompt in enumerate(PROMPTS):
        written_there = {*prompt.tolist(), *ended[row][ended[row] >= 0].tolist()}
        assert set(np.flatnonzero(state.appeared[row])) == written_there


@pytest.mark.parametrize("policy", [TOVA(), Full()], ids=lambda policy: policy.name)
def test_the_size_of_bursts_changes_nothing(model: Decoder, policy: Policy) -> None:
    slots = max(map(len, PROMPTS)) + STEPS if not policy.evicts else SLOTS
    whole = written(model, PROMPTS, policy, slots)
    bursts = list(generate(model, PROMPTS, policy, slots, max_new_tokens=STEPS, stream_every=4, segment=SEGMENT))
    assert [group.shape[1] for group in bursts] == [4, 4, 2]
    assert np.concatenate(bursts, axis=1).tolist() == whole.tolist()
    more = list(generate(model, PROMPTS, policy, slots, max_new_tokens=STEPS, stream_every=99, segment=SEGMENT))
    assert [group.tolist() for group in more] == [whole.tolist()]


@pytest.mark.parametrize("policy", ["tova", "streaming_llm+2"])
def test_a_prompt_in_segments_is_a_prompt_at_once(model: Decoder, policy: str) -> None:
    pieces, whole = (begun(model, PROMPTS, get_policy(policy), segment=segment) for segment in (SEGMENT, 512))
    np.testing.assert_array_equal(pieces.kv[0].positions, whole.kv[0].positions)
    np.testing.assert_array_equal(pieces.kv[0].seen, [len(prompt) for prompt in PROMPTS])
    np.testing.assert_allclose(pieces.logits, whole.logits, atol=1e-4)
    np.testing.assert_array_equal(pieces.appeared, whole.appeared)
    for row, prompt in enumerate(PROMPTS):
        assert set(np.flatnonzero(whole.appeared[row])) == set(prompt.tolist())


@pytest.mark.parametrize("chunk", [1, 4])
def test_reading_on_in_odd_pieces_is_reading_at_once(model: Decoder, chunk: int) -> None:
    text = random_tokens(29, seed=3)
    cuts = np.split(text, [3, 3, 14, 15])
    counts = []
    for count, state in prefill_stream(
        model, cuts, init_decode_state(model, TOVA(), SLOTS), chunk=chunk, segment=SEGMENT
    ):
        counts.append(count)
        last = state
    assert counts == [8, 16, 24, 29]
    mode = MODES["streaming" if chunk == 1 else "chunked"]
    whole = begun(model, [text], TOVA(), **mode)
    np.testing.assert_array_equal(last.kv[0].positions, whole.kv[0].positions)
    np.testing.assert_allclose(last.logits, whole.logits, atol=1e-4)


def test_reading_on_from_nothing_is_an_error(model: Decoder) -> None:
    for pieces in ([], [np.zeros(0, np.int64)]):
        with pytest.raises(ValueError, match="the text is empty"):
            list(prefill_stream(model, pieces, init_decode_state(model, TOVA(), SLOTS)))


def test_a_repetition_penalty_forbids_what_was_seen(model: Decoder) -> None:
    free = written(model, PROMPTS, TOVA())
    new = written(model, PROMPTS, TOVA(), config=GenerationConfig(repetition_penalty=1e6))
    assert (free != new).any()
    for prompt, row in zip(PROMPTS, new, strict=True):
        assert len(set(row.tolist())) == STEPS
        assert not set(row.tolist()) & set(prompt.tolist())


def test_full_says_how_many_slots_it_needs(model: Decoder) -> None:
    says = "policy full keeps every token: 29 tokens do not fit into the 28 slots of layer 0; give 29 slots or more"
    with pytest.raises(ValueError, match=says):
        written(model, PROMPTS, Full(), 28)
    with pytest.raises(ValueError, match="19 tokens do not fit into the 18 slots"):
        begun(model, PROMPTS, Full(), 18)
    with pytest.raises(ValueError, match="24 tokens do not fit into the 20 slots"):
        decode(model, begun(model, PROMPTS, Full(), 20), 5)


@pytest.mark.slow
def test_what_once_keeps_of_a_short_prompt_and_of_a_window_fits() -> None:
    """It keeps no more than there is: a prompt's own tokens, and a sliding-window layer's window of all."""
    narrow = tiny_decoder(sliding=(8, None))
    short = [prompt[:9] for prompt in PROMPTS]
    got, want = (written(narrow, short, one, 19, mode="oneshot") for one in (once(TOVA(), 12), Full()))
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="keeps 9 of 9 tokens and every later one: 20 tokens .* 19 slots of layer 1"):
        written(narrow, short, once(TOVA(), 12), 19, mode="oneshot", max_new_tokens=11)


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([[1, 2], []], "prompt 1 is empty; give at least one token"),
        ([[1, 2], [3, VOCABULARY, -1]], f"prompt 1: token id {VOCABULARY} at index 1 is outside the vocabulary 0..60"),
        ([[-1, 2], [3]], "prompt 0: token id -1 at index 0"),
    ],
)
def test_prompts_that_cannot_be_read(model: Decoder, prompts: list[list[int]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        next(generate(model, prompts, TOVA(), SLOTS, max_new_tokens=2))


def test_other_things_that_do_not_fit(model: Decoder) -> None:
    with pytest.raises(ValueError, match="2 seeds were given for a batch of 3"):
        next(generate(model, PROMPTS, TOVA(), SLOTS, max_new_tokens=2, seeds=[1, 2]))
    with pytest.raises(ValueError, match="1 prompts were given for a batch of 3"):
        prefill(model, PROMPTS[:1], init_decode_state(model, TOVA(), SLOTS, batch=3))
    with pytest.raises(ValueError, match="at least 1 slot per layer, slots=0"):
        init_decode_state(model, TOVA(), 0)


def test_numbers_that_are_not_finite_name_row_and_position(model: Decoder) -> None:
    absent = next(t for t in range(VOCABULARY) if not any(t in prompt for prompt in PROMPTS))
    broken = with_embedding(model, absent, np.nan)
    prompts = [prompt.copy() for prompt in PROMPTS]
    prompts[1][5] = absent
    with pytest.raises(FloatingPointError, match="non-finite logits, first in row 1 by position 7"):
        begun(broken, prompts, TOVA())


def test_what_is_broken_stays_broken(model: Decoder) -> None:
    """A row of numbers that are none is refused by every call, before its memory is taken."""
    state = replace(begun(model, PROMPTS, TOVA()), broken=jnp.array([-1, 7, -1]))
    goes_on: list[Callable[[], Any]] = [
        lambda: prefill(model, PROMPTS, state, segment=SEGMENT),
        lambda: decode(model, state, STEPS),
        lambda: decode_stream(model, state, max_new_tokens=STEPS),
    ]
    for go_on in goes_on:
        with pytest.raises(FloatingPointError, match="first in row 1 by position 7"):
            go_on()


def test_a_long_text_that_breaks_is_given_up_soon(model: Decoder) -> None:
    text = random_tokens(SEGMENT * 9, seed=3)
    absent = next(t for t in range(VOCABULARY) if t not in text)
    text[2 * SEGMENT - 1] = absent
    broken, state, seen = with_embedding(model, absent, np.nan), init_decode_state(model, TOVA(), SLOTS), []
    reading = prefill_stream(broken, [text], state, segment=SEGMENT)
    with pytest.raises(FloatingPointError, match=f"first in row 0 by position {2 * SEGMENT - 1}"):
        seen.extend(count for count, _ in reading)
    assert 2 <= len(seen) <= 4


def test_numbers_that_break_while_writing_name_the_position(model: Decoder) -> None:
    first = int(written(model, PROMPTS, TOVA())[0, 0])
    prompt = np.where(PROMPTS[0] == first, (first + 1) % VOCABULARY, PROMPTS[0])
    first = int(written(model, [prompt], TOVA())[0, 0])
    assert first not in prompt
    broken = with_embedding(model, first, np.inf)
    with pytest.raises(FloatingPointError, match="non-finite logits, first in row 0 by position 16"):
        written(broken, [prompt], TOVA())


def test_two_questions_about_one_context(model: Decoder) -> None:
    context = begun(model, PROMPTS[:1], TOVA())
    questions = [random_tokens(n, seed=n) for n in (4, 6)]
    for question in questions:
        asked = prefill(model, [question], context.copy(), segment=SEGMENT)
        answer, _ = decode(model, asked, STEPS)
        assert np.asarray(answer).tolist() == written(model, [np.r_[PROMPTS[0], question]], TOVA()).tolist()
    prefill(model, questions[:1], context, segment=SEGMENT)
    used: list[Callable[[], Any]] = [
        lambda: prefill(model, questions[:1], context),
        lambda: decode(model, context, STEPS),
        lambda: decode_stream(model, context, max_new_tokens=STEPS),
        lambda: prefill_stream(model, questions, context),
        context.copy,
    ]
    for use in used:
        with pytest.raises(ValueError, match=r"was used before: .* give state\.copy\(\)"):
            use()


def test_a_state_knows_where_its_tokens_stand(model: Decoder) -> None:
    begin = lambda placement: init_decode_state(model, TOVA(), SLOTS, placement=placement)
    answers = {}
    for placement in ("absolute", "slot", None):
        state = prefill(model, PROMPTS[:1], begin(placement), segment=SEGMENT)
        assert state.placement == placement
        answers[placement] = np.asarray(decode(model, state, STEPS)[0]).tolist()
    assert answers["slot"] == written(model, PROMPTS[:1], TOVA(), placement="slot").tolist()
    assert answers["absolute"] == answers[None] != answers["slot"]


def test_a_stream_has_the_state_to_go_on_from(model: Decoder) -> None:
    """A turn that is streamed, and the next turn: as one text."""
    stream = decode_stream(model, begun(model, PROMPTS[:1], TOVA()), STEPS, stream_every=4)
    first = np.concatenate(list(stream), axis=1)
    again = prefill(model, [PROMPTS[1]], stream.state, segment=SEGMENT)
    second, _ = decode(model, again, STEPS)
    whole = np.r_[PROMPTS[0], first[0], PROMPTS[1]]
    assert np.asarray(second).tolist() == written(model, [whole], TOVA()).tolist()


def test_lengths_share_programs(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and turns of 50 random lengths: `read` is traced once for each program, and there is one."""
    traced = []
    module = sys.modules["jaxcompress.generation.generate"]
    monkeypatch.setattr(module, "read", lambda *args, **how: traced.append(1) or read(*args, **how))
    lengths = np.random.default_rng(0).integers(1, 2 * SEGMENT, 50)
    state = init_decode_state(model, Window(1), SLOTS)
    for length in lengths:
        state = prefill(model, [random_tokens(length)], state, segment=SEGMENT)
    assert len(traced) == 1
    assert state.kv[0].seen.tolist() == [lengths.sum()]


@pytest.mark.parametrize("mode", READING)
def test_calls(mode: Any) -> None:
    """Few widths, every token once and in order, and no more selections than the mode has."""
    rng = np.random.default_rng(0)
    for chunk, segment in ((128, 512), (100, 512), (600, 512), (1, 64)):
        shapes = set()
        for total in rng.integers(1, 513, 50).tolist():
            plan = calls(mode, total, chunk=chunk, segment=segment)
            assert [call.start for call in plan] == [0, *[call.stop for call in plan[:-1]]]
            assert plan[-1].stop == total
            for call in plan:
                assert call.stop - call.start <= call.width
                assert call.width % call.chunk == 0
                ends = range(call.start + call.chunk, call.stop, call.chunk)
                by = {"streaming": 1, "chunked": chunk, "oneshot": total}[mode]
                assert all(end % by == 0 for end in ends)
                assert call.stop == total or call.stop % by == 0
            assert mode != "oneshot" or len(plan) == 1
            shapes |= {(call.width, call.chunk) for call in plan}
        assert len(shapes) <= 6 or (mode == "oneshot" and segment < 512)  # a prompt above a segment is one call too
    assert calls("oneshot", 5000, chunk=1, segment=512)[0].width == 5120


ANY: Any = SimpleNamespace(
    start=init_decode_state, prefill=prefill, decode=decode, generate=generate
)  # of arguments of any type


def asked(model: Any, **how: Any) -> Any:
    return ANY.generate(model, PROMPTS, TOVA(), 4, **(dict(max_new_tokens=1) | how))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda m: ANY.start(m, "tova", 4), r"not its name 'tova': write jaxcompress\.get_policy\('tova'\)"),
        (lambda m: ANY.start(m, TOVA, 4), r"not TOVA itself: call it, TOVA\(\)"),
        (lambda m: ANY.start(m, 4, TOVA()), "a policy is expected, .* not 4; the model comes first"),
        (lambda m: ANY.start(m, None, 4), "a policy is expected, .* not None"),
        (lambda m: ANY.start(m, TOVA(), "4"), "slots must be a number of slots, .* not '4'"),
        (lambda m: ANY.start(m, TOVA(), 4.0), r"slots must be a number of slots, .* not 4\.0"),
        (lambda m: ANY.start(m, TOVA(), TOVA()), "slots"),
        (lambda m: ANY.start(m, TOVA(), 4, batch=0), "batch must be a whole number, at least 1, not 0"),
        (lambda m: ANY.start(m, TOVA(), 4, seeds=0.5), r"seeds must be a whole number, or one for each row, not 0\.5"),
        (lambda m: ANY.start(m.config, TOVA(), 4), "first argument must be a Decoder, not DecoderConfig"),
        (lambda m: ANY.start(SimpleNamespace(model=m), TOVA(), 4), r"not SimpleNamespace; give its \.model"),
        (lambda m: ANY.generate(m, PROMPTS, "tova", 4, max_new_tokens=1), "not its name 'tova'"),
        (lambda m: ANY.generate(m, PROMPTS, 4, TOVA(), max_new_tokens=1), "a policy is expected"),
        (lambda m: asked(m, max_new_tokens=0), "max_new_tokens must be a whole number, at least 1, not 0"),
        (lambda m: asked(m, stream_every=0), "stream_every must be a whole number"),
        (lambda m: asked(m, mode="at once"), "unknown mode 'at once'"),
        (lambda m: asked(m, config=0.7), r"config must be GenerationConfig\(.*, not 0\.7"),
        (lambda m: asked(m, config=GenerationConfig(stop_token_ids=5)), "a tuple of token ids"),
        (lambda m: asked(m, config=GenerationConfig(stop_token_ids=("a",))), "not text"),
        (lambda m: asked(m, config=GenerationConfig(stop_token_ids=(999,))), "token id 999"),
        (lambda m: ANY.decode(m, ANY.start(m, TOVA(), 4), TOVA()), "max_new_tokens must be .*, not TOVA"),
        (lambda m: ANY.decode(m, ANY.start(m, TOVA(), 4), True), "max_new_tokens must be .*, not True"),
        (lambda m: ANY.decode(m, ANY.start(m, TOVA(), 4).kv, 8), "a DecodeState is expected, .* not tuple"),
        (lambda m: ANY.decode(m, ANY.start(m, TOVA(), 4), 8), r"nothing was read yet.*: prefill first"),
        (lambda m: decode_stream(m, init_decode_state(m, TOVA(), 4, batch=2), 8), "nothing was read yet"),
        (lambda m: ANY.start(m, TOVA(), 4, seeds=2**63), r"seeds must be within -2\*\*63 and 2\*\*63 - 1, not 9223"),
        (lambda m: ANY.start(m, TOVA(), 4, seeds=[-(2**63) - 1]), "seeds must be within"),
        (lambda m: ANY.start(m, TOVA(), 4, placement="slots"), "unknown placement"),
        (lambda m: ANY.start(m, TOVA("pool"), 4, placement="slot"), "tova-pool lets heads share a pool of slots"),
        (lambda m: ANY.start(m, per_layer(TOVA(), TOVA("pool")), 4, placement="compact"), "placement 'compact'"),
        (lambda m: ANY.prefill(m, PROMPTS, TOVA()), "a DecodeState is expected, .* not"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("as_users_call_it")
def test_wrong_arguments_say_what_was_expected(model: Decoder, wrong: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong(model)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stop_token_ids", r"config=GenerationConfig\(stop_token_ids=\.\.\.\)"),
        ("temperature", r"config=GenerationConfig\(temperature=\.\.\.\)"),
        ("lenght", "no argument 'lenght'; how prompts are read: mode, chunk, segment, placement, dtype"),
    ],
)
def test_arguments_of_other_names(model: Decoder, name: str, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        ANY.generate(model, PROMPTS, TOVA(), SLOTS, max_new_tokens=1, **{name: 1})

"""A conversation in one state: what is read, what is kept when an answer is cut off, and that nothing grows."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import with_embedding
from tiny_chat import END, TEMPLATE, Letters, chat_folder

from jaxcompress.checkpoints import Loaded, load
from jaxcompress.distributed import ShardingRules, make_mesh
from jaxcompress.generation import Chat, DecodeStream, GenerationConfig
from jaxcompress.generation.generate import _decode_loop, _read_segment
from jaxcompress.generation.turns import closing_token
from jaxcompress.policies import TOVA, Full, Window, then
from jaxcompress.server.settings import Served

SLOTS = 8
LETTERS = Letters(temperature=1.0)
MESSAGES = ("Who are you?", "  Grüße, 你好 😀!  ", "What did I say a moment ago, and what did you answer?")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(chat_folder(tmp_path_factory.mktemp("chat")))


def with_template(loaded: Loaded, folder: Path, template: str) -> Loaded:
    """The same model with another template."""
    shutil.copytree(loaded.folder, folder / "other")
    (folder / "other" / "chat_template.jinja").write_text(template)
    return replace(loaded, folder=folder / "other")


def chat_of(loaded: Loaded, **given: Any) -> Chat:
    return Chat(loaded, TOVA(), SLOTS, **{"max_new_tokens": 12, "config": LETTERS, **given})


def all_text(chat: Chat) -> str:
    return chat.loaded.tokenizer.decode(chat.tokens, skip_special=False)


@pytest.mark.parametrize(("system", "rstrip"), [(None, False), ("Be brief.", False), (None, True)])
def test_what_was_read_is_what_the_template_writes(
    loaded: Loaded, tmp_path: Path, system: str | None, rstrip: bool
) -> None:
    loaded = load(chat_folder(tmp_path, rstrip=True)) if rstrip else loaded
    chat = chat_of(loaded, system=system)
    answers = [chat.send(message) for message in MESSAGES]
    said = [] if system is None else [("system", system)]
    for message, answer in zip(MESSAGES, answers, strict=True):
        said += [("user", message), ("assistant", answer)]
    assert [(m["role"], m["content"]) for m in chat.messages] == said
    tokenizer = loaded.tokenizer
    whole = tokenizer.encode(tokenizer.apply_chat_template(chat.messages[:-1]), add_bos=False)
    assert chat.tokens[: len(whole)].tolist() == whole.tolist()
    lengths = {len(answer) for answer in answers}
    assert max(lengths) <= 12
    assert any(length < 12 for length in lengths), "no answer ended by itself: the test shows less than it should"
    assert int(chat.state.kv[0].seen[0]) == len(chat.tokens)


@pytest.mark.parametrize(
    ("end", "alone", "closing"),
    [
        ("{{ '</s>' if loop.last else '<|im_end|>' }}", "", "</s>"),  # GPT-OSS
        ("{% if not loop.last %}<|im_end|>{% endif %}", "", "<|im_end|>"),
        ("<|im_end|>", "{{ raise_exception('a question is missing') }}", "<|im_end|>"),
        ("", "", None),
    ],
)
def test_an_answer_ends_as_the_newest_one_does(
    loaded: Loaded, tmp_path: Path, end: str, alone: str, closing: str | None
) -> None:
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}" + end + "\n{% endfor %}"
    template += "{% if not add_generation_prompt %}" + alone + "{% endif %}"
    other = with_template(loaded, tmp_path, template)
    special, eos = loaded.tokenizer.special_tokens(), loaded.tokenizer.eos_ids
    found = closing_token(other.tokenizer, None, {})
    assert found == (None if closing is None else special[closing])
    stops = {*eos, *(() if found is None else (found,))}
    assert {*chat_of(other).config.stop_token_ids} == {*Served("tiny", other, {}).stop_ids} == stops
    assert (special["<|im_end|>"] in stops) == (closing == "<|im_end|>")


def test_arguments_go_to_the_template(loaded: Loaded, tmp_path: Path) -> None:
    template = TEMPLATE + "{% if tools %}{{ tools[0].name }}{% endif %}{% if quiet is defined %}-{{ quiet }}{% endif %}"
    chat = chat_of(with_template(loaded, tmp_path, template), arguments=dict(tools=[dict(name="look")], quiet=True))
    chat.send("a")
    assert "<|im_start|>assistant\nlook-True" in all_text(chat)
    with pytest.raises(ValueError, match="add_generation_prompt cannot be an argument"):
        chat_of(loaded, arguments=dict(add_generation_prompt=False))


def test_a_template_that_forgets_thinking_changes_nothing_that_was_read(loaded: Loaded, tmp_path: Path) -> None:
    forgets = TEMPLATE.replace("m.content }}", "m.content.split('</think>')[-1] if not loop.last else m.content }}")
    chat = chat_of(with_template(loaded, tmp_path, forgets + "{% if think %}<think></think>{% endif %}"),
                   arguments=dict(think=True))  # fmt: skip
    first, _ = chat.send("a"), chat.send("b")
    assert f"assistant\n<think></think>{first}<|im_end|>\n<|im_start|>user\nb<|im_end|>" in all_text(chat)


@pytest.mark.parametrize("change", ["m.content | upper", "m.content * 2", "'' if m.role == 'assistant' else m.content"])
def test_a_template_that_changes_answers_is_refused(loaded: Loaded, tmp_path: Path, change: str) -> None:
    other = with_template(loaded, tmp_path, TEMPLATE.replace("m.content", change))
    with pytest.raises(ValueError, match="leaves out, changes or repeats the model's last answer"):
        chat_of(other)


def test_a_template_that_refuses_a_turn(loaded: Loaded, tmp_path: Path) -> None:
    refuses = "{% if messages | length > 3 %}{{ raise_exception('three are enough') }}{% endif %}" + TEMPLATE
    chat = chat_of(with_template(loaded, tmp_path, refuses))
    chat.send("a"), chat.send("b")
    before = chat.tokens.tolist()
    with pytest.raises(ValueError, match="refuses this conversation: three are enough"):
        chat.stream("c")
    assert chat.tokens.tolist() == before
    with pytest.raises(ValueError, match="refuses"):
        chat_of(with_template(loaded, tmp_path / "2", "{{ raise_exception('no') }}"))


@pytest.mark.usefixtures("as_users_call_it")
def test_what_is_wrong(loaded: Loaded, tmp_path: Path) -> None:
    chat = chat_of(loaded)
    for empty in ("", " \n", None):
        with pytest.raises(ValueError, match="a message is a text that is not empty"):
            chat.stream(empty)  # type: ignore[arg-type]
    plain: Any = loaded.model
    with pytest.raises(ValueError, match="as jaxcompress.load gives them, not Decoder"):
        Chat(plain, TOVA(), SLOTS)
    for arguments in (["tools"], {1: True}, "quiet"):
        with pytest.raises(ValueError, match="arguments of the chat template are given by name"):
            chat_of(loaded, arguments=arguments)
    for wrong, says in (
        (dict(segment=0), "at least 1 token, not .*segment=0"),
        (dict(mode="chunked", chunk=0), "at least 1 token, not chunk=0"),
        (dict(mode="at once"), "unknown mode 'at once'"),
        (dict(seed=0.5), "seeds must be a whole number"),
    ):
        with pytest.raises(ValueError, match=says):
            chat_of(loaded, **wrong)
    with pytest.raises(ValueError, match="needs mode oneshot, not streaming"):
        Chat(loaded, then(TOVA(), Window(1)), SLOTS)
    with pytest.raises(TypeError, match="no argument 'temperature'"):
        chat_of(loaded, temperature=1)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="has no chat template"):
        chat_of(load(chat_folder(tmp_path / "bare", template=None)))


def test_full_has_no_room_for_another_turn(loaded: Loaded) -> None:
    chat = Chat(loaded, Full(), 64, max_new_tokens=8, config=GenerationConfig())
    chat.send("a")
    with pytest.raises(ValueError, match="do not fit into the 64 slots"):
        chat.send("a" * 64)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_an_answer_that_is_left_counts_as_far_as_it_was_written(loaded: Loaded) -> None:
    chat = chat_of(loaded, max_new_tokens=100, seed=3)
    pieces = chat.stream("a")
    first = next(pieces)
    late = chat.stream("b")  # begun before it is asked for: nothing is read yet
    assert list(pieces) == [], "an answer ends where the next message begins"
    assert chat.messages[-1]["content"] == first
    assert END not in chat.tokens[-1:], "the answer ended by itself: take another seed"
    next(late)
    assert f"{first}<|im_end|>\n<|im_start|>user\nb<|im_end|>" in all_text(chat)
    late.close()  # type: ignore[attr-defined]
    stale, other = chat.stream("c"), chat.stream("d")
    list(other)
    with pytest.raises(ValueError, match="another message was sent"):
        next(stale)


def test_an_interrupt_waits_for_the_step(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, step = chat_of(loaded, max_new_tokens=100, seed=3), Chat._step
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran before in this process

    def interrupted(self: Chat, *given: Any) -> str:
        for _ in range(3):  # between donating a state and keeping the next one
            signal.raise_signal(signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(Chat, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.send("a")
    monkeypatch.undo()
    written = chat.messages[-1]["content"]
    assert (chat.messages[-1]["role"], len(written)) == ("assistant", 8)
    chat.send("b")
    assert f"assistant\n{written}<|im_end|>\n<|im_start|>user\nb" in all_text(chat)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_rest_of_a_message_that_is_interrupted_is_read_with_the_next_one(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chat, calls = chat_of(loaded, config=GenerationConfig(), system="Be brief. " * 9), 0
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        for _ in range(2 * (calls == 2)):
            signal.raise_signal(signal.SIGINT)
        return _read_segment(*given, **options)

    monkeypatch.setattr(sys.modules[DecodeStream.__module__], "_read_segment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.send("a" * 150)
    monkeypatch.undo()
    assert (int(chat.state.kv[0].seen[0]), chat.held) == (64, SLOTS)  # two calls
    assert [m["content"] for m in chat.messages[1:]] == ["a" * 150, ""]
    chat.save(tmp_path / "file")
    again = Chat.load(tmp_path / "file", loaded)
    answer = chat.send("b")
    assert (answer, int(chat.state.kv[0].seen[0])) == (again.send("b"), len(chat.tokens))
    tokenizer = loaded.tokenizer
    whole = tokenizer.encode(tokenizer.apply_chat_template(chat.messages[:-1]), add_bos=False)
    assert chat.tokens[: len(whole)].tolist() == whole.tolist()


def test_logits_that_are_not_finite_leave_a_conversation_that_can_be_left(loaded: Loaded) -> None:
    whole = chat_of(loaded, config=GenerationConfig())
    whole.send("a")
    read = set(whole.tokens[:-12].tolist())
    written = next(int(token) for token in whole.tokens[-12:] if token not in read)
    for token, message in ((loaded.tokenizer.encode("!")[-1], "!"), (written, "a")):
        broken = replace(loaded, model=with_embedding(loaded.model, int(token), float("nan")))
        chat = chat_of(broken, config=GenerationConfig())
        with pytest.raises(FloatingPointError, match="non-finite logits"):
            chat.send(message)
        assert chat.held == SLOTS
        with pytest.raises(FloatingPointError, match="non-finite logits"):
            chat.send("b")
        assert (chat.fresh().held, chat.messages[-1]["role"]) == (0, "assistant")


@pytest.mark.parametrize(
    "slots", [[8, [8, 8]], [[8, 6], [4, 8]], (np.int64(8), 6), np.array([[8, 6], [4, 8]]), np.array(8)]
)
@pytest.mark.usefixtures("as_users_call_it")
def test_slots_of_every_form_are_saved(loaded: Loaded, tmp_path: Path, slots: Any) -> None:
    chat = Chat(loaded, TOVA("kv_head"), slots, max_new_tokens=4)
    chat.send("a")
    chat.save(tmp_path / "file")
    again = Chat.load(tmp_path / "file", loaded)
    assert json.loads(json.dumps(again.slots)) == again.slots
    assert again.fresh().held == 0
    assert again.send("b") == chat.send("b")


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_call_it")  # states are described by shapes
def test_a_conversation_on_several_devices(loaded: Loaded, tmp_path: Path) -> None:
    chat_of(loaded, sharding=ShardingRules(make_mesh("data=2")))  # one row, on every device
    rules = ShardingRules(make_mesh("tensor=2"))
    chat = chat_of(replace(loaded, model=rules.put(loaded.model)), config=GenerationConfig(), sharding=rules)
    alone = chat_of(loaded, config=GenerationConfig())
    assert chat.send("Who are you?") == alone.send("Who are you?")
    chat.save(tmp_path / "file")
    again = Chat.load(tmp_path / "file", chat.loaded, sharding=rules)
    for one in (chat, again):
        assert "tensor" in str(one.state.kv[0].keys.sharding)
    assert "tensor" not in str(Chat.load(tmp_path / "file", loaded).state.kv[0].keys.sharding)
    assert again.send("And?") == alone.send("And?")


def test_another_policy_reads_the_conversation_anew(loaded: Loaded) -> None:
    chat = chat_of(loaded)
    chat.send("Who are you?")
    same, wider = chat.reread(), chat.reread(slots=16)
    for one in (same, wider):
        assert (one.messages, one.tokens.tolist()) == (chat.messages, chat.tokens.tolist())
    assert np.array_equal(same.state.kv[0].positions, chat.state.kv[0].positions)
    assert (wider.held, chat.held) == (16, SLOTS)
    assert same.send("And?") == chat.send("And?")
    assert chat.fresh().messages == []


def test_three_hundred_turns(loaded: Loaded) -> None:
    """C15: no new length of a turn compiles anything, and nothing grows on the device."""
    chat = chat_of(loaded, max_new_tokens=4, config=GenerationConfig())
    lowered: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("jaxpr_to_mlir_module_duration"):
            lowered.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda: 1)()
        assert lowered, "the event has another name now: nothing would be counted"
        for n in range(3):
            chat.send("a" * (1 + 40 * n))
        lowered.clear()
        sizes, arrays = (_read_segment._cache_size(), _decode_loop._cache_size()), len(jax.live_arrays())
        size = chat.nbytes
        for n in range(297):
            chat.send("a" * (1 + n * 7 % 90))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not lowered
    assert (_read_segment._cache_size(), _decode_loop._cache_size()) == sizes
    assert (len(jax.live_arrays()), chat.nbytes) == (arrays, size)
    assert len(chat.messages) == 600

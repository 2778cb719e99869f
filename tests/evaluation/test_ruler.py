"""RULER's tasks: what is asked stands in the context, lengths are kept, scores are RULER's."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_chat import chat_folder

import jaxcompress as jc
from jaxcompress.evaluation.board import NOT_COMPARED
from jaxcompress.evaluation.results import Cell
from jaxcompress.evaluation.ruler import METRIC, TASKS, Plan
from jaxcompress.evaluation.ruler.hops import read_puzzles
from jaxcompress.evaluation.ruler.prompts import REST, fitted, largest
from jaxcompress.evaluation.ruler.protocol import Asker, reading
from jaxcompress.evaluation.ruler.sample import Sources
from jaxcompress.evaluation.ruler.scoring import match_all, match_any
from jaxcompress.evaluation.ruler.words import distinct_words
from jaxcompress.policies import Policy, Retention
from jaxcompress.policies.forget_head import init_forget_head
from jaxcompress.policies.learned import LIKE_TOVA

PARAGRAPH = (
    "The old mill stands where the river turns. Its wheel has not moved for years, and birds nest under the roof. "
)
TEXT = "\n\n".join(PARAGRAPH + f"Guest number {number} wrote his name into the book." for number in range(40))
SOURCES = Sources(TEXT, 1024)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    return jc.load(chat_folder(tmp_path_factory.mktemp("ruler")), dtype="float32")


@pytest.mark.parametrize("name", TASKS)
def test_what_is_asked_for_stands_in_the_context(name: str) -> None:
    task = TASKS[name]
    for seed in range(3):
        for size in (task.least, 40):
            sample = task.make(size, random.Random(seed), SOURCES)
            assert sample == task.make(size, random.Random(seed), SOURCES)
            for question in sample.questions:
                assert question.answers
                assert all(answer in sample.context for answer in question.answers), question
                assert match_all(" ".join(question.answers), question.answers) == 1
    assert task.make(40, random.Random(0), SOURCES) != task.make(40, random.Random(1), SOURCES)


def test_needles() -> None:
    make = lambda name: TASKS[name].make(40, random.Random(0), SOURCES)
    single = make("niah_single_2")
    ((question,),) = (single.questions,)
    assert single.context.startswith("A special magic number is hidden within the following text.")
    assert re.fullmatch(
        r"What is the special magic number for \w+-\w+ mentioned in the provided text\? ", question.text
    )
    (value,) = question.answers
    key = re.search(rf"One of the special magic numbers for (\w+-\w+) is: {value}\.", single.context)
    assert key is not None
    assert question.prefix == f"The special magic number for {key[1]} mentioned in the provided text is"
    several = make("niah_multiquery")
    assert len(several.questions[0].answers) == several.context.count("One of the special magic") == 4
    assert several.questions[0].text.startswith("What are all the special magic numbers for ")
    assert ", and " in several.questions[0].text
    values = make("niah_multivalue")
    assert len(values.questions[0].answers) == 4
    assert len(set(re.findall(r"magic numbers for (\S+) is:", values.context))) == 1
    keys = make("niah_multikey_1")
    assert len({question.answers for question in keys.questions}) == 4  # four questions about one context
    assert make("niah_multikey_2").context.count("One of the special magic numbers") == 41


def test_a_needle_can_stand_anywhere_in_text_without_sentences() -> None:
    log = Sources("\n".join(f"09:{i:02} INFO web: request {i} took {3 * i} ms" for i in range(60)), 1024)
    assert not log.is_prose
    assert SOURCES.is_prose
    depths = set()
    for seed in range(20):
        sample = TASKS["niah_single_2"].make(100, random.Random(seed), log)
        words = sample.context.split()
        depths.add(10 * words.index("One") // len(words))
        assert sum(word in log.words for word in words) >= 100
    assert len(depths) > 5


def test_a_chain_of_variables() -> None:
    (question,) = (sample := TASKS["vt"].make(20, random.Random(1), SOURCES)).questions
    told = sample.context[sample.context.rindex("Memorize and track") :]
    names = list(question.answers)
    assert re.findall(r"VAR (\w+) = VAR (\w+)", told) == list(zip(names[1:], names, strict=False))
    value = re.search(r"assigned the value (\d+)", question.text)
    assert value is not None
    assert f"VAR {names[0]} = {value[1]}" in told
    assert sample.context.count("Question: Find all variables") == 1  # the worked example


def test_common_words_are_the_most_frequent() -> None:
    for length, often, seldom in ((1024, 6, 1), (4096, 30, 3)):
        sample = TASKS["cwe"].make(60, random.Random(2), Sources(TEXT, length))
        listed = sample.context[sample.context.rindex("appear most often.") :]
        counts = Counter(re.findall(r"\d+\. (\S+)", listed))
        assert {counts.pop(word) for word in sample.questions[0].answers} == {often}
        assert set(counts.values()) == {seldom}
        assert len(counts) == 50


def test_coded_words_fall_with_the_square_of_their_rank() -> None:
    sample = TASKS["fwe"].make(1000, random.Random(3), SOURCES)
    counts = Counter(re.findall(r"\b[a-z]{6}\b", sample.context.partition("coded words. ")[2]))
    assert [word for word, _ in counts.most_common(3)] == list(sample.questions[0].answers)
    assert [counts[word] for word in sample.questions[0].answers] == [151, 67, 37]  # 1000 / zeta(2) / rank**2


def test_two_hops_need_two_documents() -> None:
    sample = TASKS["qa_2"].make(5, random.Random(4), SOURCES)
    documents = sample.context.split("\n\nDocument ")
    (answer,) = sample.questions[0].answers
    person = re.search(r"in which (.+) was born", sample.questions[0].text)
    assert person is not None
    (first,) = (one for one in documents if f"{person[1]} was born in" in one)
    town = re.search(r"the town of (\w+)", first)
    assert town is not None
    (second,) = (one for one in documents if answer in one)
    assert town[1] in second
    assert person[1] not in second


def test_words_do_not_repeat() -> None:
    words = distinct_words(2000, random.Random(0))
    assert len(set(words)) == len(words) == 2000


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("form", ["chat", "plain"])
def test_contexts_are_as_long_as_they_may_be(name: str, form, loaded) -> None:
    length = 6000  # every byte is a token
    prompt = fitted(name, length, 0, 0, loaded.tokenizer, SOURCES, form)
    assert len(prompt.context) <= length - REST
    assert len(prompt.context) > (length - REST) * 0.9
    text = loaded.tokenizer.decode(prompt.context, skip_special=False)
    after = loaded.tokenizer.decode(prompt.closing[0], skip_special=False)
    if form == "chat":
        assert text.startswith("<|im_start|>user\n")
        assert after == f"<|im_end|>\n<|im_start|>assistant\n{prompt.questions[0].prefix}"
    else:
        assert after == f"\n{prompt.questions[0].prefix}"


def test_a_length_that_is_too_short_is_told(loaded) -> None:
    with pytest.raises(ValueError, match=r"cwe does not fit into 400 tokens.*at least \d+"):
        fitted("cwe", 400, 0, 0, loaded.tokenizer, SOURCES, "plain")


@pytest.mark.parametrize("most", [3, 4, 5, 100, 127, 128, 129])
def test_largest(most: int) -> None:
    assert largest(3, lambda size: size <= most) == most
    assert largest(0, lambda size: size <= most) == most


def test_scores_are_those_of_ruler() -> None:
    assert match_all(" It is 123 and\x0045.", ("123", "999")) == 0.5
    assert match_all("ABC def", ("abc", "DEF")) == 1
    assert match_any("no", ("x", "O")) == 1
    assert match_any("no", ("x",)) == 0


def test_protocols() -> None:
    tova = jc.get_policy("tova")
    how = reading("kvpress", tova, 64, context=256, rest=128)
    assert (how.policy.name, how.slots, how.context, how.later) == ("tova/once64", 192, "oneshot", "oneshot")
    how = reading("oneshot", tova, 64, context=256, rest=128)
    assert (how.policy.name, how.slots, how.context, how.later) == ("tova", 64, "oneshot", "streaming")
    how = reading("streaming", tova, 64, context=256, rest=128)
    assert (how.slots, how.context, how.later) == (64, "streaming", "streaming")
    assert reading("streaming", jc.get_policy("full"), 64, context=256, rest=128).slots == 384


@pytest.fixture(scope="module")
def asker(loaded) -> Asker:
    return Asker(
        model=loaded.model, decode=loaded.tokenizer.decode, stop=(), length=1200, new_tokens=5, questions=2, batch=2
    )


@pytest.fixture(scope="module")
def prompts(loaded):
    return [fitted("niah_multikey_1", 1200, i, 0, loaded.tokenizer, SOURCES, "chat") for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("known", [False, True])
def test_answers_are_those_of_reading_each_prompt_by_itself(known: bool, asker: Asker, prompts, loaded) -> None:
    """A batch that is not full, two questions of one context, and a copy of the state: against `generate`."""
    given = asker.ask(prompts, jc.get_policy("full"), 1, "kvpress", known=known)
    assert len(given.written) == 6
    times = 2 if known else 1  # a context is read anew for a question that it is bounded with
    assert given.tokens == times * sum(len(one.context) for one in prompts) + 6 * 5  # not those that fill the batch
    assert given.tokens_per_second > 0
    rows = [np.r_[one.context, one.asked[j], one.closing[j]] for one in prompts for j in range(2)]
    (tokens,) = jc.generate(loaded.model, rows, jc.get_policy("full"), 1600, max_new_tokens=5, mode="oneshot")
    assert given.written == [loaded.tokenizer.decode(row) for row in tokens]


@pytest.mark.slow
def test_the_question_decides_what_is_kept_only_if_it_is_known(asker: Asker, prompts) -> None:
    """A window keeps the end of what it reads: the question, if that is part of it."""
    ask = lambda known: asker.ask(prompts, jc.get_policy("window"), 300, "kvpress", known=known)
    assert ask(False).state_bytes == ask(True).state_bytes
    assert ask(False).written != ask(True).written


def test_plan(loaded) -> None:
    policies = {name: jc.get_policy(name) for name in ("full", "window+4", "snapkv+16")}
    plan = Plan(
        tasks=("niah_single_1", "qa_2"), lengths=(2300,), policies=policies, fractions=(64, 256), samples=2, batch=2,
        known=(False, True), protocols=("kvpress", "oneshot"), seeds=2, text=TEXT,
    )  # fmt: skip
    cells = list(plan.cells(loaded, "tiny"))
    count = Counter((cell.policy, cell.slots) for cell in cells)
    each = 2 * 2 * 2 * 2  # tasks, seeds, known, protocols
    assert count == {("full", 2044): 4, ("window+4", 31): each, ("window+4", 7): each, ("snapkv+16", 31): each}
    assert len({cell.key for cell in cells}) == len(cells)
    short = replace(plan, tasks=("niah_single_1", "cwe"), lengths=(800, 2300))
    assert list(short.too_long(loaded.tokenizer)) == [("cwe", 800)]
    fitting = list(short.cells(loaded, "tiny", left_out=[("cwe", 800)]))
    assert {(cell.task, cell.context) for cell in fitting} == {
        ("niah_single_1", 800),
        ("niah_single_1", 2300),
        ("cwe", 2300),
    }
    measure = plan.measure(loaded)
    chosen: list[Cell] = [cell for cell in cells if cell.policy == "window+4" and cell.seed == 0][:1]
    (figure,) = measure(chosen[0])
    assert (figure.metric, figure.samples, len(figure.details)) == (METRIC, 2, 2)
    assert 0 <= figure.value <= 100
    assert figure.tokens > 2 * 1800


def test_a_cell_knows_the_weights_of_a_learned_policy(loaded) -> None:
    """Not only its name: two heads over one model are two policies."""

    def cell(name: str, policy: Policy) -> Cell:
        plan = Plan(tasks=("vt",), lengths=(2300,), policies={name: policy}, fractions=(64,), text=TEXT)
        return next(iter(plan.cells(loaded, "tiny")))

    head = lambda seed: Retention(
        init_forget_head(jax.random.key(seed), layers=1, kv_heads=2, head_dim=4, start=LIKE_TOVA), "layer"
    )
    first, again, other = (cell("learned", head(seed)) for seed in (0, 0, 1))
    assert first.key == again.key != other.key
    assert cell("learned", jc.get_policy("tova")).key != cell("learned", jc.get_policy("window")).key
    assert "policy_hash" not in cell("tova", jc.get_policy("tova")).settings
    assert NOT_COMPARED == ("fraction", "policy_hash")


def test_questions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "hotpot.json"
    file.write_text(
        '[{"question": "Who?", "answer": "Ann", "context": [["A", ["One. ", "Two."]], ["B", ["Ann."]]]},'
        ' {"question": "What?", "answer": "Tea", "context": [["C", ["Tea is drunk."]]]}]'
    )
    puzzles = read_puzzles(file)
    assert puzzles[0].documents == ("A\nOne. Two.", "B\nAnn.")
    sample = TASKS["qa_2"].make(3, random.Random(0), Sources(TEXT, 1024, puzzles))
    assert sample.questions[0].answers in (("Ann",), ("Tea",))
    assert "old mill" not in sample.context
    file.write_text('[{"question": "Who?"}]')
    with pytest.raises(ValueError, match=r"hotpot.json, entry 0 must be an object with question"):
        read_puzzles(file)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/none.json; give the path of a file of HotpotQA's form"):
        read_puzzles(tmp_path / "none.json")


def test_text_without_paragraphs_is_told() -> None:
    with pytest.raises(ValueError, match="no paragraphs of 20 to 120 words"):
        TASKS["qa_2"].make(3, random.Random(0), Sources("One line.", 1024))
    with pytest.raises(ValueError, match="is empty"):
        TASKS["niah_single_2"].make(3, random.Random(0), Sources(" \n", 1024))

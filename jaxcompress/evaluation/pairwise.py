"""Two texts judged against each other, as long generations are compared (Zheng et al. 2023, "Judging LLM-as-a-Judge").

    judge = Endpoint("https://host/v1", "model")                # jaxcompress.prompt.endpoint, or any function
    judge_pair(judge, "Write a story.", candidate, reference).outcome      # win, tie or loss of the candidate

A judge prefers what stands first, or last. So each pair is judged twice, with the places swapped, and a text wins only
if it wins in both places.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress.checkpoints._loaded import Loaded
from jaxcompress.generation.decode_state import init_decode_state
from jaxcompress.generation.generate import prefill
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.policies.full import Full

Judge = Callable[[str, str], str]
"""(instruction, text) -> what the judge says. Every teacher of `jaxcompress.prompt` is one."""

Outcome = Literal["win", "tie", "loss"]

INSTRUCTION = """\
You compare two texts, A and B, that were written for the same task. Judge how well each one follows the task, and its \
coherence, fluency and detail over its whole length. The order of the texts says nothing about them, nor does their \
length alone. End with your verdict in this form: [[A]] if A is better, [[B]] if B is better, [[C]] if neither is."""
"""Told to a judge, in our words."""

_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_SAYS = "My verdict: [["


class Judged(NamedTuple):
    """What a judge thinks of a candidate beside a reference.

    Attributes:
      outcome: of the candidate: `win` or `loss` if the judge says so in both orders, else `tie`.
      consistent: whether the judge said the same in both orders.
      said: its two answers, the candidate first (A) and last (B); () if the texts are equal and it was not asked.
    """

    outcome: Outcome
    consistent: bool
    said: tuple[str, ...]


def comparison(task: str, a: str, b: str) -> str:
    """What a judge reads after the instruction."""
    return f"[Task]\n{task}\n\n[Text A]\n{a}\n\n[Text B]\n{b}\n\n[End of the texts]"


def verdict(said: str) -> Literal["A", "B", "C"]:
    """The last verdict of an answer.

    Raises:
      ValueError: there is none.
    """
    found = _VERDICT.findall(said)
    if not found:
        raise ValueError(f"a judge ends with [[A]], [[B]] or [[C]]; this one said {said[-80:]!r}")
    return found[-1]


def judge_pair(judge: Judge, task: str, candidate: str, reference: str) -> Judged:
    """Asks a judge twice, with the places swapped. Texts that are equal tie without being judged.

    Raises:
      ValueError: an answer without a verdict; whatever the judge raises.
    """
    if candidate == reference:
        return Judged("tie", True, ())
    first = judge(INSTRUCTION, comparison(task, candidate, reference))
    last = judge(INSTRUCTION, comparison(task, reference, candidate))
    forwards = {"A": "win", "B": "loss", "C": "tie"}[verdict(first)]
    backwards = {"A": "loss", "B": "win", "C": "tie"}[verdict(last)]
    agreed = forwards == backwards
    outcome: Outcome = forwards if agreed else "tie"  # type: ignore[assignment]
    return Judged(outcome, agreed, (first, last))


def likelihood_judge(loaded: Loaded[Any, Any, Tokenizer]) -> Judge:
    """A local model as a judge: it does not write, the likeliest of the three verdicts counts.

    So it never fails to give one, however small the model. The whole pair is read with a full cache.
    """
    model, tokenizer = loaded.model, loaded.tokenizer

    def judge(instruction: str, text: str) -> str:
        said = tokenizer.encode(f"{instruction}\n\n{text}\n\n{_SAYS}", add_bos=True)
        if tokenizer.has_chat_template:
            messages = [dict(role="system", content=instruction), dict(role="user", content=text)]
            said = tokenizer.encode(tokenizer.apply_chat_template(messages) + _SAYS, add_bos=False)
        before = tokenizer.decode(said[-16:], skip_special=False)
        choices = [int(tokenizer.encode_after(before, letter)[0]) for letter in "ABC"]
        state = init_decode_state(model, Full(), -(-len(said) // 512) * 512)
        logits = np.asarray(prefill(model, [np.asarray(said)], state, mode="oneshot").logits[0, jnp.array(choices)])
        return f"[[{'ABC'[int(logits.argmax())]}]]"

    return judge

"""Policies by name, for command lines and tables.

    name      policy, then any number of modifiers: snapkv+32/critical/every16
    policy    a label with settings (see `jaxcompress.policies.labels`): tova, snapkv+32, h2o-recent16-layer
              mix(0.7*tova/ranked,0.3*window/ranked), then(snapkv+32,window+4-kv_head), per_layer(2*window+4,30*tova)
              learned, the one that was saved with a model
              FILE.py:CLASS or MODULE:CLASS, with settings, one of your own (see `jaxcompress.policies.own`)
    modifier  the label of a combinator or a reduction: every16, protect-first4-recent64, merge_nearest

Modifiers go around what stands before them, from left to right. `str(policy)` gives the name back; what has weights of
its own, or comes from a file, appears by its label.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches

from jaxcompress.policies.adaptive import adaptive
from jaxcompress.policies.chunks import by_chunks, within_chunks
from jaxcompress.policies.critical import critical
from jaxcompress.policies.expected import ExpectedAttention
from jaxcompress.policies.full import Full
from jaxcompress.policies.geometry import CUR, KeyDiff, KNorm, LagKV
from jaxcompress.policies.h2o import H2O
from jaxcompress.policies.labels import read, spellings
from jaxcompress.policies.mix import mix, ranked, then
from jaxcompress.policies.nacl import NACL
from jaxcompress.policies.observed import ObservedAttention
from jaxcompress.policies.own import own_policy
from jaxcompress.policies.per_layer import per_layer
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.pooled import pooled
from jaxcompress.policies.protect import protect
from jaxcompress.policies.random import Random
from jaxcompress.policies.reduction import Reduction
from jaxcompress.policies.reductions.merge import cam, d2o, merge_nearest, merge_weighted
from jaxcompress.policies.reductions.reduced import with_reduce
from jaxcompress.policies.reductions.summarise import low_rank, mean_slots
from jaxcompress.policies.rkv import RKV
from jaxcompress.policies.sampled import sampled
from jaxcompress.policies.scissorhands import Scissorhands
from jaxcompress.policies.snapkv import SnapKV
from jaxcompress.policies.tova import TOVA
from jaxcompress.policies.waiting import every, once
from jaxcompress.policies.window import StreamingLLM, Window
from jaxcompress.policies.wrapper import wrapper

POLICIES: tuple[type[Policy], ...] = (
    Full, Window, StreamingLLM, TOVA, H2O, ObservedAttention, Scissorhands, SnapKV, NACL, KNorm, KeyDiff, LagKV, CUR,
    ExpectedAttention, RKV, Random,
)  # fmt: skip
COMBINATORS: tuple[type[wrapper], ...] = (
    protect, pooled, by_chunks, within_chunks, ranked, critical, adaptive, sampled, every, once,
)  # fmt: skip
REDUCTIONS: tuple[type[Reduction], ...] = (merge_nearest, merge_weighted, cam, d2o, mean_slots, low_rank)

NAMES = tuple(name for cls in POLICIES for name in spellings(cls))
"""Names that `get_policy` knows, without settings; N stands for a number."""
MODIFIERS = tuple(name for cls in (*COMBINATORS, *REDUCTIONS) for name in spellings(cls))
"""What may follow a name after a slash, any number of times, from left to right."""


def get_policy(name: str, learned: Policy | None = None) -> Policy:
    """The policy of a name such as `tova`, `window+4` or `snapkv+32/every16`, with its published defaults.

    Args:
      name: see `jaxcompress.policies.names`. `mine.py:Far` is the policy `Far` of a file, which is run.
      learned: what the name `learned` stands for, such as `load(folder).policy`.

    Raises:
      ValueError: an unknown name, setting or modifier (the message lists the known ones), parts that do not fit
        together, or a file or module without such a policy.
      TypeError: the name is no string, or `learned` no policy.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a policy is expected, such as 'tova', not {name!r:.60}")
    place, text = _placed(name)
    first, *modifiers = _split(text, "/")
    policy = own_policy(place, first) if place else _plain(first, learned)
    for modifier in modifiers:
        policy = _modified(policy, modifier)
    return policy


def own_places(name: str) -> list[str]:
    """The files and modules that a name takes policies from (see `jaxcompress.policies.own`); [] if it takes none."""
    place, text = _placed(name)
    if place:
        return [place]
    first = _split(text, "/")[0]
    found = _COMPOUND.match(first)
    parts = _split(first[found.end() : -1], ",") if found else []
    return [place for part in parts for place in own_places(re.sub(r"^[\d.e+-]+\*", "", part))]


def _placed(name: str) -> tuple[str, str]:
    """The file or module of one's own before the last colon, empty if there is none, and the rest."""
    if ":" not in name or _COMPOUND.match(name):
        return "", name
    place, _, text = name.rpartition(":")
    return place, text


def _plain(text: str, learned: Policy | None) -> Policy:
    """A policy without modifiers."""
    if text == "learned" and learned is not None:
        if not isinstance(learned, Policy):
            raise TypeError(f"learned must be a policy, such as load(folder).policy, not {learned!r}")
        return learned
    if found := _COMPOUND.match(text):
        if not text.endswith(")"):
            raise ValueError(f"policy {text!r} needs a closing parenthesis at its end")
        made = _COMPOUNDS[found[1]](_split(text[found.end() : -1], ","), lambda part: get_policy(part, learned))
        return made if ":" in text or "learned" in text else _spelled(made, text)
    for cls in POLICIES:
        if (policy := read(cls, text)) is not None:
            return policy
    if text == "learned":
        raise ValueError("'learned' is a policy that was saved with a model: give learned=load(folder).policy")
    raise ValueError(
        f"unknown policy {text!r}{_meant(text)}; known: "
        f"{', '.join((*NAMES, *(f'{name}(...)' for name in _COMPOUNDS)))}, and FILE.py:CLASS for one of your own"
    )


def _meant(text: str) -> str:
    """What an unknown name was probably meant to be, as a question; empty if nothing is near."""
    if "," in text:
        return " (several are separated by spaces)"
    if text.endswith(".py"):
        return f"; name the policy of the file, {text}:CLASS"
    near = get_close_matches(text.lower(), NAMES, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _modified(policy: Policy, text: str) -> Policy:
    for cls in COMBINATORS:
        if (made := read(cls, text, policy)) is not None:
            return made
    for cls in REDUCTIONS:
        if (reduction := read(cls, text)) is not None:
            return _spelled(with_reduce(policy, reduction), f"{policy.name}/{text}")
    raise ValueError(f"unknown modifier {text!r} of {policy.name}; known: {', '.join(MODIFIERS)}")


def _spelled(policy: Policy, text: str) -> Policy:
    """The policy, if that is its name: a policy has one name only."""
    if policy.name != text:
        raise ValueError(f"{text!r} is written {policy.name!r}")
    return policy


Get = Callable[[str], Policy]


def _mix(parts: list[str], get: Get) -> Policy:
    pairs = [part.partition("*") for part in parts]
    for weight, star, name in pairs:
        if not re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", weight):
            raise ValueError(f"a mix has parts like 0.7*tova, not {weight + star + name!r}")
    return mix(*((float(weight), get(name)) for weight, _, name in pairs))


def _then(parts: list[str], get: Get) -> Policy:
    if len(parts) != 2:
        raise ValueError(f"then has two policies, the first and the later, not {len(parts)}: {', '.join(parts)}")
    return then(*map(get, parts))


def _per_layer(parts: list[str], get: Get) -> Policy:
    counted = [re.fullmatch(r"(?:(\d+)\*)?(.*)", part) for part in parts]
    return per_layer(*(one for found in counted if found for one in [get(found[2])] * int(found[1] or 1)))


_COMPOUNDS: dict[str, Callable[[list[str], Get], Policy]] = {"mix": _mix, "then": _then, "per_layer": _per_layer}
_COMPOUND = re.compile(rf"({'|'.join(_COMPOUNDS)})\(")


def _split(text: str, mark: str) -> list[str]:
    """The parts between marks that stand outside parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts

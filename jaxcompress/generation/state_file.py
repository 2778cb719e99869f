"""A `DecodeState` as one file, from which its sequences go on token for token.

The file is in the safetensors format: the arrays by name, and a description in its metadata. Keys and values are
stored as the state stores them, so that nothing is rounded. The file names the model and the policy that it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jaxcompress.checkpoints._policy import SavedPolicy
from jaxcompress.checkpoints._written import WrittenPolicy, policy_digest, written_policy
from jaxcompress.generation.decode_state import DecodeArrays, DecodeState, check_usable
from jaxcompress.inputs.text import parse_json
from jaxcompress.inputs.whole_file import whole_file
from jaxcompress.models.checks import check_state
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder, check_decoder
from jaxcompress.models.fingerprint import fingerprint
from jaxcompress.models.init_state import policy_numbers
from jaxcompress.policies.checks import check_placement, check_policy
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import KVState, empty, with_numbers
from jaxcompress.state.storage import Quantised

FORMAT = 1
"""The version of the format that this module writes and reads."""

_FACTS, _POLICY = "jaxcompress", "policy."


class Record(NamedTuple):
    """The content of a file.

    Attributes:
      facts: JSON.
      arrays: by name.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def save_state(state: DecodeState, path: str | Path, model: Decoder) -> None:
    """Writes a state into one file; `load_state` reads it. The state stays usable.

    The file appears complete or not at all: an older file of this name stays as it is until the new one is on disk.

    Args:
      state: any `DecodeState`, of any number of rows.
      path: the file. The format is safetensors, whatever the name.
      model: the model that read the sequences.

    Raises:
      ValueError: the state was used before or belongs to another model.
      FloatingPointError: the logits of the state are not finite.
      OSError: the file cannot be written.
    """
    write_record(path, record_of(state, model))


def load_state(path: str | Path, model: Decoder, policy: Policy | None = None) -> DecodeState:
    """Reads a state that `save_state` wrote. Its sequences go on as if they had never stopped.

    Args:
      model: the model that read the sequences.
      policy: the policy of the state. Only one that has no name for `get_policy`, such as a class of your own, has to
        be given; any other is in the file, with its weights.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no state, is damaged, or belongs to another model, another policy, or another version of
        the format.
    """
    return state_of(read_record(path), path, model, policy)


def record_of(state: DecodeState, model: Decoder) -> Record:
    """A state as the content of a file."""
    check_usable(model, state)
    written = written_policy(state.policy)
    learned = None if written is None else written.learned
    facts = dict(
        format=FORMAT,
        model=fingerprint(model),
        config=asdict(model.config),
        policy=state.policy.name,
        policy_digest=policy_digest(state.policy),
        expression=None if written is None else written.expression,
        learned=None if learned is None else dict(name=learned.name, settings=dict(learned.settings)),
        placement=state.placement,
        keys=str(jax.random.key_impl(state.keys)),
        batch=state.done.shape[0],
        parts=[_facts(part) for part in state.kv],
    )
    arrays = {name: np.asarray(x) for name, x in _named(_without_keys(state.arrays)).items()}
    weights = {} if learned is None else learned.weights
    return Record(facts, arrays | {_POLICY + name: np.asarray(weight) for name, weight in weights.items()})


def state_of(record: Record, path: str | Path, model: Decoder, policy: Policy | None = None) -> DecodeState:
    """The state in the content of a file. Raises ValueError as `load_state` does."""
    check_decoder(model)
    facts, arrays = record
    try:
        _check_model(facts, path, model)
        policy = _policy(record, path, policy)
        check_placement(facts["placement"])
        expected = _expected(model.config, policy, facts)
        found = _without_keys(expected)._replace(keys=jax.eval_shape(jax.random.key_data, expected.keys))
        filled = jax.tree.unflatten(
            jax.tree.structure(found), [_array(arrays, name, x, path) for name, x in _named(found).items()]
        )
        state = DecodeState(
            *filled._replace(keys=jax.random.wrap_key_data(filled.keys, impl=facts["keys"])),
            policy=policy, placement=facts["placement"],
        )  # fmt: skip
        check_state(model.config, state.kv, policy, batch=facts["batch"])
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: its description of the state is wrong ({error!r:.80})") from error
    check_usable(model, state)
    return state


def write_record(path: str | Path, record: Record, *, writer: str = "") -> None:
    """Writes a file whole or not at all, through a file beside it (see `whole_file`). Raises OSError."""
    content = save({name: np.ascontiguousarray(x) for name, x in record.arrays.items()}, _metadata(record.facts))
    with whole_file(Path(path).expanduser(), writer=writer) as part:
        part.write_bytes(content)


def read_record(path: str | Path) -> Record:
    """Reads a file. Raises FileNotFoundError, or ValueError if it is no state or of another version of the format."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} to read a state from")
    try:
        with safe_open(path, framework="numpy") as file:
            told = (file.metadata() or {}).get(_FACTS)
            facts = None if told is None else parse_json(told, f"the description in {path}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not iterable
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} is no state that was saved, or damaged: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is no state that was saved: it has other arrays in it")
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{path} was written in format {facts.get('format')}, this version of jaxcompress reads format {FORMAT}; "
            "read it with the version that wrote it"
        )
    return Record(facts, arrays)


def _metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    return {_FACTS: json.dumps(facts)}


def _facts(part: KVState) -> dict[str, Any]:
    keys, layer = part.keys, np.asarray(part.layer)  # an index into an array of the device would be compiled
    return dict(
        layers=[int(layer[0]), int(layer[-1]) + 1],
        capacity=part.capacity,
        heads=list(part.heads),
        slots=part.positions.shape[-1],
        dtype=keys.dtype if isinstance(keys, Quantised) else keys.dtype.name,
    )


def _without_keys(arrays: DecodeArrays) -> DecodeArrays:
    """With the numbers of the random keys instead of the keys, which no file holds."""
    if isinstance(arrays.keys, jax.Array):
        return arrays._replace(keys=jax.random.key_data(arrays.keys))
    return arrays


def _named(arrays: DecodeArrays) -> dict[str, Any]:
    """The arrays by dotted names: logits, kv.0.keys, kv.0.stats.0, ..."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _expected(config: DecoderConfig, policy: Policy, facts: Mapping[str, Any]) -> DecodeArrays:
    """Shapes and types of the arrays that such a state has."""
    batch = facts["batch"]

    def arrays() -> DecodeArrays:
        return DecodeArrays(
            kv=tuple(_fresh(config, policy.at(part["layers"][0]), batch, **part) for part in facts["parts"]),
            logits=jnp.zeros((batch, config.vocab_size), jnp.float32),
            appeared=jnp.zeros((batch, config.vocab_size), bool),
            keys=jax.random.split(jax.random.key(0, impl=facts["keys"]), batch),
            done=jnp.zeros(batch, bool),
            broken=jnp.zeros(batch, jnp.int32),
        )

    return jax.eval_shape(arrays)


def _fresh(
    config: DecoderConfig, policy: Policy, batch: int, *, layers: list[int], capacity: int, heads: list[int],
    slots: int, dtype: str,
) -> KVState:  # fmt: skip
    """A fresh part of a state, as `_facts` describes it."""
    which = tuple(heads) or tuple(range(config.num_kv_heads))
    entries = config.num_kv_heads if policy.scope == "pool" else 1
    heads_of_state = policy.heads(config.num_heads // config.num_kv_heads * len(which), len(which))
    bare = empty(
        layers=range(*layers), batch=batch, heads=heads_of_state, sets=policy.sets(heads_of_state), capacity=capacity,
        slots=slots, head_dim=config.head_dim, dtype=dtype, which=tuple(heads), pooled=policy.scope == "pool",
    )  # fmt: skip
    return with_numbers(bare, *policy_numbers(config, policy, which, capacity // entries, batch))


def _array(arrays: Mapping[str, np.ndarray], name: str, like: Any, path: str | Path) -> jax.Array:
    found = arrays.get(name)
    if found is None:
        raise ValueError(f"{path} is damaged: it has no array {name}")
    if (found.shape, found.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"{path} is damaged: {name} is {found.dtype} {list(found.shape)}, expected {like.dtype} {list(like.shape)}"
        )
    return jnp.asarray(found)


def _check_model(facts: Mapping[str, Any], path: str | Path, model: Decoder) -> None:
    """Raises ValueError if the file belongs to another model."""
    theirs, mine = facts["config"], json.loads(json.dumps(asdict(model.config)))
    if wrong := _differences(theirs, mine):
        raise ValueError(f"{path} belongs to another model, with {', '.join(wrong[:3])}")
    if (now := fingerprint(model)) != facts["model"]:
        raise ValueError(
            f"{path} belongs to a model of the same shape with other weights: their fingerprint is "
            f"{facts['model']:.12}, this model's is {now:.12}"
        )


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Where two configs differ. An entry that only one version of the library knows does not count."""
    found = []
    for name in [name for name in theirs if name in mine]:
        if isinstance(theirs[name], dict) and isinstance(mine[name], dict):
            found += [f"{name}.{one}" for one in _differences(theirs[name], mine[name])]
        elif theirs[name] != mine[name]:
            found.append(f"{name} {theirs[name]} instead of {mine[name]}")
    return found


def _policy(record: Record, path: str | Path, given: Policy | None) -> Policy:
    """The policy of a file: the given one if it is that, else the one that the file describes."""
    facts, arrays = record
    if given is None:
        if facts["expression"] is None:
            raise ValueError(
                f"{path} is a state of the policy {facts['policy']}, which no name gives back; give it as policy="
            )
        weights = {name.removeprefix(_POLICY): x for name, x in arrays.items() if name.startswith(_POLICY)}
        learned = facts["learned"]
        saved = None if learned is None else SavedPolicy(learned["name"], learned["settings"], weights)
        given = WrittenPolicy(facts["expression"], saved).make()
    check_policy(given)
    if given.name != facts["policy"]:
        raise ValueError(f"{path} is a state of the policy {facts['policy']}, not {given.name}")
    if policy_digest(given) != facts["policy_digest"]:
        raise ValueError(f"{path} is a state of the policy {given.name} with other weights")
    return given

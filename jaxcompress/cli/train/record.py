"""run.json: the settings of a run, its data, and what was measured before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jaxcompress.cli.train.arguments import TrainFlags
from jaxcompress.inputs.text import parse_json, read_text

_PER_CALL = ("out", "resume", "config", "coordinator", "processes", "process_id", "profile")
_FREE = ("steps", "save_every", "keep", "tensorboard", "mesh")  # may change while a run lasts


def recorded_settings(how: TrainFlags) -> dict[str, Any]:
    """The settings that make a run what it is, as JSON has them."""
    settings = asdict(how) | dict(learning_rate=how.rate)
    return _as_json({name: value for name, value in settings.items() if name not in _PER_CALL})


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def read_record(path: Path) -> dict[str, Any]:
    """What run.json says. Raises ValueError if it is not what `train` writes."""
    run = parse_json(read_text(path), str(path))
    if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
        raise ValueError(f"{path} has no settings; begin another run with another --out")
    return run


def unchanged(
    how: TrainFlags, path: Path, data: Mapping[str, Any], made: Mapping[str, str], done: int
) -> dict[str, Any]:
    """The record of a run that goes on; prints which settings change.

    A setting that the record lacks is newer than the run, which went on as the flag's default does.

    Args:
      path: of run.json.
      data: the number of tokens and their checksum, now.
      made: `base`, the fingerprint of the model that the run begins from, and what `policy_settings` says of the
        policy, now.
      done: steps taken.

    Raises:
      ValueError: settings, data, the model or the policy are not those that the run began with.
    """
    begun, changes = read_record(path), []
    then = _as_json({field.name: field.default for field in fields(TrainFlags)}) | begun["settings"]
    for name, value in recorded_settings(how).items():
        flag, was = f"--{name.replace('_', '-')}", then[name]
        if value == was:
            continue
        if name not in _FREE:
            raise ValueError(
                f"{flag} was {was} when the run in {how.out} began, and is {value} now; leave it out, or begin "
                f"another run with --model {how.out / 'model'}"
            )
        changes.append(f"{flag} is {value} from now on; it was {was}")
    if how.steps < done:
        raise ValueError(f"the run in {how.out} has taken {done} steps; --steps {how.steps} is less: give more")
    read = begun.get("data")
    if not isinstance(read, dict) or not {"tokens", "checksum"} <= read.keys():
        raise ValueError(f"{path} is damaged; begin another run with another --out")
    if read != dict(data):
        raise ValueError(
            f"{how.data} has changed since the run in {how.out} began: {data['tokens']:,} tokens (checksum "
            f"{data['checksum']}), then {read['tokens']} ({read['checksum']})"
        )
    if begun.get("base", made["base"]) != made["base"]:
        raise ValueError(
            f"--model {how.model or 'embedded'} holds other weights than when the run in {how.out} began; give the "
            "model of then, or begin another run with another --out"
        )
    if any(begun.get(name, value) != value for name, value in made.items() if name != "base"):
        raise ValueError(
            f"the code of --policy {how.policy} has changed since the run in {how.out} began; give the file of then, "
            f"or begin another run with --model {how.out / 'model'}"
        )
    print(*changes, sep="\n", end="\n" * bool(changes), flush=True)
    return begun

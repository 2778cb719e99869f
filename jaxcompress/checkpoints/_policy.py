"""The policy that a model was trained with, saved in the model's Hugging Face folder.

policy.json has the policy's name and settings. policy.safetensors has the weights of a learned policy. Other software
ignores both files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxcompress.inputs.json import read_object
from jaxcompress.inputs.whole_file import whole_file
from jaxcompress.policies.names import get_policy
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.registry import LEARNED, learned_policy

_SETTINGS, _WEIGHTS = "policy.json", "policy.safetensors"


class SavedPolicy(NamedTuple):
    """A policy as it is saved: its name, settings and weights.

    Attributes:
      name: the name that `jaxcompress.get_policy` takes.
      settings: e.g. `slots`, `segment`, `chunk`, `placement`.
      weights: the policy's own weights, as nested dicts of arrays; {} if it has none.
    """

    name: str
    settings: Mapping[str, Any]
    weights: Mapping[str, Any] = {}

    def make(self) -> Policy:
        """Builds the policy, with its own weights if it has any.

        Raises:
          ValueError: the name is unknown; the weights or settings do not belong to this policy; the policy is from a
            file or module, whose code would have to be run.
        """
        if ":" in self.name:
            raise ValueError(
                f"the model was trained with the policy {self.name!r}, which is code beside the checkpoint. "
                f"A checkpoint does not run code: pass jaxcompress.get_policy({self.name!r}) yourself if you trust it, "
                f"or --policy {self.name} on the command line"
            )
        if not self.weights:
            return get_policy(self.name)
        known = LEARNED[self.name].settings if self.name in LEARNED else ()
        settings = {name: self.settings[name] for name in known if name in self.settings}
        try:
            return learned_policy(self.name, self.weights, **settings)
        except (TypeError, AttributeError, IndexError) as error:  # arrays or numbers of the wrong type
            raise ValueError(
                f"the saved weights and settings are not those of the policy {self.name!r}: {error}"
            ) from error


def write_policy(policy: SavedPolicy, folder: str | Path) -> None:
    """Writes a policy into a folder. Each file appears complete or not at all, policy.json last.

    Raises:
      ValueError: the name of a weight contains a dot or is not a string.
      OSError: the folder does not exist or cannot be written.
    """
    folder = Path(folder).expanduser()
    if policy.weights:
        with whole_file(folder / _WEIGHTS) as part:
            save_file(_flatten(policy.weights), part)
            part.chmod((folder / "config.json").stat().st_mode if (folder / "config.json").exists() else 0o644)
    else:
        (folder / _WEIGHTS).unlink(missing_ok=True)
    with whole_file(folder / _SETTINGS) as part:
        part.write_text(json.dumps({"policy": policy.name, **policy.settings}, indent=2) + "\n", encoding="utf-8")


def load_policy(folder: str | Path) -> SavedPolicy | None:
    """Reads the policy in a model's folder; None if there is none.

    Raises:
      ValueError: a file is damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / _SETTINGS).is_file():
        return None
    settings = read_object(folder / _SETTINGS)
    name = settings.pop("policy", None)
    if not isinstance(name, str):
        raise ValueError(f"{folder / _SETTINGS} needs the name of a policy under 'policy', not {name!r:.80}")
    try:
        weights = load_file(folder / _WEIGHTS) if (folder / _WEIGHTS).is_file() else {}
        return SavedPolicy(name, settings, _unflatten(weights))
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ValueError(f"{folder / _WEIGHTS} cannot be read: {error}") from error


def _flatten(weights: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if not isinstance(name, str) or "." in name:
            raise ValueError(f"a policy's weights need names without dots, not {name!r}")
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = np.ascontiguousarray(value)
    return flat


def _unflatten(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise ValueError(f"{parent!r} is both an array and a group of arrays")
        if leaf in at:
            raise ValueError(f"{leaf!r} is both an array and a group of arrays")
        at[leaf] = value
    return tree

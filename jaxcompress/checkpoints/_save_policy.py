"""Saves the policy of a model beside it."""

from __future__ import annotations

from pathlib import Path

from jaxcompress.checkpoints._policy import SavedPolicy, write_policy
from jaxcompress.checkpoints._policy_of import NORMS
from jaxcompress.checkpoints._written import written_policy
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.fingerprint import norms_fingerprint
from jaxcompress.policies.policy import Policy


def save_policy(policy: Policy | SavedPolicy, folder: str | Path, *, model: Decoder | None = None) -> None:
    """Writes a policy into a model's folder, where `load(folder).policy` and `--policy learned` find it.

    Each file appears complete or not at all, policy.json last.

        save(model, "mine")
        save_policy(Retention(head, "layer"), "mine", model=model)

    Args:
      policy: one that is learned, such as `Retention(head)`, or one that its name gives back, such as `TOVA()`; or a
        `SavedPolicy` with settings that are JSON and weight names without dots.
      folder: the folder of a model, as `save` writes it.
      model: the model that the policy was trained for. The policy is then refused for any other.

    Raises:
      ValueError: neither its name nor weights and settings give the policy back, or the name of a weight contains a dot
        or is not a string.
      OSError: the folder does not exist or cannot be written.
    """
    saved = policy if isinstance(policy, SavedPolicy) else _saved(policy)
    if model is not None:
        saved = saved._replace(settings={**saved.settings, NORMS: norms_fingerprint(model)})
    write_policy(saved, folder)


def _saved(policy: Policy) -> SavedPolicy:
    written = written_policy(policy)
    if written is not None and written.expression == "learned" and written.learned is not None:
        return written.learned
    if written is None or written.learned is not None:
        raise ValueError(
            f"{policy.name} cannot be saved: give a learned policy by itself, without anything around it, or a policy "
            "that its name gives back"
        )
    return SavedPolicy(written.expression, {})

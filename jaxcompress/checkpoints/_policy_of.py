"""The learned policy of a model: the one in its folder, or the one that ships with the package for it."""

from __future__ import annotations

from pathlib import Path

from jaxcompress import embedded
from jaxcompress.checkpoints._policy import SavedPolicy, load_policy
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.fingerprint import norms_fingerprint

NORMS = "norms"
"""The setting of a saved policy that names its model, by `norms_fingerprint`."""


def policy_of(model: Decoder, folder: str | Path) -> SavedPolicy | None:
    """The policy that was trained for a model, None if there is none.

    It is the one in the model's folder. If the folder has none, or the model was trained further with its full cache,
    it is the one that ships with the package for this model, whatever precision the weights have (see
    `norms_fingerprint`). So it is for a model that is a file.

    Raises:
      ValueError: the folder's policy is damaged, or is for another model.
    """
    saved = load_policy(folder)
    if saved is None or saved.name == "full":  # adapters that were trained with the full cache leave the norms alone
        return _shipped(norms_fingerprint(model)) or saved
    trained_for = saved.settings.get(NORMS)
    if saved.weights and trained_for is not None and trained_for != (mine := norms_fingerprint(model)):
        raise ValueError(
            f"the policy in {folder} was trained for another model: its norms have the fingerprint "
            f"{trained_for!s:.16}, those of this model {mine:.16}. Delete policy.json and policy.safetensors there, "
            "or put the policy of this model in their place"
        )
    return saved


def missing_policy(folder: str | Path) -> str:
    """What to say of a model that no policy was trained for: where one was looked for, and how to train one."""
    return (
        f"no policy was trained for the model {folder}: no policy.json is beside it, and the package has none for it "
        f"(it has {', '.join(_titles())}). Name another policy, or train one: jaxcompress train --model MODEL "
        "--data TEXTS --preset retention --out runs/heads, and then take --model runs/heads/model"
    )


def _shipped(norms: str) -> SavedPolicy | None:
    policies = (load_policy(folder) for folder in embedded.policy_folders())
    return next((saved for saved in policies if saved is not None and saved.settings.get(NORMS) == norms), None)


def _titles() -> list[str]:
    folders = embedded.policy_folders()
    return ["one for the embedded model", *(f"one for {folder.name}" for folder in folders[1:])]

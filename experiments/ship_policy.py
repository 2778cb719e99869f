"""Takes the learned policy of a run into the package, where `--policy learned` finds it by its model's norms.

    jaxcompress train --model smollm2 --preset retention --data mixture.jsonl --out runs/retention
    python experiments/ship_policy.py --run runs/retention --name SmolLM2-135M-Instruct

Weights are rounded to float16, which halves the file: scores rank tokens, and their order hardly changes. policy.json
keeps how it was trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from command import Command, arguments, stop

from jaxcompress import embedded
from jaxcompress.checkpoints import SavedPolicy, load_policy, save_policy
from jaxcompress.inputs.text import read_text

MOST_BYTES = 2_000_000
"""What a policy in the package may take."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Command):
    """Writes policy.json and policy.safetensors into a folder of the package."""

    run: Path = Path("runs/retention")
    """A folder that `jaxcompress train` wrote."""
    name: str = "model"
    """Of the model: the name of the folder, which messages tell."""
    into: Path = embedded.policies_folder()
    """Where the policies of the package lie."""


QUICK = Arguments(quick=True, run=embedded.decoder_folder(), into=Path("runs/quick/policies"))


def policy_of_run(run: Path) -> SavedPolicy:
    """The policy of a run, or of a model's folder."""
    folder = run / "model" if (run / "model").is_dir() else run
    saved = load_policy(folder) if folder.is_dir() else None
    if saved is None or not saved.weights or "norms" not in saved.settings:
        stop(f"{folder.absolute()} has no learned policy that names its model; jaxcompress train --preset writes one")
    record = run / "run.json"
    if not record.is_file():
        return saved
    run_of = json.loads(read_text(record))
    how = run_of["settings"]
    if (saved_at := run_of.get("saved", "no")) != (steps := how["steps"]):
        stop(
            f"{folder.absolute()} is the model of {saved_at} steps, and the run goes to {steps}: finish it first, "
            f"jaxcompress train --out {run} --resume"
        )
    own = "ratio" if saved.name == "dms" else "horizon"
    told = {name: how[name] for name in ("steps", "rows", "length", own, "learning_rate", "seed")}
    return saved._replace(settings={**saved.settings, "trained": told | dict(tokens_of_data=run_of["data"]["tokens"])})


def rounded(policy: SavedPolicy) -> SavedPolicy:
    """The policy with weights in float16. Ends the script if one is out of range."""
    half = {name: np.asarray(weight).astype(np.float16) for name, weight in policy.weights.items()}
    wrong = [name for name, weight in half.items() if not np.isfinite(weight).all()]
    if wrong:
        stop(f"the weights {', '.join(wrong)} are beyond float16")
    return policy._replace(weights=half)


def main() -> None:
    args = arguments(QUICK)
    policy = rounded(policy_of_run(args.run))
    if (size := sum(weight.nbytes for weight in policy.weights.values())) > MOST_BYTES:
        stop(f"the policy has {size:,} bytes, and {MOST_BYTES:,} at most may ship; train it with fewer hidden units")
    folder = args.into / args.name
    folder.mkdir(parents=True, exist_ok=True)
    save_policy(policy, folder)
    print(f"{policy.name}, {size:,} bytes, for the model with norms {policy.settings['norms']:.16}: {folder}")


if __name__ == "__main__":
    main()

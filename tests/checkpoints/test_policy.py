"""The policy beside a model's weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import tiny_decoder

from jaxcompress.checkpoints import SavedPolicy, load, load_policy, missing_policy, save, save_policy
from jaxcompress.embedded import decoder_folder, policies_folder
from jaxcompress.models.fingerprint import norms_fingerprint
from jaxcompress.policies import TOVA, Retention, protect
from jaxcompress.policies.forget_head import ForgetHead
from jaxcompress.training import init_retention


def test_a_policy_comes_back_with_the_model(tmp_path: Path) -> None:
    folder = save(tiny_decoder(), tmp_path / "model")
    assert load_policy(folder) is None
    assert load(folder).policy is None
    weights = {
        "gate": {"kernel": jnp.arange(6.0).reshape(2, 3).T, "half": jnp.ones(2, jnp.bfloat16)},
        "bias": np.ones(1),
    }
    save_policy(SavedPolicy("tova", {"slots": [4], "placement": None}, weights), folder)
    policy = load(folder).saved_policy
    assert policy is not None
    assert (policy.name, policy.settings) == ("tova", {"slots": [4], "placement": None})
    assert policy.weights.keys() == weights.keys()
    np.testing.assert_array_equal(policy.weights["gate"]["kernel"], weights["gate"]["kernel"])
    np.testing.assert_array_equal(policy.weights["gate"]["half"], weights["gate"]["half"])
    assert policy.weights["gate"]["half"].dtype == jnp.bfloat16
    save_policy(SavedPolicy("h2o", {}), folder)
    assert load_policy(folder) == ("h2o", {}, {})
    assert not list(folder.glob(".*"))


def test_a_policy_made_in_python_comes_back(tmp_path: Path) -> None:
    model = tiny_decoder()
    head = init_retention(model.config, jax.random.key(0))
    for policy in (Retention(head, "layer", recent=3), TOVA()):
        folder = save(model, tmp_path / policy.label)
        save_policy(policy, folder, model=model)
        loaded = load(folder)
        assert loaded.policy == policy
        assert loaded.saved_policy is not None
        assert loaded.saved_policy.settings["norms"] == norms_fingerprint(model)
    with pytest.raises(ValueError, match="cannot be saved: give a learned policy by itself"):
        save_policy(protect(Retention(head, "layer"), first=2), tmp_path)


def test_wrong_policies(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names without dots, not 'a\.b'"):
        save_policy(SavedPolicy("tova", {}, {"a.b": np.ones(1)}), tmp_path)
    assert load_policy(tmp_path) is None
    for content, says in {
        '{"slots": 3}': "needs the name of a policy under 'policy', not None",
        '{"policy": ["tova"]}': "needs the name of a policy",
        "[]": "must hold a JSON object",
        "{": "is not JSON",
        '{"a":' * 5000: "nested too deeply",
    }.items():
        (tmp_path / "policy.json").write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path}/policy.json .*{says}"):
            load_policy(tmp_path)
    (tmp_path / "policy.json").write_text('{"policy": "dms", "window": "wide"}')
    for names in (("a", "a.b"), ("a.b", "a")):
        save_file(dict.fromkeys(names, np.ones(1)), tmp_path / "policy.safetensors")
        with pytest.raises(ValueError, match="policy.safetensors cannot be read: 'a' is both"):
            load_policy(tmp_path)
    for content in (b"", b"\0" * 8, b"\xff" * 64):
        (tmp_path / "policy.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="policy.safetensors cannot be read"):
            load_policy(tmp_path)
    for weights in ({"a": np.ones(1)}, {name: {"x": np.ones(1)} for name in ForgetHead._fields}):
        save_policy(SavedPolicy("dms", {"window": "wide"}, weights), tmp_path)
        saved = load_policy(tmp_path)
        assert saved is not None
        with pytest.raises(ValueError, match="weights"):
            saved.make()


def test_policies_that_ship_are_small_and_say_for_which_model() -> None:
    folders = sorted(policies_folder().iterdir())
    assert [folder.name for folder in folders] == ["SmolLM2-135M-Instruct"]
    for folder in folders:
        saved = load_policy(folder)
        assert saved is not None
        assert saved.make().recent == saved.settings["recent"] == 32
        assert len(saved.settings["norms"]) == 64
        assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000


def test_a_policy_that_ships_is_found_by_the_norms_of_its_model(tmp_path: Path) -> None:
    """Whatever the precision of the other weights; a model that was trained further is another one."""
    embedded = load(decoder_folder())
    assert embedded.saved_policy is not None
    assert embedded.saved_policy.settings["norms"] == norms_fingerprint(embedded.model)
    of_norm = lambda path: "norm" in jax.tree_util.keystr(path)
    rounded = lambda path, x: x if of_norm(path) else jnp.round(x * 64) / 64
    copied = load(save(jax.tree_util.tree_map_with_path(rounded, embedded.model), tmp_path / "rounded"))
    assert copied.policy is not None
    assert copied.policy.name == "retention-layer"
    save_policy(SavedPolicy("full", {}), copied.folder)  # as of adapters that were trained with the full cache
    again = load(copied.folder).policy
    assert again is not None
    assert again.name == "retention-layer"
    other = load(save(jax.tree.map(lambda x: x * 1.01, embedded.model), tmp_path / "other"))
    assert other.policy is None
    save_policy(SavedPolicy("full", {}), other.folder)
    full = load(other.folder).policy
    assert full is not None
    assert full.name == "full"
    for said in ("no policy.json", "one for the embedded model, one for SmolLM2-135M-Instruct", "--preset retention"):
        assert said in missing_policy(other.folder)
    save_policy(embedded.saved_policy, other.folder)
    with pytest.raises(ValueError, match=r"other was trained for another model: .* put the policy of this model in"):
        _ = load(other.folder).policy

"""A policy of one's own: in a file, by name, and through everything that takes a policy."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_tokens, tiny_decoder

from jaxcompress.checkpoints._policy import SavedPolicy
from jaxcompress.evaluation.compare import compare, exams
from jaxcompress.evaluation.perplexity import perplexity
from jaxcompress.evaluation.tracing import trace
from jaxcompress.generation.generate import generate
from jaxcompress.policies import KNorm, Policy, every, get_policy, protect
from jaxcompress.training.data import Batch
from jaxcompress.training.objectives import bounded
from jaxcompress.training.trainer import init_train_state, make_step

QUIET = """
import jax.numpy as jnp
from jaxcompress.policies import Policy, policy


@policy
class Quiet(Policy):
    scope = "kv_head"

    def score(self, stats, held):
        return jnp.linalg.norm(held.values, axis=-1)
"""
MORE = """
from jaxcompress.policies import TOVA, Policy, policy, protect


@policy
class Near(Policy):
    reach: int
    kind: str = "a"

    def score(self, stats, held):
        return 1.0 * held.positions


@policy
class Labelled(Near):
    label = "far+{reach}"


class Plain(Policy):
    pass


careful = protect(TOVA(), first=4)
count = 3
"""
MODEL, SLOTS = tiny_decoder(), 6


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its path has what a name might stumble over."""
    folder = tmp_path_factory.mktemp("a+b(c), d-e:f") / "every4"
    folder.mkdir()
    (folder / "mine.py").write_text(QUIET)
    (folder / "more.py").write_text(MORE)
    return folder / "mine.py"


@pytest.fixture(scope="module")
def quiet(file: Path) -> Policy:
    return get_policy(f"{file}:Quiet")


class TestEverythingTakesIt:
    """The ten lines of the documents, unchanged."""

    tokens = random_tokens(2, 20)

    def test_perplexity_and_trace(self, quiet: Policy) -> None:
        """The loss is a loss, and in each head the last query sees a token in every slot, and itself."""
        assert 0 < perplexity(MODEL, self.tokens, quiet, SLOTS).nats < 30
        held = trace(MODEL, self.tokens, quiet, SLOTS, prompt=1)
        assert ((held.death == self.tokens.shape[1]).sum(-1) == SLOTS + 1).all()

    def test_compare(self, quiet: Policy) -> None:
        tasks = exams(self.tokens[0], None, context=16, seeds=1, rows=1, bos=None)
        (row,) = compare(MODEL, tasks, [every(quiet, 2)], [SLOTS])
        assert (row.policy, row.slots) == ("Quiet/every2", SLOTS)
        assert row.nats is not None

    @pytest.mark.slow
    def test_train(self, quiet: Policy) -> None:
        """A few steps through the state learn the batch."""
        batch = Batch(self.tokens[:, :17], np.ones((2, 16), np.float32))
        optimizer = optax.adam(3e-3)
        step = make_step(bounded(quiet, SLOTS, segment=8), optimizer)
        state, losses = init_train_state(jax.tree.map(jnp.copy, MODEL), optimizer), []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0]

    def test_generate(self, quiet: Policy) -> None:
        (written,) = generate(MODEL, [self.tokens[0, :9]], quiet, SLOTS, max_new_tokens=4)
        assert written.shape == (1, 4)


def test_names_of_policies_in_files(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = get_policy(f"{file}:Quiet")
    assert quiet == get_policy(f"{file}:Quiet")  # the file is run once
    assert quiet.scope == "kv_head"
    assert str(get_policy(f"{file}:Quiet/protect-first4/every16")) == "Quiet/protect-first4/every16"
    assert get_policy(f"{file}:Quiet/every16") == every(quiet, 16)
    monkeypatch.chdir(file.parent)
    assert str(get_policy("mine.py:Quiet")) == "Quiet"
    assert str(get_policy("mix(0.5*mine.py:Quiet,0.5*knorm)/every4")) == "mix(0.5*Quiet,0.5*knorm)/every4"
    assert get_policy("more.py:careful/every2") == every(protect(get_policy("tova"), first=4), 2)
    assert get_policy("more.py:Near-reach8").reach == 8  # pyright: ignore[reportAttributeAccessIssue]
    assert str(get_policy("more.py:far+8/every2")) == "far+8/every2"
    assert get_policy("jaxcompress.policies.geometry:knorm") == KNorm()


@pytest.mark.parametrize(("name", "says"), [
    ("none.py:Far", "there is no file none.py"),
    ("more.py:Far", r"more.py has no policy 'Far'; the policies in it: Near, far\+N, careful"),
    ("more.py:count", "more.py:count is no policy but 3; the policies in it: Near"),
    ("more.py:", "has no policy ''"),
    ("more.py:Near", "Near needs reach: write numbers as Near-reach8"),
    ("more.py:Labelled", r"more.py:Labelled goes by its label, far\+N"),
    ("more.py:Near-size3", "'Near-size3' has an unknown setting '-size3'; known after a dash: reachN"),
    ("more.py:Plain", "more.py:Plain is not decorated: write @policy in the line above `class Plain`"),
    ("more.py:Near-reach8/nonsense", "unknown modifier 'nonsense' of Near-reach8"),
    ("broken.py:Far", "broken.py cannot be run: NameError: name 'nothing' is not defined"),
    ("no.such.module:Far", "module 'no.such.module' cannot be imported: ModuleNotFoundError"),
])  # fmt: skip
def test_what_is_no_policy_of_a_file(name: str, says: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "broken.py").write_text("nothing")
    monkeypatch.chdir(file.parent)
    with pytest.raises(ValueError, match=says):
        get_policy(name)


def test_a_checkpoint_runs_no_file(file: Path) -> None:
    with pytest.raises(ValueError, match="does not run code"):
        SavedPolicy(f"{file}:Quiet", {}, {}).make()


def test_a_file_that_changed_is_run_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(QUIET)
    one = get_policy(f"{file}:Quiet")
    file.write_text(QUIET.replace('"kv_head"', '"layer"  '))  # as long, in the same second
    other = get_policy(f"{file}:Quiet")
    assert (one.scope, other.scope) == ("kv_head", "layer")

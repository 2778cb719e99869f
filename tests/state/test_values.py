"""Values: equal by type and content, arguments of compiled functions, printed as what makes them again."""

from __future__ import annotations

import gc
import weakref
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import policies
from jaxcompress.policies import H2O, TOVA, Policy, Retention, every, leaf, mix, per_layer, policy, protect
from jaxcompress.policies.forget_head import init_forget_head
from jaxcompress.policies.learned import LIKE_TOVA
from jaxcompress.policies.reductions.merge import merge_nearest
from jaxcompress.policies.reductions.reduced import with_reduce

HEAD = init_forget_head(jax.random.key(0), layers=1, kv_heads=2, head_dim=4, hidden=3, start=LIKE_TOVA)


@pytest.mark.parametrize(("one", "other"), [
    (H2O(1), H2O(1.0)), (H2O(0), H2O(0.0)), (protect(H2O(0), 2), protect(H2O(0.0), 2)),
    (mix((1.0, H2O(1)), (1.0, H2O(2))), mix((1.0, H2O(1.0)), (1.0, H2O(2)))), (TOVA(), H2O()),
    (per_layer(H2O(1)), per_layer(H2O(1.0))),
    (with_reduce(H2O(1), merge_nearest()), with_reduce(H2O(1.0), merge_nearest())),
    (policies.critical(TOVA(), 0), policies.critical(TOVA(), 0.0)),
], ids=lambda x: repr(x)[:30])  # fmt: skip
def test_an_int_is_not_a_float(one: Policy, other: Policy) -> None:
    assert one != other
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert len({one, other}) == 2


@pytest.mark.usefixtures("as_users_call_it")
def test_what_is_made_of_the_same_is_equal_and_compiled_once() -> None:
    count = []

    @jax.jit
    def run(policy: Policy, x: Any) -> Any:
        count.append(policy)
        return x + policy.needs

    for make in (
        lambda: every(H2O(3, "layer"), 2),
        lambda: every(H2O(recent=np.int64(3), scope="layer"), n=np.int32(2)),
    ):
        assert make() == make()
        assert run(make(), 1) == 6
    assert len(count) == 1


def test_weights_are_arguments() -> None:
    """Another head compiles nothing, and no weight is a constant of the program."""
    run = jax.jit(lambda policy, x: policy.head.inner.sum() + x)
    other = jax.tree.map(lambda x: x + 1, Retention(HEAD))
    run(Retention(HEAD), 1.0)
    run(other, 1.0)
    assert run._cache_size() == 1
    assert "dense<" not in run.lower(Retention(HEAD), 1.0).as_text().replace("dense<0", "")
    assert Retention(HEAD) == Retention(HEAD._replace(inner=HEAD.inner + 0)) != other
    with pytest.raises(TypeError, match="ordinary argument"):
        hash(Retention(HEAD))


def test_weights_are_let_go() -> None:
    """Nothing keeps what a policy was made of: not a cache of makers, not a compiled function."""
    head = jax.tree.map(lambda x: x + 1, HEAD)
    alive = weakref.ref(head.inner)
    wrapped = protect(Retention(head), first=1)
    jax.jit(lambda policy, x: policy.policy.head.inner.sum() + x)(wrapped, 1.0)
    del head, wrapped
    gc.collect()
    assert alive() is None


class TestMistakes:
    """Each says what was given and what was expected."""

    @pytest.mark.parametrize("scope", ["head", "heads", None])
    def test_scope(self, scope: Any) -> None:
        @policy
        class Mine(Policy):
            def score(self, stats: Any, held: Any) -> Any:
                return stats

        Mine.scope = scope
        with pytest.raises(ValueError, match="scope of policy Mine must be one of layer, kv_head"):
            Mine()

    @pytest.mark.parametrize(("make", "says"), [
        (lambda: policies.ExpectedAttention(scope="pool"), "scope of policy .* one of layer, kv_head, not 'pool'"),
        (lambda: policies.NACL(scope="pool"), "must be one of layer, kv_head, query_head, not 'pool'"),
        (lambda: policies.RKV(scope="query_head"), "must be one of layer, kv_head, not 'query_head'"),
        (lambda: policies.StreamingLLM(scope="pool"), "must be one of layer, kv_head, not 'pool'"),
        (lambda: policies.StreamingLLM(evict="never"), "evict of policy .* must be one of after, before, not 'never'"),
        (lambda: policies.SnapKV(pool="mean"), "pool of policy .* must be one of avg, max, not 'mean'"),
        (lambda: policies.pooled(TOVA(), pool="sum"), "must be one of avg, max, not 'sum'"),
    ])  # fmt: skip
    @pytest.mark.usefixtures("as_users_call_it")
    def test_one_of_a_few_words(self, make: Any, says: str) -> None:
        """A policy accepts what its own class declares, not whatever some policy knows."""
        with pytest.raises(ValueError, match=says):
            make()

    def test_hints_that_only_the_code_around_a_class_knows(self) -> None:
        """Such a class checks its settings itself."""
        Words = Literal["a", "b"]

        @policy
        class Mine(Policy):
            word: Words = "a"

        assert Mine("c").name == "Mine-c"  # type: ignore[arg-type]

    def test_a_list_is_no_setting(self) -> None:
        @policy
        class Mine(Policy):
            first: Any

        for given in ([1, 2], np.zeros(2), jnp.zeros(2)):
            with pytest.raises(TypeError, match=r"first is a setting.*leaf\(\)"):
                Mine(given)

    def test_a_leaf_may_be_anything(self) -> None:
        @policy
        class Mine(Policy):
            first: Any = leaf()

        assert Mine(np.zeros(2)) == Mine(np.zeros(2)) != Mine(np.ones(2))

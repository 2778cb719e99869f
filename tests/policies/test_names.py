"""Names: `get_policy` and `str` are inverse, and `repr` is Python that makes a policy again."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import policies
from jaxcompress.policies import (
    DMS,
    H2O,
    TOVA,
    Full,
    Policy,
    Retention,
    SnapKV,
    Window,
    dmc,
    get_policy,
    mix,
    per_layer,
    policy,
    protect,
    reductions,
    then,
    with_reduce,
)  # fmt: skip
from jaxcompress.policies.forget_head import init_forget_head
from jaxcompress.policies.gates import APART
from jaxcompress.policies.learned import LIKE_TOVA
from jaxcompress.policies.names import COMBINATORS, MODIFIERS, NAMES, POLICIES, REDUCTIONS
from jaxcompress.policies.reductions import merge_nearest

SPACE = vars(policies) | vars(reductions)
SCOPES = st.sampled_from(("layer", "kv_head", "query_head", "pool"))
COUNTS, SHARES = st.integers(0, 40), st.sampled_from((0, 1, 0.0, 0.25, 0.5, 1.0, 1e-5))
SETTINGS: dict[str, Any] = dict(
    scope=SCOPES, evict=st.sampled_from(("after", "before")), pool=st.sampled_from(("avg", "max")),
    cross=st.booleans(), covariance=st.booleans(), value_norm=st.booleans(), sketch=st.none() | COUNTS,
    recent=st.one_of(COUNTS, SHARES), threshold=st.sampled_from((-1.0, -0.5, 0.0, 0.5, 1)),
    **dict.fromkeys(("chance", "mix", "share", "floor", "epsilon", "old", "new"), SHARES),
)  # fmt: skip


def made(draw: Any, cls: Any, *parts: Any) -> Any:
    """A value of a class with some of its settings drawn; None where the class refuses them."""
    names = [name for name, field in cls.__dataclass_fields__.items() if not field.metadata.get("leaf")]
    chosen = [name for name in names if name in ("n", "keep") or draw(st.booleans())]
    drawn = {name: draw(SETTINGS.get(name, COUNTS)) for name in chosen}
    try:
        return cls(*parts, **drawn)
    except (ValueError, TypeError):
        return None


def chain(draw: Any) -> Policy:
    """A policy and what goes around it."""
    policy = made(draw, draw(st.sampled_from(POLICIES))) or TOVA()
    for around in draw(st.lists(st.sampled_from((*COMBINATORS, *REDUCTIONS)), max_size=4)):
        if around in COMBINATORS:
            policy = made(draw, around, policy) or policy
        elif (reduction := made(draw, around)) is not None:
            try:
                policy = with_reduce(policy, reduction)
            except ValueError:
                continue
    return policy


@settings(max_examples=40)
@given(draws=st.data())
def test_names_and_policies_are_inverse(draws: st.DataObject) -> None:
    """For every policy of the library that has no weights, alone, mixed, one after the other or layer by layer."""
    one, other = chain(draws.draw), chain(draws.draw)
    several: list[Policy] = [one, per_layer(one, one, other)]
    for make in (lambda: mix((0.7, one), (1e-5, other)), lambda: then(one, other)):
        try:
            several.append(make())
        except ValueError:
            continue
    for whole in several:
        name = str(whole)
        assert name == whole.name
        assert get_policy(name) == whole
        assert str(get_policy(name)) == name
        assert eval(repr(whole), dict(SPACE)) == whole


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_its_policy_s(name: str) -> None:
    name = name.replace("N", "8")
    assert str(get_policy(name)) == name
    assert hash(get_policy(name)) == hash(get_policy(name))


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_every_modifier_is_its_combinator_s(modifier: str) -> None:
    name = f"tova{'-pool' * (modifier == 'adaptive')}/{modifier.replace('N', '9')}"
    assert str(get_policy(name)) == name


@pytest.mark.parametrize(("policy", "name"), [
    (Full(), "full"), (Window(), "window"), (Window(4, "kv_head"), "window+4-kv_head"), (SnapKV(), "snapkv+32"),
    (H2O(1), "h2o-recent1"), (H2O(1.0), "h2o-recent1.0"), (protect(TOVA(), first=4), "tova/protect-first4"),
    (SnapKV(8, 7, "max", "layer"), "snapkv+8-kernel7-max-layer"), (per_layer(*[TOVA()] * 3), "per_layer(3*tova)"),
    (policies.LagKV(16, cross=True), "lagkv+16-cross"), (policies.ExpectedAttention(covariance=False),
    "expected_attention-no_covariance"), (with_reduce(TOVA(), merge_nearest(-0.5)), "tova/merge_nearest-threshold-0.5"),
], ids=str)  # fmt: skip
def test_how_settings_are_written(policy: Policy, name: str) -> None:
    assert str(policy) == name


@pytest.mark.parametrize(("name", "says"), [
    ("nonsense", "unknown policy 'nonsense'; known: full, window.*mix.*FILE.py:CLASS"),
    ("tova/nonsense3", "unknown modifier 'nonsense3' of tova; known: protect.*everyN"),
    ("snapkv", r"'snapkv' needs a number: snapkv\+N, where N is window"),
    ("tova/every", "'every' needs a number: everyN"),
    ("tova-layer", "'tova-layer' is written 'tova'"),
    ("snapkv+032", r"'snapkv\+032' is written 'snapkv\+32'"),
    ("h2o-layer-recent3", "is written 'h2o-recent3-layer'"),
    ("h2o-size3", "unknown setting '-size3'; known after a dash: recentN, layer"),
    ("per_layer(tova,tova)", r"is written 'per_layer\(2\*tova\)'"),
    ("per_layer(tova,window)/merge_nearest", r"is written 'per_layer\(tova/merge_nearest,window/merge_nearest\)'"),
    ("mix(tova,window)", r"a mix has parts like 0.7\*tova, not 'tova'"),
    ("mix(0.5*tova,0.5*window", "closing parenthesis"),
    ("then(tova)", "two policies"),
    ("h2o-recent1.5", "share in 0.0..1.0, not 1.5"),
    ("", "unknown policy ''"),
    ("learned/every2", r"saved with a model: give learned=load\(folder\).policy"),
])  # fmt: skip
def test_what_is_no_name(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        get_policy(name)


@pytest.mark.usefixtures("as_users_call_it")
def test_a_policy_is_no_name() -> None:
    with pytest.raises(TypeError, match=r"name of a policy is expected, such as 'tova', not TOVA\(\)"):
        get_policy(TOVA())  # type: ignore[arg-type]


def test_what_has_weights_appears_by_its_label() -> None:
    head = lambda start: init_forget_head(jax.random.key(0), layers=1, kv_heads=2, head_dim=4, hidden=3, start=start)
    retention = Retention(head(LIKE_TOVA), "layer")
    assert str(retention) == "retention-layer"
    assert str(DMS(head((5.0, 0.0)), 3, "pool")) == "dms-window3-pool"
    assert str(protect(dmc(head(APART)), recent=2)) == "tova-kv_head/dmc/protect-recent2"
    assert get_policy("learned/every4", retention) == policies.every(retention, 4)
    assert str(get_policy("learned/every4", retention)) == "retention-layer/every4"
    with pytest.raises(ValueError, match="unknown policy 'retention-layer'"):
        get_policy("retention-layer")


def test_a_policy_of_one_s_own_is_written_like_its_class() -> None:
    @policy
    class Far(Policy):
        reach: int = 4
        words: tuple[str, ...] = ()

        def score(self, stats: Any, held: Any) -> Any:
            return held.positions

    @policy
    class Mine(TOVA):
        """Another policy than its base has another name."""

    assert str(Far()) == "Far"
    assert str(Mine("kv_head")) == "Mine-kv_head"
    assert str(protect(Far(reach=8), first=1)) == "Far-reach8/protect-first1"
    assert str(Far(words=("a",))) == "Far-words=('a',)"

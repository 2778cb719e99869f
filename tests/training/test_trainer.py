"""The step and the loop, on a bigram model that compiles in no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_tokens, tiny_decoder

from jaxcompress.distributed import ShardingRules, collectives, make_mesh
from jaxcompress.training import metrics
from jaxcompress.training.checkpointing import Checkpoints
from jaxcompress.training.data import Batch, PackedRows, TokenStream, batches
from jaxcompress.training.loss import token_losses
from jaxcompress.training.metrics import MetricsFile
from jaxcompress.training.objectives import causal
from jaxcompress.training.optimizer import OPTIMIZERS, SCHEDULES, adamw_for_decoder
from jaxcompress.training.trainer import TrainState, fit, init_train_state, make_evaluate, make_measure, make_step

V = 11
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))


def mean_loss(params: Any, batch: Batch) -> jax.Array:
    losses = token_losses(params["table"][batch.tokens[:, :-1]], batch.tokens[:, 1:])
    return (losses * batch.weights).sum() / jnp.maximum(batch.weights.sum(), 1e-9)


BY_HAND = jax.jit(jax.value_and_grad(mean_loss))


def bigram(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Any, Any]:
    loss, gradient = BY_HAND(params, batch)
    return {"loss": loss, "drawn": jax.random.uniform(key)}, gradient


STEP = make_step(bigram, OPTIMIZER)


def fresh(optimizer: Any = OPTIMIZER) -> TrainState:
    return init_train_state({"table": jax.random.normal(jax.random.key(1), (V, V))}, optimizer)


def some_data(rows: int = 4, seed: int = 0) -> Any:
    ids = random_tokens(1000, vocabulary=V)
    return batches(PackedRows(TokenStream(ids, ids != 3, 0), 7), batch=rows, seed=seed)


def one_batch(rows: int = 6) -> Batch:
    weights = np.random.default_rng(0).uniform(size=(rows, 7)).astype(np.float32)
    weights[:2] = 0
    weights[3, 2:] = 0
    return Batch(random_tokens(rows, 8, vocabulary=V), weights)


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


class TestStep:
    """make_step"""

    def test_it_is_optax_by_hand(self) -> None:
        state, data = fresh(), some_data()
        params, optimizer_state = jax.tree.map(jnp.copy, (state.params, state.optimizer))
        for number in range(3):
            batch = next(data)
            loss, gradient = BY_HAND(params, batch)
            updates, optimizer_state = OPTIMIZER.update(gradient, optimizer_state, params)
            params = optax.apply_updates(params, updates)
            state, metrics = STEP(state, batch)
            assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
            assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
            assert float(metrics["parameter_norm"]) == pytest.approx(float(optax.tree.norm(params)), rel=1e-5)
            assert float(metrics["tokens"]) == batch.weights.sum()
            assert int(state.step) == number + 1
        np.testing.assert_allclose(state.params["table"], params["table"], atol=1e-5)

    @pytest.mark.parametrize("parts", [2, 3, 6])
    def test_microbatches_are_one_batch_whatever_their_weights(self, parts: int) -> None:
        """Of three parts the first has no weight at all."""
        sgd = optax.sgd(1.0)
        whole, told = make_step(bigram, sgd)(fresh(sgd), one_batch())
        summed, told_summed = make_step(bigram, sgd, accumulate=parts)(fresh(sgd), one_batch())
        for name in ("loss", "gradient_norm", "tokens"):
            assert float(told_summed[name]) == pytest.approx(float(told[name]), rel=1e-5)
        np.testing.assert_allclose(summed.params["table"], whole.params["table"], atol=1e-6)

    def test_rows_of_microbatches_stay_on_their_device(self) -> None:
        """Over two devices, which exchange sums alone, the step is that of one."""
        sgd, rules, batch = optax.sgd(1.0), ShardingRules(make_mesh("data=2")), one_batch(8)
        whole, told = make_step(bigram, sgd)(fresh(sgd), batch)
        step, state = make_step(bigram, sgd, accumulate=2, sharding=rules), rules.init(lambda: fresh(sgd))
        assert {one.kind for one in collectives(step.lower(state, batch).compile())} == {"all-reduce"}
        spread, told_spread = step(state, batch)
        assert float(told_spread["loss"]) == pytest.approx(float(told["loss"]), rel=1e-5)
        np.testing.assert_allclose(spread.params["table"], whole.params["table"], atol=1e-6)
        with pytest.raises(ValueError, match="batch of tokens, 1 in .*, cannot be spread over the 2 devices"):
            make_step(bigram, sgd, accumulate=8, sharding=rules)(rules.init(lambda: fresh(sgd)), batch)

    def test_rows_that_cannot_be_cut(self) -> None:
        with pytest.raises(ValueError, match="accumulate must be a whole number, at least 1, not 0"):
            make_step(bigram, OPTIMIZER, accumulate=0)
        with pytest.raises(ValueError, match="save_every must be a whole number, at least 1, not 0"):
            fit(fresh(), STEP, some_data(), steps=2, save_every=0)
        with pytest.raises(ValueError, match="6 rows cannot be cut into 4 microbatches"):
            make_step(bigram, OPTIMIZER, accumulate=4)(fresh(), one_batch())

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_master_weights_and_the_optimizer_are_float32(self, accumulate: int) -> None:
        seen = []

        def spy(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Any, Any]:
            metrics, gradient = bigram(params, batch, step, key)
            seen.extend([params["table"].dtype, gradient["table"].dtype])
            return metrics, gradient

        def update(gradient: Any, state: Any, params: Any = None) -> Any:
            seen.extend(x.dtype for x in jax.tree.leaves((gradient, params)))
            return jax.tree.map(lambda g: -1e-4 * g, gradient), state

        optimizer = optax.GradientTransformation(lambda params: (), update)
        before = fresh(optimizer)
        start = np.asarray(before.params["table"])
        step = make_step(spy, optimizer, accumulate=accumulate, compute_dtype=jnp.bfloat16)
        after, _ = step(before, one_batch())
        assert set(seen[:-2]) == {jnp.dtype(jnp.bfloat16)}
        assert seen[-2:] == [jnp.float32, jnp.float32]
        assert after.params["table"].dtype == jnp.float32
        moved = np.abs(np.asarray(after.params["table"]) - start)
        assert 0 < moved.max() < 1e-3  # less than bfloat16 would notice
        assert init_train_state({"x": jnp.ones(3, jnp.bfloat16)}, optimizer).params["x"].dtype == jnp.float32

    def test_the_state_is_donated_and_what_it_was_made_from_is_not(self) -> None:
        params = {"table": jnp.zeros((V, V))}
        state = init_train_state(params, OPTIMIZER)
        STEP(state, one_batch())
        assert state.params["table"].is_deleted()
        assert not params["table"].is_deleted()

    def test_every_step_and_microbatch_has_its_own_key(self) -> None:
        keys = set()
        for accumulate in (1, 2):
            step, state = make_step(bigram, OPTIMIZER, accumulate=accumulate), fresh()
            for _ in range(3):
                state, metrics = step(state, one_batch())
                keys.add(float(metrics["drawn"]))
        assert len(keys) == 6


class Stopped(Exception):
    """As good as a kill for what is in memory."""


def run(folder: Path, *, steps: int = 20, stop: int | None = None, rows: int = 4) -> TrainState:
    def maybe_stop(step: int, numbers: Any) -> None:
        if step == stop:
            raise Stopped

    data, state = some_data(rows), fresh()
    with Checkpoints(folder / "checkpoints") as checkpoints:
        done = checkpoints.latest or 0
        if done:
            state, where = checkpoints.restore(state)
            data.set_state(where)
        with MetricsFile(folder / "metrics.jsonl", after=done) as lines:
            return fit(
                state, STEP, data, steps=steps, checkpoints=checkpoints, save_every=4, log=(lines, maybe_stop)
            )  # fmt: skip


def curve(folder: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


class TestFit:
    """fit"""

    def test_it_learns_and_tells(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[Any] = []
        monkeypatch.setattr(metrics, "peak_flops", lambda: 1e9)
        monkeypatch.setattr(jax, "device_count", lambda: 64)  # the others do nothing
        log = [lambda step, numbers: told.append((step, numbers))]
        state = fit(fresh(), STEP, some_data(), steps=30, log=log, flops_per_token=1e6)
        assert int(state.step) == 30
        assert [step for step, _ in told] == list(range(1, 31))
        names = {"loss", "drawn", "tokens", "gradient_norm", "parameter_norm", "tokens_per_second", "mfu"}
        assert all(numbers.keys() == names for _, numbers in told)
        assert np.mean([n["loss"] for _, n in told[-5:]]) < np.mean([n["loss"] for _, n in told[:5]]) - 0.1
        assert told[0][1]["tokens_per_second"] is None
        assert told[-1][1]["tokens_per_second"] > 0
        assert told[-1][1]["mfu"] == pytest.approx(told[-1][1]["tokens_per_second"] * 1e6 / 1e9)

    def test_a_stopped_run_goes_on_bit_by_bit(self, tmp_path: Path) -> None:
        whole = run(tmp_path / "whole")
        for stop in (3, 9, 11, 18):  # before the first checkpoint; twice after the same one
            with pytest.raises(Stopped):
                run(tmp_path / "cut", stop=stop)
        resumed = run(tmp_path / "cut")
        assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
        assert [step for step, _, _ in curve(tmp_path / "cut")] == list(range(1, 21))
        for one, other in zip(leaves(resumed), leaves(whole), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_a_finished_run_stays_as_it_is(self, tmp_path: Path) -> None:
        first = leaves(run(tmp_path, steps=5))
        lines = (tmp_path / "metrics.jsonl").read_text()
        for one, other in zip(leaves(run(tmp_path, steps=5)), first, strict=True):
            np.testing.assert_array_equal(one, other)
        assert (tmp_path / "metrics.jsonl").read_text() == lines

    def test_data_that_ends_loses_no_step(self, tmp_path: Path) -> None:
        class Ends:
            """Six batches."""

            def __init__(self) -> None:
                self.left = 6

            def __next__(self) -> Batch:
                if not self.left:
                    raise StopIteration
                self.left -= 1
                return one_batch(4)

            def get_state(self) -> Any:
                return self.left

        told: list[int] = []
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(ValueError, match="the data ended after 6 of 9 steps; repeat it or ask for fewer"):
                fit(
                    fresh(), STEP, Ends(), steps=9, checkpoints=checkpoints, save_every=4,
                    log=[lambda step, numbers: told.append(step)],
                )  # fmt: skip
            assert (checkpoints.latest, told) == (6, [1, 2, 3, 4, 5, 6])
            state, left = checkpoints.restore(fresh())
            assert (int(state.step), left) == (6, 0)

    @pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
    def test_numbers_that_are_not_finite_stop_it(self, tmp_path: Path, what: str) -> None:
        def objective(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Any, Any]:
            metrics, gradient = bigram(params, batch, step, key)
            bad = jnp.where(step == 6, jnp.nan if what == "loss" else jnp.inf, 0.0)
            if what == "loss":
                return metrics | {"loss": metrics["loss"] + bad}, gradient
            return metrics, jax.tree.map(lambda g: g + bad, gradient) if what == "gradient" else gradient

        rate = (lambda step: jnp.where(step == 6, jnp.inf, 0.1)) if what == "weights" else 0.1
        optimizer, told = optax.sgd(rate), []
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(FloatingPointError) as caught:
                fit(
                    fresh(optimizer), make_step(objective, optimizer), some_data(), steps=20, checkpoints=checkpoints,
                    save_every=3, log=[lambda step, numbers: told.append(step)],
                )  # fmt: skip
            assert "step 7 is not finite: " in str(caught.value)
            assert f"the last good checkpoint is {tmp_path / '6'}" in str(caught.value)
            assert checkpoints.latest == 6
            state, _ = checkpoints.restore(fresh(optimizer))
            assert np.isfinite(state.params["table"]).all()
        assert told == [1, 2, 3, 4, 5, 6]

    def test_nothing_is_saved_when_the_step_of_a_checkpoint_fails(self, tmp_path: Path) -> None:
        def objective(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Any, Any]:
            metrics, gradient = bigram(params, batch, step, key)
            return metrics | {"loss": metrics["loss"] / (step < 1)}, gradient

        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(FloatingPointError, match="step 2 is not finite: loss inf.*there is no checkpoint yet"):
                fit(
                    fresh(),
                    make_step(objective, OPTIMIZER),
                    some_data(),
                    steps=2,
                    checkpoints=checkpoints,
                    save_every=2,
                )
            assert checkpoints.latest is None


def test_evaluation_weighs_tokens() -> None:
    state, parts = fresh(), [one_batch(), one_batch(6)._replace(weights=np.zeros((6, 7), np.float32)), one_batch()]
    parts[2].weights[4:] *= 5
    whole = Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    evaluate = make_evaluate(bigram)
    assert evaluate(state.params, parts) == pytest.approx(float(BY_HAND(state.params, whole)[0]), rel=1e-5)
    assert np.isnan(evaluate(state.params, []))


def test_what_is_measured_is_of_one_step() -> None:
    told = lambda params, batch, step, key: ({"step": step}, None)
    for how, step in ((dict(step=7), 7), ({}, 0)):
        assert make_measure(told, **how)({}, [one_batch()]) == {"step": step}


def test_a_decoder_learns_by_plain_attention() -> None:
    model = tiny_decoder()
    batch = Batch(random_tokens(2, 17), np.ones((2, 16), np.float32))
    optimizer = adamw_for_decoder(optax.constant_schedule(1e-2))
    step = make_step(causal(), optimizer)
    state, losses = init_train_state(model, optimizer), []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    inputs, targets = (jnp.asarray(part) for part in (batch.tokens[:, :-1], batch.tokens[:, 1:]))
    direct = jax.jit(lambda model: token_losses(model(inputs), targets).mean())(model)
    assert losses[0] == pytest.approx(float(direct), rel=1e-5)
    assert losses[-1] < losses[0] - 0.5


class TestRegistry:
    """Optimizers and schedules by name."""

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_schedules(self, name: str) -> None:
        schedule = SCHEDULES[name](2.0, 100, warmup=10)
        rates = np.array([float(schedule(step)) for step in range(100)])
        assert rates[0] == 0
        assert rates.max() == pytest.approx(2.0)
        assert (np.diff(rates[:10]) > 0).all()
        assert (np.diff(rates[11:]) <= 1e-6).all()
        assert float(SCHEDULES[name](2.0, 1, warmup=0)(0)) > 0

    def test_a_decay_that_warmup_leaves_few_steps(self) -> None:
        schedule = SCHEDULES["stable"](2.0, 100, warmup=90)
        np.testing.assert_allclose([schedule(step) for step in (45, 90, 95, 100)], [1, 2, 1, 0], atol=1e-6)

    def test_adamw_lets_norms_and_biases_be(self) -> None:
        weights = {"kernel": jnp.ones(3), "norm": {"scale": jnp.ones(3)}, "bias": jnp.ones(3)}
        optimizer = OPTIMIZERS["adamw"](optax.constant_schedule(0.1), clip=1.0, weight_decay=0.5)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
        np.testing.assert_allclose(updates["kernel"], -0.05)
        assert not updates["norm"]["scale"].any()
        assert not updates["bias"].any()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warmup_longer_than_the_run_is_cut(name: str) -> None:
    schedule = SCHEDULES[name](2.0, 10, warmup=100)
    assert max(float(schedule(step)) for step in range(10)) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="steps must be a whole number, at least 1, not 0"):
        SCHEDULES[name](2.0, 0)

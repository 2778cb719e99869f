"""Vision towers: PyTorch's numbers, pieces against the whole, and tokens that leave between layers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcompress.checkpoints import Loaded, load_tower
from jaxcompress.models.patches import Patches
from jaxcompress.models.tower_config import TowerConfig
from jaxcompress.models.vit import VisionTower
from jaxcompress.recurrence.inputs import AttentionInputs
from jaxcompress.recurrence.softmax import MASKED

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vision_models"
TOWERS = ("clip", "siglip", "vit", "deit_distilled")


@pytest.fixture(scope="module", params=TOWERS)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return load_tower(FIXTURES / request.param, dtype="float32")


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    return load_tower(FIXTURES / "vit", dtype="float32").model


@pytest.fixture(scope="module")
def pixels() -> jax.Array:
    return jnp.asarray(io("vit")["pixels"], jnp.float32)


@jax.jit
def embed(model: VisionTower, pixels: jax.Array) -> Patches:
    return model.embed(pixels)


@partial(jax.jit, static_argnames=("layers", "reduce", "proportional"))
def run(model: VisionTower, patches: Patches, **how: Any) -> tuple[Patches, AttentionInputs]:
    return model.run_layers(patches, **how)


@jax.jit
def out_of(model: VisionTower, patches: Patches) -> jax.Array:
    return model.logits(patches) if model.config.labels else model.pooled(patches)


def make(config: TowerConfig) -> VisionTower:
    """With random weights that nothing has to be compiled for."""
    rng = np.random.default_rng(0)
    empty = jax.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), empty)


rows = jax.jit(
    lambda attention: attention.rows(jnp.broadcast_to(jnp.arange(attention.bias.shape[1]), attention.bias.shape))
)


def io(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "io.npz") as file:
        return dict(file)


def test_every_layer_is_that_of_pytorch(loaded: Loaded) -> None:
    expected = io(loaded.folder.name)
    model = loaded.model
    patches = embed(model, jnp.asarray(expected["pixels"], jnp.float32))
    np.testing.assert_allclose(patches.hidden, expected["hidden"][0], atol=1e-5)
    for layer in range(model.config.num_layers):
        patches, attention = run(model, patches, layers=range(layer, layer + 1))
        np.testing.assert_allclose(patches.hidden, expected["hidden"][layer + 1], atol=3e-5)
        np.testing.assert_allclose(rows(attention), expected["attention"][layer], atol=1e-5)
    np.testing.assert_allclose(out_of(model, patches), expected["out"], atol=1e-4)


def test_the_whole_is_its_pieces(loaded: Loaded) -> None:
    model = loaded.model
    pixels = jnp.asarray(io(loaded.folder.name)["pixels"], jnp.float32)
    np.testing.assert_allclose(
        run(model, embed(model, pixels))[0].hidden, io(loaded.folder.name)["hidden"][-1], atol=3e-5
    )


@pytest.mark.slow
def test_a_batch_is_its_rows(tower: VisionTower, pixels: jax.Array) -> None:
    whole = jax.jit(lambda model, pixels: model.logits(model(pixels)))
    both = whole(tower, pixels)
    for row in range(2):
        np.testing.assert_allclose(whole(tower, pixels[row : row + 1]), both[row : row + 1], atol=1e-5)


def test_a_hook_that_changes_nothing_changes_nothing(tower: VisionTower, pixels: jax.Array) -> None:
    numbers = []

    def watch(patches: Patches, attention: AttentionInputs, layer: int) -> Patches:
        numbers.append(layer)
        assert attention.keys.shape == (2, 17, 2, 8)
        return patches

    patches, _ = run(tower, embed(tower, pixels), reduce=watch, proportional=True)
    assert numbers == [0, 1, 2]
    np.testing.assert_allclose(patches.hidden, run(tower, embed(tower, pixels))[0].hidden, atol=1e-5)


def test_a_hook_acts_between_attention_and_mlp(tower: VisionTower, pixels: jax.Array) -> None:
    """Dropping there equals dropping after the layer, since the MLP sees each token alone; before, it does not."""
    index = jnp.array([[0, 3, 4, 9], [0, 16, 2, 5]])
    start = embed(tower, pixels)
    within, attention = run(tower, start, layers=range(1), reduce=lambda patches, attention, layer: patches.take(index))
    after = run(tower, start, layers=range(1))[0].take(index)
    before = run(tower, start.take(index), layers=range(1))[0]
    assert attention.keys.shape[1] == 17
    np.testing.assert_allclose(within.hidden, after.hidden, atol=1e-6)
    assert jnp.abs(within.hidden - before.hidden).max() > 1e-2


def test_where_tokens_went(tower: VisionTower, pixels: jax.Array) -> None:
    first = embed(tower, pixels).take(jnp.array([[0, 5, 3, 8], [0, 1, 2, 3]]))
    second = first.take(jnp.array([[0, 3], [0, 1]]))
    group = np.full((2, 17), -1)
    group[0, [0, 8]] = group[1, [0, 1]] = [0, 1]
    np.testing.assert_array_equal(second.group, group)
    merged = first.become(first.hidden[:, :2], jnp.full((2, 2), 2.0), jnp.array([[0, 1, 1, -1], [0, 1, 1, 1]]))
    assert merged.group[0, 5] == merged.group[0, 3] == 1
    assert merged.group[0, 8] == -1
    np.testing.assert_array_equal(merged.group[1, :5], [0, 1, 1, 1, -1])


def test_a_token_of_size_0_is_not_there(tower: VisionTower, pixels: jax.Array) -> None:
    index = jnp.array([[0, 3, 4, 9]] * 2)
    start = embed(tower, pixels)
    size = start.size.at[:, :].set(0.0).at[:, index[0]].set(1.0)
    masked = run(tower, Patches(start.hidden, size, start.group))[0]
    gone = run(tower, start.take(index))[0]
    np.testing.assert_allclose(masked.hidden[:, index[0]], gone.hidden, atol=1e-5)
    attention = run(tower, Patches(start.hidden, size, start.group), layers=range(1))[1]
    assert attention.bias[0, 1] == MASKED
    assert (rows(attention)[..., 1] == 0).all()


@pytest.mark.slow
def test_a_token_of_size_3_is_attended_to_like_three(tower: VisionTower, pixels: jax.Array) -> None:
    start = embed(tower, pixels)
    thrice = start.take(jnp.arange(17)[None].repeat(2, 0))
    hidden = jnp.concatenate([start.hidden, start.hidden[:, 4:5], start.hidden[:, 4:5]], axis=1)
    thrice = Patches(hidden, jnp.ones((2, 19)), start.group)
    once = Patches(start.hidden, start.size.at[:, 4].set(3.0), start.group)
    one = run(tower, once, proportional=True)[0]
    np.testing.assert_allclose(one.hidden, run(tower, thrice)[0].hidden[:, :17], atol=1e-5)
    assert jnp.abs(run(tower, once)[0].hidden - one.hidden).max() > 1e-2


@pytest.mark.slow
def test_pooling_leaves_out_what_is_not_there() -> None:
    for pooling in ("attention", "mean"):
        config = TowerConfig(8, 12, 1, 2, 12, 4, special=0, pooling=pooling)
        model = make(config)
        start = embed(model, jax.random.normal(jax.random.key(0), (1, 3, 12, 12)))
        index = jnp.array([[1, 4, 7]])
        size = jnp.zeros((1, 9)).at[:, index[0]].set(1.0)
        masked = out_of(model, Patches(start.hidden * jnp.where(size > 0, 1.0, 7.0)[..., None], size, start.group))
        np.testing.assert_allclose(masked, out_of(model, start.take(index)), atol=1e-5)


@pytest.mark.slow
def test_an_image_that_patches_do_not_fill(pixels: jax.Array) -> None:
    """The strip at the end that is narrower than a patch is not seen, as with a convolution."""
    model = make(TowerConfig(8, 12, 1, 2, 30, 7))
    larger = jax.random.normal(jax.random.key(1), (1, 3, 30, 30))
    other = larger.at[:, :, 28:].set(0.0).at[:, :, :, 28:].set(0.0)
    np.testing.assert_array_equal(embed(model, larger).hidden, embed(model, other).hidden)
    assert model.config.num_patches == 16


@pytest.mark.slow
def test_bfloat16(pixels: jax.Array) -> None:
    model = load_tower(FIXTURES / "vit", dtype="bfloat16").model
    patches = run(model, embed(model, pixels))[0]
    assert patches.hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(out_of(model, patches), io("vit")["out"], atol=0.3)


@pytest.mark.slow
def test_gradients_are_finite(tower: VisionTower, pixels: jax.Array) -> None:
    grads = jax.jit(jax.grad(lambda model: model.logits(model(pixels)).sum()))(tower)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_wrong_input(tower: VisionTower, pixels: jax.Array) -> None:
    with pytest.raises(ValueError, match=r"images of \[3, 28, 28\], not \[3, 32, 32\]"):
        tower.embed(jnp.zeros((1, 3, 32, 32)))
    with pytest.raises(ValueError, match=r"layers 0 to 2"):
        tower.run_layers(embed(tower, pixels), range(2, 4))
    with pytest.raises(ValueError, match="layers 0 to 2"):
        tower.run_layers(embed(tower, pixels), range(0))
    with pytest.raises(ValueError, match="no classifier"):
        make(TowerConfig(8, 12, 1, 2, 12, 4)).logits(embed(tower, pixels))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        TowerConfig(10, 12, 1, 3, 12, 4)
    with pytest.raises(ValueError, match="does not fit"):
        TowerConfig(8, 12, 1, 2, 12, 14)
    with pytest.raises(ValueError, match="special is 0"):
        TowerConfig(8, 12, 1, 2, 12, 4, special=0)
    with pytest.raises(ValueError, match="0 to 2 special tokens .* not 3"):
        TowerConfig(8, 12, 1, 2, 12, 4, special=3)


def test_words_that_mean_nothing(as_users_call_it: None) -> None:
    wrong: Any
    for wrong in (dict(pooling="cls"), dict(activation="relu")):
        (name, word), *_ = wrong.items()
        with pytest.raises(ValueError, match=f"{name} must be one of .*, not '{word}'"):
            TowerConfig(8, 12, 1, 2, 12, 4, **wrong)

import jax
import jax.numpy as jnp
import pytest
from networks import randomised
from tiny_networks import DIT

from diffjax.diffusion.losses import BatchLoss
from diffjax.models.dit import DiT
from diffjax.nn.conditioning import Cond
from diffjax.training.diagnosis import diagnose

NET = DiT(**{**DIT, "depth": 3})
X = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
LEVEL = jnp.array([3.0, -1.0, 0.5])
COND = Cond(label=jnp.array([0, 1, 2]))
PARAMS = randomised(NET, X, LEVEL, COND)


def draw(batch, key):
    return batch["image"] / batch["scale"], key


def loss(params, examples, key):
    output = NET.apply({"params": params}, examples, LEVEL, COND)
    each = jnp.square(output).mean((1, 2, 3))
    return BatchLoss(each, each, each, each)


def found(params=PARAMS, image=X, scale=1.0, loss_fn=loss):
    batch = {"image": image, "scale": jnp.asarray(scale)}
    return diagnose(loss_fn, params, batch, draw, jax.random.key(1))


def spoilt(name, change):
    """The parameters with one of them changed; which one is told by the end of its path."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]
    chosen = [path for path in paths if jax.tree_util.keystr(path, simple=True, separator="/").endswith(name)]
    assert len(chosen) == 1, paths
    return jax.tree_util.tree_map_with_path(lambda p, leaf: change(leaf) if p == chosen[0] else leaf, PARAMS)


def test_where_all_is_finite_nothing_is_found():
    assert found() == ("", [])


def test_the_batch_and_what_is_drawn_for_it_come_first():
    assert found(image=X.at[1, 2, 3, 0].set(jnp.nan)) == ("the batch's image", [])
    assert found(scale=0.0).where.startswith("what was drawn")


def test_a_parameter_is_named():
    params = spoilt("patch_out/kernel", lambda leaf: leaf.at[0, 0].set(jnp.inf))
    assert found(params).where == "the parameter patch_out/kernel"


def test_the_first_layer_is_named_also_within_a_loop_over_layers():
    # The products of the second block's kernel are beyond float32. So are those of the third: it comes later.
    params = spoilt("blocks/mlp/out/kernel", lambda leaf: leaf.at[1:].set(3e38))
    assert found(params) == ("the output of blocks/mlp/out (Dense)", [0, 1, 2])


def test_a_layer_whose_input_overflows_is_named_and_not_the_one_before():
    params = spoilt("blocks/mlp/out/kernel", lambda leaf: leaf.at[1].multiply(1e38))
    assert found(params).where == "the output of blocks/norm_attention (LayerNorm)"  # its variance


def test_the_examples_whose_loss_is_not_finite_are_told():
    def loss_fn(params, examples, key):
        losses = loss(params, examples, key)
        return losses._replace(objective=losses.objective / jnp.array([1.0, 0.0, 2.0]))

    assert found(loss_fn=loss_fn) == ("the loss", [1])


def test_a_gradient_is_named_where_the_loss_is_finite():
    def loss_fn(params, examples, key):
        losses = loss(params, examples, key)
        kernel = params["patch_out"]["kernel"]
        return losses._replace(
            objective=losses.objective + jnp.sqrt(jnp.abs(kernel - kernel[0, 0]).sum() * 0)
        )

    assert found(loss_fn=loss_fn).where == "the gradient of patch_out/kernel"


@pytest.mark.parametrize("error", [NotImplementedError, TypeError])
def test_a_layer_that_only_runs_compiled_does_not_end_the_report(error):
    def loss_fn(params, examples, key):
        if not isinstance(params["patch_out"]["kernel"], jax.core.Tracer):
            raise error
        losses = loss(params, examples, key)
        return losses._replace(objective=losses.objective * jnp.nan)

    assert "could not be found" in found(loss_fn=loss_fn).where

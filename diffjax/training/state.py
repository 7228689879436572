"""Everything a training run changes, as one pytree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.diffusion.resampling import LossHistory

Params = Any


class TrainState(NamedTuple):
    """The state of a run after `step` updates.

    Attributes:
      step: number of updates made, int32 scalar.
      params: the parameters, float32.
      ema_params: their exponential moving average, which sampling uses.
      opt_state: the optimizer's memory.
      history: the losses at each time, where times are drawn by them; otherwise None.
    """

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    history: LossHistory | None = None


def create_state(
    params: Params, optimizer: optax.GradientTransformation, history: LossHistory | None = None
) -> TrainState:
    """The state before the first update; the average starts at the parameters."""
    # Copies, because the step donates the state and no buffer may be donated twice.
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params), history)


def init_sharded(
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
    param_shardings: Any,
    history: LossHistory | None = None,
    params: Params | None = None,
) -> TrainState:
    """Initialise each shard of the state on its own device; the whole state never exists in one place.

    Args:
      init_params: makes the parameters.
      optimizer: the optimizer.
      key: for `init_params`.
      mesh: the mesh.
      param_shardings: placements of the parameters.
      history: see `TrainState`.
      params: parameters to start from, where they are not to be made; they are donated.
    """
    if params is not None:
        start = lambda params: create_state(params, optimizer, history)  # noqa: E731
        shardings = state_shardings(jax.eval_shape(start, params), optimizer, mesh, param_shardings)
        return jax.jit(start, out_shardings=shardings, donate_argnums=0)(params)

    def init(key: jax.Array) -> TrainState:
        return create_state(init_params(key), optimizer, history)

    shardings = state_shardings(jax.eval_shape(init, key), optimizer, mesh, param_shardings)
    return jax.jit(init, out_shardings=shardings)(key)


def state_shardings(
    shapes: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh, param_shardings: Any
) -> TrainState:
    """Placements of a state: what has a parameter's shape lies where the parameter does."""
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        # Adafactor's second moments are rows and columns, small enough for every device.
        lambda leaf, sharding, param: sharding if leaf.shape == param.shape else replicated,
        shapes.opt_state,
        param_shardings,
        shapes.params,
        transform_non_params=lambda _: replicated,
    )
    history = jax.tree.map(lambda _: replicated, shapes.history)
    return TrainState(replicated, param_shardings, param_shardings, opt_state, history)


def count_params(params: Params) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))

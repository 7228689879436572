"""Everything a training run changes, as one pytree."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.diffusion.resampling import LossHistory
from diffjax.errors import UserError
from diffjax.training.moments import is_blocks

Params = Any

HOST = "pinned_host"  # JAX's name of the host's memory that devices read and write by themselves


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
    *,
    offload: bool = False,
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
      offload: see `state_shardings`.

    Raises:
      UserError: see `state_shardings`.
    """
    places = functools.partial(
        state_shardings, optimizer=optimizer, mesh=mesh, param_shardings=param_shardings, offload=offload
    )
    if params is not None:
        start = lambda params: create_state(params, optimizer, history)  # noqa: E731
        shardings = places(jax.eval_shape(start, params))
        return jax.jit(start, out_shardings=shardings, donate_argnums=0)(params)

    def init(key: jax.Array) -> TrainState:
        return create_state(init_params(key), optimizer, history)

    return jax.jit(init, out_shardings=places(jax.eval_shape(init, key)))(key)


def state_shardings(
    shapes: TrainState,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    param_shardings: Any,
    *,
    offload: bool = False,
) -> TrainState:
    """Placements of a state: what has a parameter's shape lies where the parameter does.

    So does what has fewer values on each axis, such as the scales of blocks, if it divides.

    Args:
      shapes: the state, or its shapes.
      optimizer: the optimizer.
      mesh: the mesh.
      param_shardings: placements of the parameters.
      offload: whether the optimizer's memory lies in the host's, and comes to the devices for the update.

    Raises:
      UserError: these devices cannot reach the host's memory.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    if offload:
        _check_host_memory(mesh)

    def place(leaf: Any, sharding: NamedSharding, param: Any) -> Any:
        def one(array: Any) -> NamedSharding:
            # Adafactor's second moments are rows and columns, small enough for every device.
            alike = array.ndim == param.ndim and _divides(array.shape, sharding)
            found = sharding if alike else replicated
            return found.with_memory_kind(HOST) if offload else found

        return jax.tree.map(one, leaf)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        place,
        shapes.opt_state,
        param_shardings,
        shapes.params,
        transform_non_params=lambda _: replicated,
        is_leaf=is_blocks,
    )
    history = jax.tree.map(lambda _: replicated, shapes.history)
    return TrainState(replicated, param_shardings, param_shardings, opt_state, history)


def offloaded(shardings: Any) -> bool:
    """Whether any of these placements is in the host's memory."""
    return any(place.memory_kind == HOST for place in jax.tree.leaves(shardings))


def on_device(shardings: Any) -> Any:
    """The same placements in the devices' own memory."""
    return jax.tree.map(lambda place: place.with_memory_kind("device"), shardings)


def _check_host_memory(mesh: Mesh) -> None:
    device = mesh.devices.flat[0]
    if HOST not in (memory.kind for memory in device.addressable_memories()):
        raise UserError(
            f"optimizer.offload needs memory of the host that devices can reach, which {device.device_kind} "
            "has none of here; set optimizer.offload=False."
        )


def _divides(shape: tuple[int, ...], sharding: NamedSharding) -> bool:
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def count_params(params: Params) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))

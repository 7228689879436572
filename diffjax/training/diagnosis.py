"""Where in a network numbers first stop being finite."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffjax.diffusion.losses import BatchLoss
from diffjax.parallel import hosts


class Diagnosis(NamedTuple):
    """What was found.

    Attributes:
      where: the first thing that is not finite, in words; "" if all is finite.
      rows: those of the batch whose loss is not finite.
    """

    where: str
    rows: list[int]


class _Found(Exception):
    """A layer gave what is not finite."""


def diagnose(
    loss_fn: Callable[[Any, Any, jax.Array], BatchLoss],
    params: Any,
    batch: Mapping[str, jax.Array],
    draw_fn: Callable[[Mapping[str, jax.Array], jax.Array], tuple[Any, jax.Array]],
    key: jax.Array,
) -> Diagnosis:
    """Repeat an update's forward and backward pass, and name the first thing in it that is not finite.

    In the order in which an update would meet them: the batch, the parameters, what was drawn, each layer's
    output (layer by layer, not compiled: slow), the loss, each parameter's gradient.

    Args:
      loss_fn: the loss of examples, see `diffjax.training.step.LossFn`.
      params: the parameters before the update.
      batch: its batch.
      draw_fn: `(batch, key) -> (examples, dropout key)`.
      key: the update's own, with which it drew.
    """
    if name := _first_bad(batch):
        return Diagnosis(f"the batch's {name}", [])
    if name := _first_bad(params):
        return Diagnosis(f"the parameter {name}", [])
    examples, dropout_key = jax.jit(draw_fn)(batch, key)
    if name := _first_bad(examples):
        return Diagnosis(f"what was drawn for the batch: {name}", [])
    losses = jax.jit(loss_fn)(params, examples, dropout_key).objective
    rows = np.flatnonzero(~np.isfinite(hosts.gather(losses))).tolist()
    where = ""
    if rows:
        where = _first_bad_layer(loss_fn, params, examples, dropout_key) or "the loss"
    elif name := _first_bad(jax.jit(jax.grad(_mean(loss_fn)))(params, examples, dropout_key)):
        where = f"the gradient of {name}"
    return Diagnosis(where, rows)


def _mean(loss_fn: Callable[..., BatchLoss]) -> Callable[..., jax.Array]:
    return lambda *args: jnp.mean(loss_fn(*args).objective)


def _first_bad_layer(loss_fn: Callable[..., BatchLoss], *args: Any) -> str:
    def look(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = call(*args, **kwargs)
        if context.method_name == "__call__" and _first_bad(output) is not None:
            module = context.module
            raise _Found(f"the output of {'/'.join(module.path) or 'the network'} ({type(module).__name__})")
        return output

    try:
        # Without compilation loops over layers are loops of Python, and arrays have values to look at.
        with jax.disable_jit(), nn.intercept_methods(look):
            loss_fn(*args)
    except _Found as found:
        return str(found)
    except Exception as error:  # some kernels only run compiled; the rest of the report is worth having
        return f"a layer (which could not be found: {type(error).__name__})"
    return ""


def _first_bad(tree: Any) -> str | None:
    """The path of the first array of a tree that is not finite; None if there is none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        numbers = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        if isinstance(leaf, jax.core.Tracer):  # Flax looks at the body of a loop once before it runs it
            continue
        if numbers and not bool(jnp.isfinite(leaf).all()):
            return jax.tree_util.keystr(path, simple=True, separator="/") or "values"
    return None

"""The optimizer and its learning-rate schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffjax.training import skipping
from diffjax.training.moments import CODECS, scale_by_adam
from diffjax.training.skipping import Skipping


def learning_rate_schedule(
    *,
    peak: float,
    steps: int,
    warmup_steps: int,
    decay: str = "cosine",
    final_fraction: float = 0.0,
    decay_from: int = 0,
) -> optax.Schedule:
    """Linear warm-up to `peak`, then constant, cosine decay, or decay by the inverse square root of the step.

    Args:
      peak: the highest learning rate.
      steps: length of the whole run.
      warmup_steps: updates until `peak` is reached.
      decay: "constant", "cosine" or "inverse_sqrt" (EDM2: `peak / sqrt(max(step / decay_from, 1))`).
      final_fraction: where the cosine ends, as a fraction of `peak`.
      decay_from: the step where the inverse square root begins to fall; at least `warmup_steps`.
    """
    if decay not in ("constant", "cosine", "inverse_sqrt"):
        raise ValueError(f"decay is {decay!r}; expected 'constant', 'cosine' or 'inverse_sqrt'")
    warmup_steps = min(warmup_steps, max(steps - 1, 0))
    if decay == "constant":
        after = optax.constant_schedule(peak)
    elif decay == "inverse_sqrt":
        reference = max(decay_from, warmup_steps, 1)
        # `after` counts from the end of the warm-up.
        after = lambda count: peak * jnp.sqrt(reference / jnp.maximum(count + warmup_steps, reference))  # noqa: E731
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1), final_fraction)
    # Starting at peak / warmup_steps rather than at zero, so that no update is wasted.
    warmup = optax.linear_schedule(peak / max(warmup_steps, 1), peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def kernels(params: Any) -> Any:
    """Which parameters weight decay takes hold of: a tree of bool, True for the kernels of layers.

    Biases, scales, tables of embeddings and of (possibly fixed) positions are left alone.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    moments: str = "float32",
) -> Skipping:
    """AdamW (Loshchilov and Hutter, 2019) behind clipping by the global norm; `clip_norm` 0 is none.

    Weights decay as `kernels` says. Moments may take fewer bits, see `diffjax.training.moments`.

    Raises:
      ValueError: there are no moments of this name.
    """
    if moments == "float32":
        adam: optax.GradientTransformation = skipping.scale_by_adam(b1=b1, b2=b2)
    elif moments in CODECS:
        adam = scale_by_adam(b1=b1, b2=b2, moments=moments)
    else:
        raise ValueError(f"moments is {moments!r}; expected 'float32', 'bfloat16' or 'int8'")
    decay = optax.add_decayed_weights(weight_decay, kernels)
    return _clipped(skipping.chain(adam, decay, optax.scale_by_learning_rate(learning_rate)), clip_norm)


def adafactor(
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    moments: str = "float32",
) -> Skipping:
    """Adafactor (Shazeer and Stern, 2018), whose second moments take a row and a column of each matrix.

    With momentum `b1`, which takes as much memory as Adam's first moment; 0 is none. `b2` is not used: the
    decay of the second moments rises with the steps.

    Raises:
      ValueError: moments of fewer bits are asked for.
    """
    del b2
    if moments != "float32":
        raise ValueError(f"moments is {moments!r}, but those of Adafactor are float32; expected 'float32'")
    factored = optax.adafactor(
        learning_rate,
        momentum=b1 or None,
        weight_decay_rate=weight_decay or None,
        weight_decay_mask=kernels,
        multiply_by_parameter_scale=False,
    )
    return _clipped(factored, clip_norm)


def _clipped(optimizer: optax.GradientTransformation, clip_norm: float) -> Skipping:
    """Behind clipping by one factor; `optax.clip_by_global_norm` divides each gradient by itself."""
    if not clip_norm:
        return skipping.skipping(optimizer)

    def clip(grads: Any, params: Any = None) -> Any:
        return optax.tree.scale(jnp.minimum(1.0, clip_norm / optax.tree.norm(grads)), grads)

    return skipping.chain(optax.stateless(clip), optimizer)


OPTIMIZERS = {"adamw": adamw, "adafactor": adafactor}

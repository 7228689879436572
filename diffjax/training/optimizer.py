"""The optimizer and its learning-rate schedule."""

import optax


def learning_rate_schedule(
    *, peak: float, steps: int, warmup_steps: int, decay: str = "cosine", final_fraction: float = 0.0
) -> optax.Schedule:
    """Linear warm-up to `peak`, then constant or cosine decay.

    Args:
      peak: the highest learning rate.
      steps: length of the whole run.
      warmup_steps: updates until `peak` is reached.
      decay: "constant" or "cosine".
      final_fraction: where the cosine ends, as a fraction of `peak`.
    """
    if decay not in ("constant", "cosine"):
        raise ValueError(f"decay is {decay!r}; expected 'constant' or 'cosine'")
    warmup_steps = min(warmup_steps, max(steps - 1, 0))
    if decay == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(steps - warmup_steps, 1), final_fraction)
    # Starting at peak / warmup_steps rather than at zero, so that no update is wasted.
    warmup = optax.linear_schedule(peak / max(warmup_steps, 1), peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [warmup_steps])


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) behind clipping by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay),
    )

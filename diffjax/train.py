"""Mode `train`: one stage, from its configuration to its last checkpoint.

`train` is a whole run. What it needs comes from `diffjax.run`; `make_steps` is what is done at every step,
and `recover` takes the run back to a checkpoint where its numbers went wrong.
"""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from diffjax import recovery
from diffjax import stage as stages
from diffjax import workdir as workdirs
from diffjax.errors import UserError
from diffjax.feed import AHEAD
from diffjax.parallel import hosts
from diffjax.parallel.rules import on_mesh
from diffjax.preview import show_preview
from diffjax.run import Run, prepare
from diffjax.training.diagnosis import diagnose
from diffjax.training.interrupt import Interrupt, Interrupted
from diffjax.training.metrics import MetricsWriter, NoMetrics
from diffjax.training.progress import TrainingProgress
from diffjax.training.watch import Trouble, Watchdog

# After how many seconds a checkpoint that could not be written is tried again.
RETRY_SECONDS = 60.0


def train(config: ConfigDict, workdir: Path, *, label: str = "train") -> None:
    """Train a stage, or go on with one that was interrupted.

    Args:
      config: a stage's configuration, see `diffjax.config.stage_config`.
      workdir: receives the configuration, checkpoints, metrics and previews.
      label: what the run is called in messages.

    Raises:
      UserError: the configuration, the data or the working directory is not usable, or the loss stopped being
        a number.
      Interrupted: SIGINT or SIGTERM came; the run can be resumed.
    """
    hold = workdirs.hold(workdir, first=hosts.is_first())
    with hold, Interrupt() as interrupt, contextlib.ExitStack() as starting:
        again = f"{label}: stopped before its first step; run the same command to go on."
        try:
            if not hosts.name():  # several processes leave together, at a step
                starting.enter_context(interrupt.at_once(again))
            run = prepare(config, workdir, label, interrupt)
            if run is None:
                return
            with contextlib.closing(run), Watchdog(60.0 * config.recovery.hang_minutes) as watchdog:
                while trouble := make_steps(run, interrupt, watchdog, started=starting.close):
                    recover(run, trouble)
        except KeyboardInterrupt:
            if not interrupt.requested:
                raise
            raise Interrupted(f"{interrupt.requested}: {again}") from None
        if interrupt.requested:
            raise Interrupted(f"{label}: {interrupt.requested} at the end; it is trained and saved.")


def make_steps(
    run: Run, interrupt: Interrupt, watchdog: Watchdog, *, started: Callable[[], None]
) -> Trouble | None:
    """Train from `run.state` to the end, or until its numbers go wrong; then `run.state` is that of then.

    Args:
      run: the run.
      interrupt: whether signals ask it to stop.
      watchdog: hears of every step.
      started: called when the first update has been compiled and begun.

    Raises:
      Interrupted: a signal came; the state is saved.
    """
    config, label, checkpoints = run.config, run.label, run.checkpoints
    state, run.state = run.state, None  # its buffers are donated
    assert state is not None
    progress = TrainingProgress(label, start=run.first, steps=config.steps, batch_size=config.batch_size)
    writer = MetricsWriter(run.workdir, start_step=run.first) if hosts.is_first() else NoMetrics()
    unread = run.unread
    agree = hosts.SharedFlags()
    saved_at = time.monotonic()

    def trouble_of_all_but(leave: int) -> Trouble | None:
        found = (run.watch.see(*seen) for seen in unread.see(leave=leave))
        return next((trouble for trouble in found if trouble), None)

    with contextlib.closing(writer), progress, on_mesh(run.mesh, config.attention):
        # The order of these five things is part of what a resumed run repeats: do not change it.
        for step in itertools.count(run.first):
            last = step == config.steps
            if config.preview.every and step > run.first and (last or step % config.preview.every == 0):
                show_preview(run.preview(state.ema_params), step, run.workdir, writer)
            if run.evaluate and step > run.first and (last or step % config.eval.every == 0):
                writer.scalars(step, run.evaluate(state.ema_params))
            since = time.monotonic() - saved_at
            late = checkpoints.failed and since > RETRY_SECONDS
            late |= 0.0 < 60.0 * config.checkpoint.minutes < since
            stop, late = agree(bool(interrupt.requested), late)
            due = step > run.first and (late or last or step % config.checkpoint.every == 0)
            if due or stop:
                # A checkpoint is good only if all was well up to it.
                if trouble := trouble_of_all_but(0):
                    run.state = state
                    return trouble
                checkpoints.save(state, run.get_state(), loss=run.watch.mean())
                saved_at = time.monotonic()
            if last or stop:
                checkpoints.wait()
            if last:
                break
            if stop:
                signal = interrupt.requested or "a signal to another process"
                raise Interrupted(
                    f"{label}: {signal} at step {step:,}; saved. Run the same command to go on."
                )
            batch = run.feed.take(state.step, step + 1)
            state, metrics = run.update(state, batch, run.key)
            started()
            unread.add(step + 1, metrics)
            if trouble := trouble_of_all_but(AHEAD):
                run.state = state
                return trouble
            watchdog.well()
            progress.advance(step + 1)
            if (step + 1) % config.log_every == 0:
                means = unread.read(leave=1)  # this step is still running; its metrics come next time
                if step > run.first:
                    speed = progress.report(step + 1, means, waited=run.feed.waited())
                    writer.scalars(
                        step + 1,
                        {**means, **speed, "skipped": run.watch.skipped, "rejected": len(run.rejects)},
                    )
    skipped = f" {run.watch.skipped:,} updates were not finite, and left out." if run.watch.skipped else ""
    progress.say(f"{label}: {config.steps:,} steps in {progress.elapsed()}; saved in {run.workdir}.{skipped}")
    return None


def recover(run: Run, trouble: Trouble) -> None:
    """Take the run back to its newest checkpoint of before the trouble.

    Raises:
      UserError: it has gone back too often, or there is no such checkpoint.
    """
    times = len(recovery.rollbacks(run.workdir))
    with contextlib.suppress(UserError):  # a save that failed, which was said: there are older ones
        run.checkpoints.wait()
    good = max((step for step in run.checkpoints.steps() if step < trouble.first), default=None)
    if good is None or times >= run.config.recovery.max_rollbacks:
        taken = run.feed.taken(trouble.first)
        diagnosis = None if trouble.finite else look_again(run, trouble)
        told = recovery.report(
            trouble, taken, diagnosis, run.source, workdir=run.workdir, times=times, good=good
        )
        raise UserError(f"{run.label}: {told}")
    run.state = None  # before another one takes as much memory
    run.state, saved, run.first = recovery.go_back(
        trouble,
        workdir=run.workdir,
        checkpoints=run.checkpoints,
        feed=run.feed,
        abstract=run.abstract,
        say=functools.partial(print, flush=True),
    )
    run.set_state(saved)


def look_again(run: Run, trouble: Trouble) -> Any:
    """Find what of the first update that was left out is not finite; the parameters are those of then."""
    state, stage = run.state, run.model.stage
    assert state is not None
    step = jax.numpy.full_like(state.step, trouble.first - 1)
    run.feed.go_to(run.feed.taken(trouble.first).before)
    with on_mesh(run.mesh, run.config.attention):
        return diagnose(
            functools.partial(stages.loss, stage),
            state.params,
            run.feed.take(step, trouble.first),
            lambda batch, key: stages.draw(stage, batch, key, state.history),
            jax.random.fold_in(run.key, step),
        )

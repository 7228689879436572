"""Mode `train`: one stage, from its configuration to its last checkpoint.

`train` below is a whole run, in order. What is done every step is the loop at its end.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax import config as configs
from diffjax import run_config
from diffjax import stage as stages
from diffjax import workdir as workdirs
from diffjax.data.prefetch import Prefetch
from diffjax.data.source import Source
from diffjax.data.transforms import downsample
from diffjax.errors import UserError
from diffjax.evaluation.grids import enlarge, grid, write_png
from diffjax.experiment import (
    StageModel,
    build_ema,
    build_encoder,
    build_loader,
    build_optimizer,
    build_sampler,
    build_source,
    build_stage,
    build_text_table,
    build_update,
    check_classes,
    check_sampler,
    null_zeros,
    text_widths,
    to_cond,
    with_text_length,
)
from diffjax.latents import Codec, cache_latents, draw, open_codec
from diffjax.parallel import hosts
from diffjax.parallel.mesh import batch_rows, batch_sharding, check_batch, make_mesh, put_batch, replicated
from diffjax.parallel.rules import Rules, on_mesh, param_shardings
from diffjax.pretrained import adopt, adopt_sampler, read_params
from diffjax.programs import abstract_state
from diffjax.text.cache import TextTable
from diffjax.text.live import add_states
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.interrupt import Interrupt
from diffjax.training.metrics import MetricsBuffer, MetricsWriter, NoMetrics, NotFinite
from diffjax.training.progress import TrainingProgress
from diffjax.training.state import TrainState, count_params, init_sharded
from diffjax.training.step import compile_train_step

PREVIEW_FOLDER = "previews"
# Updates that wait for the device, at most: enough to keep it busy, and their batches do not fill its memory.
AHEAD = 2


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


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
    with workdirs.hold(workdir, first=hosts.is_first()), Interrupt() as interrupt:
        # What is cheap to check comes first: nothing is loaded or compiled for a run that cannot work.
        config = adopt(config)
        configs.check_stage(config)
        mesh = make_mesh(**config.mesh)
        check_batch(config.batch_size, mesh, accumulate=config.accumulate)
        preview_settings = build_sampler(adopt_sampler(config.preview.sampler, config), "preview.sampler")
        optimizer, learning_rate = build_optimizer(config)
        decay = build_ema(config)
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
        start = checkpoints.latest_step()
        if hosts.is_first():
            run_config.keep(config, workdir, started=start is not None)
        if start is not None and start >= config.steps:
            checkpoints.close()
            print(f"{label}: {workdir} is already trained for {start:,} steps.", flush=True)
            return

        # Pictures, captions and the network.
        source = build_source(config.data, log=print)
        check_classes(config, source)
        encoder = build_encoder(config, mesh)
        config = with_text_length(config, encoder)
        live = None if config.text.cache else encoder
        captions = source.captions
        if live is not None:
            captions = [captions[i] for i in preview_places(config, source)]
        table = build_text_table(config, encoder, captions, log=print)
        model = build_stage(config, **text_widths(table))
        check_sampler(model.stage, preview_settings, "preview.sampler")

        def leave_if_asked() -> None:
            if interrupt.requested:
                raise Interrupted(
                    f"{label}: {interrupt.requested} while pictures were encoded; complete shards are kept. "
                    "Run the same command to go on."
                )

        say = functools.partial(print, flush=True)
        latents = cache_latents(config, model.stage, source, log=say, check=leave_if_asked)
        rows = batch_rows(config.batch_size, mesh)
        loader = build_loader(config, source, table, latents, rows=rows, live=live)

        # Where each array lives, and the state: restored, read from public weights, or new.
        places = param_shardings(mesh, Rules(), model.shapes, model.axes)
        codec = open_codec(config, model.stage, mesh)
        offload = config.optimizer.offload
        key = jax.random.key(config.seed)
        init_key, step_key = jax.random.split(key)
        if start is None:
            given = read_params(config, model, places) if config.init_from else None
            state = init_sharded(
                model.init, optimizer, init_key, mesh, places, model.history, given, offload=offload
            )
        else:
            abstract = abstract_state(model, optimizer, mesh, offload=offload)
            state, position = checkpoints.restore(abstract)
            loader.set_state(position)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step_key = hosts.spread(step_key, replicated(mesh))
        latent_key = hosts.spread(jax.random.fold_in(key, 2), replicated(mesh))

        step_fn = build_update(model.stage, optimizer, learning_rate, decay, accumulate=config.accumulate)
        update = compile_train_step(step_fn, shardings, batch_sharding(mesh), replicated(mesh))
        preview = make_preview(config, model, preview_settings, source, table, codec)

        first = start or 0
        print(
            f"{label}: {config.model.name} of {count_params(state.params):,} parameters, "
            f"{config.resolution} px, {len(source):,} pictures, batch {config.batch_size}, "
            f"steps {first:,} to {config.steps:,}, {mesh.size} {jax.devices()[0].platform} device(s); "
            f"in {workdir}",
            flush=True,
        )
        progress = TrainingProgress(label, start=first, steps=config.steps, batch_size=config.batch_size)
        writer = MetricsWriter(workdir, start_step=first) if hosts.is_first() else NoMetrics()
        unread = MetricsBuffer()
        batches = Prefetch(
            loader,
            lambda batch: put_batch({n: a for n, a in batch.items() if n != "index"}, mesh),
            ahead=AHEAD,
        )
        asked_to_stop = hosts.SharedFlag()

        def save(state: TrainState) -> None:
            unread.check()  # a checkpoint is good only if every loss up to it was finite
            checkpoints.save(state, batches.get_state())

        try:
            with progress, on_mesh(mesh, config.attention):
                # The order of these five things is part of what a resumed run repeats: do not change it.
                for step in itertools.count(first):
                    last = step == config.steps
                    if config.preview.every and step > first and (last or step % config.preview.every == 0):
                        show_preview(preview(state.ema_params), step, workdir, writer)
                    due = step > first and (last or step % config.checkpoint.every == 0)
                    stop = asked_to_stop(bool(interrupt.requested))
                    if due or stop:
                        save(state)
                    if last:
                        break
                    if stop:
                        checkpoints.wait()
                        signal = interrupt.requested or "a signal to another process"
                        raise Interrupted(
                            f"{label}: {signal} at step {step:,}; saved. Run the same command to go on."
                        )
                    batch = next(batches)
                    if live is not None:
                        batch = add_states(live, batch, batch_sharding(mesh), length=config.text.length)
                    if codec is not None:
                        draw_key = jax.random.fold_in(latent_key, state.step)
                        if latents is not None:
                            batch["latent"] = draw(batch.pop("moments"), draw_key)
                        else:
                            batch["latent"] = codec.encode(batch.pop("image"), draw_key)
                    state, metrics = update(state, batch, step_key)
                    unread.add(step + 1, metrics)
                    unread.wait(leave=AHEAD)
                    progress.advance(step + 1)
                    if (step + 1) % config.log_every == 0:
                        means = unread.read(leave=1)  # this step is still running; its metrics come next time
                        if means:
                            speed = progress.report(step + 1, means, waited=batches.waited())
                            writer.scalars(step + 1, {**means, **speed})
            checkpoints.wait()
        except NotFinite as error:
            checkpoints.wait()
            good = checkpoints.latest_step()
            kept = (
                f"the checkpoint of step {good} is good" if good is not None else "there is no checkpoint yet"
            )
            raise UserError(
                f"{label}: {error}; {kept} ({workdir}).\n"
                "Try a lower optimizer.learning_rate or a smaller optimizer.clip_norm."
            ) from error
        finally:
            writer.close()
            batches.close()
            loader.close()
            checkpoints.close()
        progress.say(f"{label}: {config.steps:,} steps in {progress.elapsed()}; saved in {workdir}.")


def make_preview(
    config: ConfigDict,
    model: StageModel,
    settings: stages.SamplerSettings,
    source: Source,
    table: TextTable | None,
    codec: Codec | None = None,
) -> Callable[[Any], np.ndarray]:
    """A function from averaged parameters to a picture: real images, what they start from, and samples.

    The prompts are the captions of pictures spread over the data set, so that the samples can stand beside
    the real ones; the same seeds are used each time.
    """
    shown = preview_places(config, source)
    examples = [source[i] for i in shown]
    factor = source.resolution // config.resolution
    real = np.stack([downsample(example.image, factor) for example in examples])
    labels = [source.labels[i] for i in shown] if "label" in config.conditions else []
    cond = to_cond(table, [example.caption for example in examples], labels)
    null = to_cond(table, [""] * len(shown)) if table is not None and config.text.null != "learned" else None
    if null is not None and config.text.null == "zeros":
        null = null_zeros(null)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), len(shown))
    low_res = None
    rows = [real]
    if config.low_res.resolution:
        ratio = config.resolution // config.low_res.resolution
        low_res = stages.downsample(stages.to_model_range(real), ratio)
        small = np.asarray(stages.to_pixels(low_res))
        rows.append(small.repeat(ratio, axis=1).repeat(ratio, axis=2))

    @jax.jit
    def run(params: Any) -> jax.Array:
        return stages.sample(model.stage, settings, params, cond, keys, low_res, null=null)

    def preview(params: Any) -> np.ndarray:
        images = run(params) if codec is None else codec.decode(run(params))
        shown = [*rows, hosts.gather(stages.to_pixels(images))]
        return grid([[enlarge(image, 64) for image in row] for row in shown])

    return preview


def preview_places(config: ConfigDict, source: Source) -> list[int]:
    """The pictures whose captions are the prompts of previews, spread over the data set."""
    count = min(config.preview.count, len(source))
    return [i * len(source) // count for i in range(count)]


def show_preview(picture: np.ndarray, step: int, workdir: Path, writer: MetricsWriter) -> None:
    """Write a preview as PNG and to TensorBoard, in the first of several processes."""
    if not hosts.is_first():
        return
    write_png(workdir / PREVIEW_FOLDER / f"{step:08d}.png", picture, {"step": str(step)})
    writer.image(step, "samples", picture)

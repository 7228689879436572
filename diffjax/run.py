"""What the steps of a run need, made from its configuration."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffjax import recovery, run_config
from diffjax.check_config import check_stage
from diffjax.data.rejects import Rejects
from diffjax.data.source import Source
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
    open_rejects,
    text_widths,
    usable_examples,
    with_text_length,
)
from diffjax.feed import AHEAD, Batch, Feed
from diffjax.latents import cache_latents, draw, open_codec
from diffjax.monitor import make_evaluation
from diffjax.parallel import hosts
from diffjax.parallel.mesh import batch_rows, batch_sharding, check_batch, make_mesh, replicated
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.pretrained import adopt, adopt_sampler, read_params
from diffjax.preview import make_preview, preview_places
from diffjax.programs import abstract_state
from diffjax.text.live import add_states
from diffjax.training.checkpoint import Checkpoints
from diffjax.training.interrupt import Interrupt, Interrupted
from diffjax.training.metrics import MetricsBuffer
from diffjax.training.state import TrainState, count_params, init_sharded
from diffjax.training.step import compile_train_step
from diffjax.training.watch import LossWatch


@dataclasses.dataclass
class Run:
    """What the steps of a run need.

    Attributes:
      label: what it is called in messages.
      workdir: where it writes.
      config: of the stage.
      model: the network and what is known of it.
      mesh: the devices.
      source: the pictures.
      rejects: those that cannot be used.
      abstract: the shapes and placements of the state.
      state: where it starts.
      first: how many updates were made before.
      key: of all chance in the updates.
      update: `(state, batch, key) -> (state, metrics)`, compiled at its first call.
      preview: from averaged parameters to a picture.
      evaluate: from averaged parameters to measures by their names; None if there are to be none.
      feed: the batches.
      watch: judges the losses.
      unread: metrics of the last steps.
      checkpoints: the run's.
    """

    label: str
    workdir: Path
    config: ConfigDict
    model: StageModel
    mesh: Any
    source: Source
    rejects: Rejects
    abstract: Any
    state: TrainState | None
    first: int
    key: jax.Array
    update: Callable[..., Any]
    preview: Callable[[Any], np.ndarray]
    evaluate: Callable[[Any], dict[str, float]] | None
    feed: Feed
    watch: LossWatch
    unread: MetricsBuffer
    checkpoints: Checkpoints

    def get_state(self) -> dict[str, Any]:
        """What is saved beside `state`, as JSON can hold it; `watch` must have seen all steps."""
        return {**self.feed.get_state(), "watch": self.watch.get_state(), "metrics": self.unread.get_state()}

    def set_state(self, saved: dict[str, Any]) -> None:
        """Go on from what `get_state` gave; the position in the data excepted, which the loader is told."""
        if "watch" in saved:  # old checkpoints know of the data only
            self.watch.set_state(saved["watch"])
            self.unread.set_state(saved["metrics"])

    def close(self) -> None:
        """End the threads."""
        self.feed.close()
        self.rejects.close()
        self.checkpoints.close()


def prepare(config: ConfigDict, workdir: Path, label: str, interrupt: Interrupt) -> Run | None:
    """All that comes before the first step; None if the run is at its end already."""
    # What is cheap to check comes first: nothing is loaded or compiled for a run that cannot work.
    config = adopt(config)
    check_stage(config)
    mesh = make_mesh(**config.mesh)
    check_batch(config.batch_size, mesh, accumulate=config.accumulate)
    preview_settings = build_sampler(adopt_sampler(config.preview.sampler, config), "preview.sampler")
    eval_settings = build_sampler(adopt_sampler(config.eval.sampler, config), "eval.sampler")
    optimizer, learning_rate = build_optimizer(config)
    decay = build_ema(config)
    kept = {name: config.checkpoint[name] for name in ("keep", "keep_every", "keep_best")}
    checkpoints = Checkpoints(workdir, **kept, config=config)
    start = checkpoints.latest_step()
    if hosts.is_first():
        run_config.keep(config, workdir, started=start is not None)
    if start is not None and start >= config.steps:
        checkpoints.close()
        print(f"{label}: {workdir} is already trained for {start:,} steps.", flush=True)
        return None

    say = functools.partial(print, flush=True)

    def leave_if_asked() -> None:
        if interrupt.requested:
            raise Interrupted(
                f"{label}: {interrupt.requested} while pictures were checked or encoded; complete shards are "
                "kept. Run the same command to go on."
            )

    # Pictures, captions and the network.
    rejects = open_rejects(config, workdir, resumed=start is not None, log=say)
    source = build_source(config.data, log=print)
    source = usable_examples(config, source, rejects, log=say, check=leave_if_asked)
    check_classes(config, source)
    encoder = build_encoder(config, mesh)
    config = with_text_length(config, encoder)
    live = None if config.text.cache else encoder
    captions = source.captions
    if live is not None:
        captions = [captions[i] for i in preview_places(config, source, rejects)]
    table = build_text_table(config, encoder, captions, log=print)
    model = build_stage(config, **text_widths(table))
    check_sampler(model.stage, preview_settings, "preview.sampler")
    check_sampler(model.stage, eval_settings, "eval.sampler")

    latents = cache_latents(config, model.stage, source, log=say, check=leave_if_asked)
    rows = batch_rows(config.batch_size, mesh)
    loader = build_loader(config, source, table, latents, rows=rows, live=live, rejects=rejects)

    # Where each array lives, and the state: restored, read from public weights, or new.
    places = param_shardings(mesh, Rules(), model.shapes, model.axes)
    codec = open_codec(config, model.stage, mesh)
    offload = config.optimizer.offload
    key = jax.random.key(config.seed)
    init_key, step_key = jax.random.split(key)
    abstract = abstract_state(model, optimizer, mesh, offload=offload)
    if start is None:
        given = read_params(config, model, places) if config.init_from else None
        state = init_sharded(
            model.init, optimizer, init_key, mesh, places, model.history, given, offload=offload
        )
    else:
        state, saved = checkpoints.restore(abstract)
        start = int(state.step)
        loader.set_state(recovery.position_after(workdir, start, saved))
    latent_key = hosts.spread(jax.random.fold_in(key, 2), replicated(mesh))

    def finish(batch: Batch, step: jax.Array) -> Batch:
        if live is not None:
            batch = add_states(live, batch, batch_sharding(mesh), length=config.text.length)
        if codec is not None:
            draw_key = jax.random.fold_in(latent_key, step)
            if latents is not None:
                batch["latent"] = draw(batch.pop("moments"), draw_key)
            else:
                batch["latent"] = codec.encode(batch.pop("image"), draw_key)
        return batch

    step_fn = build_update(model.stage, optimizer, learning_rate, decay, accumulate=config.accumulate)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    first = start or 0
    say(
        f"{label}: {config.model.name} of {count_params(state.params):,} parameters, "
        f"{config.resolution} px, {len(source):,} pictures, batch {config.batch_size}, "
        f"steps {first:,} to {config.steps:,}, {mesh.size} {jax.devices()[0].platform} device(s); "
        f"in {workdir}",
    )
    evaluate = None
    if config.eval.every:
        evaluate = make_evaluation(config, model, eval_settings, source, rejects, table, mesh, codec, log=say)
    # Between trouble and its being noticed: as many steps as it takes, and those under way.
    remember = max(config.recovery.max_skips, config.recovery.spike_steps) + AHEAD + 1
    run = Run(
        label=label,
        workdir=workdir,
        config=config,
        model=model,
        mesh=mesh,
        source=source,
        rejects=rejects,
        abstract=abstract,
        state=state,
        first=first,
        key=hosts.spread(step_key, replicated(mesh)),
        update=compile_train_step(step_fn, shardings, batch_sharding(mesh), replicated(mesh)),
        preview=make_preview(config, model, preview_settings, source, rejects, table, codec),
        evaluate=evaluate,
        feed=Feed(loader, mesh, finish, remember=remember),
        watch=LossWatch(**{name: config.recovery[name] for name in ("max_skips", "spike", "spike_steps")}),
        unread=MetricsBuffer(),
        checkpoints=checkpoints,
    )
    if start is not None:
        run.set_state(saved)
    return run

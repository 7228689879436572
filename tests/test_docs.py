"""docs/core.md: every entry of every table has a row, its code runs, its recipes build; docs/mixture_2d.py learns."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import experiment, stage
from diffjax.diffusion import (
    couplings,
    grids,
    guidance,
    guidance_rules,
    inputs,
    likelihood,
    losses,
    paths,
    predictions,
    schedules,
    thresholding,
    timesteps,
    weightings,
)
from diffjax.diffusion.schedules.betas import BETAS
from diffjax.diffusion.solvers import SOLVERS
from diffjax.diffusion.solvers.stochastic import DIFFUSIONS
from diffjax.nn.conditioning import Cond
from diffjax.training.ema import DECAYS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "core.md").read_text(encoding="utf-8")
TABLES = {
    "SCHEDULES": schedules.SCHEDULES,
    "BETAS": BETAS,
    "PREDICTIONS": predictions.PREDICTIONS,
    "INPUTS": inputs.INPUTS,
    "TIMESTEPS": timesteps.TIMESTEPS,
    "WEIGHTINGS": weightings.WEIGHTINGS,
    "PENALTIES": losses.PENALTIES,
    "COUPLINGS": couplings.COUPLINGS,
    "PATHS": paths.PATHS,
    "SOLVERS": SOLVERS,
    "DIFFUSIONS": DIFFUSIONS,
    "TIME_GRIDS": grids.TIME_GRIDS,
    "GUIDANCES": guidance_rules.GUIDANCES,
    "SCALES": guidance.SCALES,
    "THRESHOLDS": thresholding.THRESHOLDS,
    "DIVERGENCES": likelihood.DIVERGENCES,
    "DECAYS": DECAYS,
}
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
RECIPES = [block for block in BLOCKS if block.startswith(("config =", "betas ="))]


def rows(table):
    """The rows of a table's section, as lists of cells."""
    (section,) = re.findall(rf"^## [^\n]*`{table}`\n(.*?)(?=^## )", TEXT, re.DOTALL | re.MULTILINE)
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("table", TABLES)
def test_every_entry_has_one_row_and_every_row_an_entry(table):
    assert sorted(row[0].strip("`") for row in rows(table)) == sorted(TABLES[table])


def test_rows_have_as_many_cells_as_their_table():
    assert {len(row) for table in TABLES for row in rows(table) if table != "SOLVERS"} == {4}
    assert {len(row) for row in rows("SOLVERS")} == {6}


def test_orders_are_the_declared_ones():
    said = {row[0].strip("`"): row[2] for row in rows("SOLVERS")}
    assert said == {name: str(factory().order or "-") for name, factory in SOLVERS.items()}


def test_functions_that_are_no_entries_exist():
    section = TEXT.split("## What is no entry of a table")[1].split("\n## ")[0]
    names = re.findall(r"^\| `([\w.]+)", section, re.MULTILINE)
    assert len(names) > 20
    for name in names:
        module, _, function = (name if name.startswith("diffjax") else f"diffjax.diffusion.{name}").rpartition(".")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_the_first_example_runs():
    scope = {}
    exec(BLOCKS[0], scope)
    assert scope["loss"].shape == (4,)
    assert scope["images"].shape == (4, 8, 8, 3)
    assert np.isfinite(scope["loss"]).all()
    assert np.isfinite(scope["images"]).all()


@pytest.fixture(scope="module")
def helpers():
    scope = {}
    exec(next(block for block in BLOCKS if "def process" in block), scope)
    exec(next(block for block in RECIPES if block.startswith("betas")), scope)
    return scope


@pytest.mark.parametrize("recipe", RECIPES, ids=[str(i) for i in range(len(RECIPES))])
def test_recipes_build_and_give_finite_losses_and_samples(recipe, helpers):
    scope = dict(helpers)
    exec(recipe, scope)
    config = scope["config"]
    config.resolution = config.data.resolution = 8
    config.model.update(name="dit", embed=16, depth=1, heads=2, patch=4)
    model = experiment.build_stage(config, text_embed=4)
    # As configured, then with a few steps.
    for name in ("sampler", "ddim"):
        if name in recipe and name in scope:
            settings = experiment.build_sampler(scope[name], name)
            experiment.check_sampler(model.stage, settings, name)
    sampler = scope["sampler"]
    sampler.num_steps = 3
    if "steps" in sampler.solver:
        sampler.solver.steps = 2
    settings = experiment.build_sampler(sampler, "sampler")
    experiment.check_sampler(model.stage, settings, "sampler")

    @jax.jit
    def run(key):
        # The network's last layer starts at zero; here it is to say something.
        leaves, tree = jax.tree.flatten(model.init(key))
        leaves = [leaf + 0.02 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
                  for i, leaf in enumerate(leaves)]  # fmt: skip
        params = jax.tree.unflatten(tree, leaves)
        cond = Cond(jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool), jnp.ones((2, 4)))
        batch = {"image": jnp.full((2, 8, 8, 3), 100, jnp.uint8), "text": cond.text, "mask": cond.mask}
        batch["pooled"] = cond.pooled
        loss = stage.loss(model.stage, params, batch, key)
        return loss, stage.sample(model.stage, settings, params, cond, jax.random.split(key, 2))

    loss, images = run(jax.random.key(0))
    assert loss.shape == (2,)
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(loss).all()
    assert np.isfinite(images).all()


@pytest.fixture(scope="module")
def mixture():
    spec = importlib.util.spec_from_file_location("mixture_2d", DOCS / "mixture_2d.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_the_mixture_runs_with_every_schedule(mixture, schedule):
    names = {**mixture.USUAL, "schedule": schedule, **mixture.CHOICES.get(schedule, {})}
    found = mixture.train_and_sample(names, steps=2, num_steps=3, count=4, batch=8)
    assert found.shape == (4, 4, 2)
    assert np.isfinite(found).all()


def test_the_mixture_is_learned(mixture):
    names = {**mixture.USUAL, **mixture.CHOICES["linear_flow"]}
    data = mixture.draw_data(jax.random.key(1), 512)

    def after(steps):
        found = mixture.train_and_sample(names, steps=steps, num_steps=20, count=512, batch=256)
        return mixture.distance(found[-1], data), mixture.spread(found[-1])

    untrained, trained = after(1), after(400)
    assert untrained[0] > 0.05
    assert trained[0] < 0.01
    assert trained[1] < 0.12 < untrained[1]


def test_the_mixture_is_drawn_and_measured(mixture, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "mixture.png"
    mixture.main(["--schedule=edm", "--steps=2", "--num_steps=3", f"--out={out}"])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "energy distance" in capsys.readouterr().out

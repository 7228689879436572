"""docs/core.md: every entry has its row, code runs, recipes build; docs/mixture_2d.py learns."""

import dataclasses
import importlib
import re
import runpy
import sys
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
        module, _, function = (
            name if name.startswith("diffjax") else f"diffjax.diffusion.{name}"
        ).rpartition(".")
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

    # The smallest of networks, as every recipe compiles a program of its own.
    def net(params, x, level, cond, dropout_key=None):
        output = jnp.tanh(params * x + 0.1 * jnp.sin(level)[:, None, None, None] + 0.1 * cond.mask.any())
        return jnp.concatenate([output, output], axis=-1) if config.diffusion.vlb_weight else output

    tiny = dataclasses.replace(model.stage, net=net)
    if tiny.uncertainty is not None:
        tiny = dataclasses.replace(tiny, uncertainty=lambda params, level: params * level)

    @jax.jit
    def run(key):
        cond = Cond(jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool), jnp.ones((2, 4)))
        batch = {"image": jnp.full((2, 8, 8, 3), 100, jnp.uint8), "text": cond.text, "mask": cond.mask}
        examples, dropout_key = stage.draw(tiny, {**batch, "pooled": cond.pooled}, key)
        losses = stage.loss(tiny, 0.5, examples, dropout_key)
        return losses, stage.sample(tiny, settings, 0.5, cond, jax.random.split(key, 2))

    losses, images = run(jax.random.key(0))
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(losses))


def mixture(monkeypatch, out, *arguments):
    """What docs/mixture_2d.py leaves in its variables."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "argv", ["mixture_2d.py", f"--out={out}", *arguments])
    return runpy.run_path(str(DOCS / "mixture_2d.py"), run_name="__main__")


@pytest.mark.parametrize(
    "arguments", [("--schedule=edm", "--solver=edm"), ("--schedule=ddpm", "--prediction=v")]
)
def test_the_mixture_is_drawn(monkeypatch, tmp_path, arguments):
    scope = mixture(monkeypatch, tmp_path / "mixture.png", "--steps=2", *arguments)
    assert scope["paths"].shape == (51, 2048, 2)
    assert np.isfinite(scope["paths"]).all()
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_mixture_is_learned(monkeypatch, tmp_path):
    def spread(steps):
        """The median distance to the nearest of the eight centres; 0.04 sqrt(2 log 2) in the data."""
        command = (f"--steps={steps}", "--prediction=velocity", "--solver=heun", "--grid=uniform")
        scope = mixture(monkeypatch, tmp_path / "mixture.png", *command)
        angles = np.pi / 4.0 * np.arange(8)
        centres = 0.7 * np.stack([np.cos(angles), np.sin(angles)], axis=1)

        def of(points):
            return np.median(np.linalg.norm(points[:, None] - centres, axis=-1).min(axis=1))

        return of(np.asarray(scope["paths"][-1])), of(np.asarray(scope["data"]))

    untrained, data = spread(1)
    assert abs(data - 0.04 * (2.0 * np.log(2.0)) ** 0.5) < 0.001
    assert untrained > 0.3
    assert spread(1000)[0] < 0.15

"""What is imported when; in processes of their own, since this one has long imported everything."""

import subprocess
import sys

import program
import pytest

HEAVY = (
    "transformers",
    "tensorflow_datasets",
    "grain",
    "orbax",
    "torch",
    "tensorflow",
    "tensorboardX",
    "resvg_py",
)
DIFFUSION = [
    f"diffjax.diffusion.{path.stem}" for path in (program.ROOT / "diffjax" / "diffusion").glob("[a-z]*.py")
]


def imported(code):
    """The top-level packages in memory after some code."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=program.ROOT,
        env=program.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_diffjax_alone_imports_not_even_jax():
    assert not imported("import diffjax") & {"jax", "flax", "optax", "numpy", "ml_collections", *HEAVY}


@pytest.mark.parametrize("path", ["configs/quickstart.py", "tests/configs/tiny.py"])
def test_configurations_import_no_jax(path):
    found = imported(f"import runpy; runpy.run_path({path!r})['get_config']()")
    assert not found & {"jax", "flax", "optax", *HEAVY}


def test_networks_step_and_mathematics_import_nothing_heavy():
    modules = [
        "diffjax.models.dit",
        "diffjax.models.unet",
        "diffjax.training.step",
        "diffjax.stage",
        *DIFFUSION,
    ]
    found = imported(f"import {', '.join(modules)}")
    assert {"jax", "flax", "optax"} <= found
    assert not found & {"PIL", *HEAVY}


def test_the_mathematics_of_diffusion_knows_only_jax():
    assert len(DIFFUSION) > 5
    assert not imported(f"import {', '.join(DIFFUSION)}") & {"flax", "optax", "ml_collections", *HEAVY}


def test_training_waits_for_what_it_needs():
    assert not imported("import diffjax.train, diffjax.sample, diffjax.evaluate") & set(HEAVY)

"""--mode=checkpoint on runs whose states are made by hand, and on one that the program has trained."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import program
import pytest
from absl import flags
from ml_collections import ConfigDict

from diffjax import checkpoint, run_config
from diffjax.config import stage_config
from diffjax.errors import UserError
from diffjax.training import archive, digests, ema
from diffjax.training.checkpoint import FOLDER, Checkpoints
from diffjax.training.state import create_state

OPTIMIZER = optax.adam(1e-3)
STEPS = tuple(range(50, 401, 50))
FLAGS = ("action", "step", "output", "weights", "sigma_rel")


def values(step):
    """Parameters that differ at each step."""
    return {"net": {"w": jnp.full((4, 2), float(step)), "b": jnp.arange(3.0) * step}}


def averages(sigma_rel, step):
    """The power-function average at `step` of parameters that equal the number of the step, in closed form.

    The mean of tau^gamma over [0, t] is (gamma + 1) / (gamma + 2) * t.
    """
    gamma = ema.gamma_of(sigma_rel)
    return jax.tree.map(lambda leaf: leaf * (gamma + 1) / (gamma + 2), values(step))


def make_run(folder, kind="power_function", sigma_rel=0.1):
    config = stage_config()
    config.ema = ConfigDict({"name": kind, "sigma_rel": sigma_rel})
    checkpoints = Checkpoints(folder, keep=len(STEPS), config=config)
    for step in STEPS:
        state = create_state(values(step), OPTIMIZER)
        state = state._replace(step=jnp.int32(step), ema_params=averages(sigma_rel, step))
        checkpoints.save(state, {"next": step}, loss=1.0 / step)
    checkpoints.close()
    run_config.keep(config, folder, started=False)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with four checkpoints; not to be changed."""
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the program in this process: exit status, what it prints, and its errors."""

    def call(*argv):
        for name in FLAGS:
            flags.FLAGS[name].unparse()
        status = program.call(monkeypatch, *argv)
        for name in FLAGS:
            flags.FLAGS[name].unparse()
        return status, *capsys.readouterr()

    import diffjax.main  # noqa: F401  defines the flags

    return call


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_list_has_a_line_for_each_checkpoint(run, tmp_path, call):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / FOLDER / "50" / "seal.json").unlink()
    (copy / FOLDER / "100").rename(copy / FOLDER / "damaged-100")
    flip(copy / FOLDER / "150" / "manifest" / "metadata")
    before = contents(copy)
    status, out, err = call("--mode=checkpoint", f"--workdir={copy}")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 1 + len(STEPS)
    assert lines[0].split() == ["step", "saved", "(UTC)", "size", "loss", "config", "state"]
    assert lines[1].split()[0] == "50"
    assert lines[1].endswith("not sealed")
    assert "0.02" in lines[1].split()
    assert "damaged: the file manifest/metadata" in lines[2]
    assert lines[-2].split()[0] == "400"
    assert lines[-2].endswith("  sealed")
    assert lines[-1].startswith("damaged-100")
    assert contents(copy) == before


def test_verify_names_what_is_damaged_and_fails(run, tmp_path, call):
    status, out, err = call("--mode=checkpoint", "--action=verify", f"--workdir={run}")
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"step {step}: sound" for step in STEPS]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    victim = next((copy / FOLDER / "300" / "ema_params" / "d").iterdir())
    flip(victim)
    before = contents(copy)
    status, out, err = call("--mode=checkpoint", "--action=verify", f"--workdir={copy}")
    assert status == 2
    assert f"step 300: damaged: the file ema_params/d/{victim.name}" in out
    assert "step 400: sound" in out
    assert "1 of 8 checkpoints" in err
    assert contents(copy) == before
    assert call("--mode=checkpoint", "--action=verify", "--step=400", f"--workdir={copy}")[0] == 0


@pytest.mark.parametrize(
    ("extra", "expected"),
    [((), averages(0.1, 400)), (("--weights=params", "--step=200"), values(200))],
)
def test_what_is_exported_is_read_back_as_it_was(run, tmp_path, call, extra, expected):
    before = contents(run)
    out = tmp_path / "out"
    status, said, _ = call(
        "--mode=checkpoint", "--action=export", f"--workdir={run}", f"--output={out}", *extra
    )
    assert status == 0
    assert "11 parameters" in said
    config, params = checkpoint.read_export(out)
    assert config == run_config.load(run)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert contents(run) == before


def test_the_saved_configuration_is_read_as_data(run, tmp_path, call):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "config.json").write_text("import os; os.abort()")  # nobody asks for it
    assert call("--mode=checkpoint", f"--workdir={copy}")[0] == 0


def test_an_average_is_the_closed_form_of_its_width(run, tmp_path, call):
    out = tmp_path / "out"
    status, said, _ = call(
        "--mode=checkpoint", "--action=average", f"--workdir={run}", f"--output={out}", "--sigma_rel=0.15"
    )
    assert status == 0
    assert "from 8 snapshots" in said
    error = float(said.split("true one by ")[1].split(" %")[0]) / 100
    assert 0.0 < error < 0.2
    _, params = checkpoint.read_export(out)
    expected = averages(0.15, 400)
    # The error of the profile bounds that of the average, relative to the width of the average.
    for found, wanted, own in zip(*map(jax.tree.leaves, (params, expected, averages(0.1, 400))), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=error)
        assert np.abs(found - wanted).max() < np.abs(own - wanted).max() / 2
    assert json.loads((out / "config.json").read_text())["weights"] == "average of sigma_rel 0.15"


def test_the_average_of_the_own_width_is_the_snapshot(run, tmp_path):
    checkpoint.checkpoint(run, "average", output=tmp_path / "out", sigma_rel=0.1, step=300)
    _, params = checkpoint.read_export(tmp_path / "out")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, averages(0.1, 300))


def test_a_reshard_is_a_run_that_is_gone_on_from_on_any_mesh(run, tmp_path, call):
    out = tmp_path / "out"
    status, _, _ = call(
        "--mode=checkpoint", "--action=reshard", f"--workdir={run}", f"--output={out}", "--step=200"
    )
    assert status == 0
    assert archive.verify(out / FOLDER / "200") == []
    assert run_config.load(out) == run_config.load(run)
    like = create_state(values(0), OPTIMIZER)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    states = []
    for folder, before in ((run, 200), (out, None)):
        checkpoints = Checkpoints(folder, keep=9, config=run_config.load(run))
        states.append(checkpoints.restore(abstract, before=before))
        checkpoints.close()
    assert states[0][1] == states[1][1] == {"next": 200}
    assert digests.of_tree(states[0][0]) == digests.of_tree(states[1][0])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--mode=checkpoint"], "--workdir"),
        (["--mode=checkpoint", "--workdir={tmp}"], "there is no checkpoint in"),
        (
            ["--mode=checkpoint", "--workdir={run}", "--step=7", "--action=verify"],
            "--step=7: .*50, 100, 150",
        ),
        (["--mode=checkpoint", "--workdir={run}", "--action=export"], "--output"),
        (
            ["--mode=checkpoint", "--workdir={run}", "--action=export", "--output={run}"],
            "holds a run already",
        ),
        (["--mode=checkpoint", "--workdir={run}", "--action=average", "--output={tmp}/o"], "--sigma_rel"),
        (
            ["--mode=checkpoint", "--workdir={run}", "--action=average", "--output={tmp}/o", "--sigma_rel=3"],
            "sigma_rel is 3.0; expected more than 0",
        ),
        (["--mode=train", "--action=verify"], "--action is of --mode=checkpoint"),
        (["--step=3"], "--step is of --mode=checkpoint"),
        (["--mode=checkpoint", "--workdir={run}", "--action=shrink"], "action"),
    ],
)
def test_what_does_not_fit_is_an_error_in_one_line(run, tmp_path, call, argv, words):
    status, _, err = call(*(argument.format(run=run, tmp=tmp_path) for argument in argv))
    assert status == 2
    assert len(err.splitlines()) == 1
    assert re.search(words, err), err


def test_averages_of_another_kind_are_not_reconstructed(tmp_path):
    make_run(tmp_path / "run", kind="warm")
    with pytest.raises(UserError, match="power_function"):
        checkpoint.checkpoint(tmp_path / "run", "average", output=tmp_path / "out", sigma_rel=0.1)


def test_the_stages_of_a_cascade_are_pointed_at(run, tmp_path):
    shutil.copytree(run, tmp_path / "base")
    with pytest.raises(UserError, match=f"--workdir may be {tmp_path / 'base'}"):
        checkpoint.checkpoint(tmp_path, "list")

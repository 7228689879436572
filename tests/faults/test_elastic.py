"""A run goes on over other devices, with the same data in the same order and the same losses."""

import jax
import numpy as np
import program
import pytest
from runs import metrics, saved_steps

from diffjax.train import train
from diffjax.training.checkpoint import FOLDER


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_another_mesh_goes_on_with_the_same_data_and_losses(cache_dir, tmp_path, mesh):
    config = program.tiny_stage(cache_dir, 8)
    assert len(jax.devices()) == 8
    train(config, tmp_path / "one")
    config.steps = 4
    train(config, tmp_path / "two")
    config.steps = 8
    config.mesh.update(mesh)
    train(config, tmp_path / "two")
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [2, 3, 4, 5, 6, 7, 8]
    known = {line["step"]: line for line in one}
    for line in two:
        np.testing.assert_allclose(line["loss"], known[line["step"]]["loss"], rtol=1e-5)
    assert saved_steps(tmp_path / "one")[-1] == saved_steps(tmp_path / "two")[-1] == 8
    positions = [tmp_path / name / FOLDER / "8" / "data" / "metadata" for name in ("one", "two")]
    assert len({path.read_text().split('"watch"')[0] for path in positions}) == 1

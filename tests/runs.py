"""What runs have left, and whether two of them have left the same."""

import json

import numpy as np

from diffjax.training.checkpoint import FOLDER

STAGES = ("base", "super_resolution")


def arrays(folder, step):
    """Every array of a stage's checkpoint, by item and name, as Orbax reads it."""
    import orbax.checkpoint as ocp

    found = {}
    for item in ("params", "ema_params", "rest"):
        tree = ocp.StandardCheckpointer().restore(folder / FOLDER / str(step) / item)
        for path, leaf in ocp.tree.to_flat_dict(tree, sep="/").items():
            found[f"{item}/{path}"] = np.asarray(leaf)
    return found


def saved_steps(folder):
    """The steps of a stage's checkpoints, rising."""
    return sorted(int(path.name) for path in (folder / FOLDER).iterdir() if path.name.isdecimal())


def metrics(folder):
    """The lines of a stage's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder, reference, *, whole=True):
    """Two stages have the same parameters, averages, optimizer, position and metrics, bit for bit.

    Each line of metrics must be among those of the reference; `whole`: the same checkpoints must be there.
    """
    step = max(saved_steps(reference))
    if whole:
        assert saved_steps(folder) == saved_steps(reference)
    one, other = arrays(folder, step), arrays(reference, step)
    assert one.keys() == other.keys()
    assert len(one) > 50
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=f"{folder}: {name}")
    data = [path / FOLDER / str(step) / "data" / "metadata" for path in (folder, reference)]
    assert data[0].read_bytes() == data[1].read_bytes()
    steps = [line["step"] for line in metrics(folder)]
    assert steps == sorted(set(steps))
    assert steps[-1] == step
    known = {line["step"]: line for line in metrics(reference)}
    for line in metrics(folder):
        for name in {"loss", "grad_norm", "learning_rate", "skipped"} & line.keys():
            assert line[name] == known[line["step"]][name], (line["step"], name)


def assert_same_cascades(workdir, reference):
    """Two cascades were trained to the same end, and evaluated with the same result."""
    for stage in STAGES:
        assert_same(workdir / stage, reference / stage)
    one, other = (folder / "evaluation.json" for folder in (workdir, reference))
    assert one.read_text() == other.read_text()

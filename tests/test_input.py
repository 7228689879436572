"""The loop of training moves nothing by itself, compiles once, and gets the same captions either way."""

import json

import jax
import numpy as np
import pytest
from transfers import guarded

from diffjax import run as runs
from diffjax.config import stage_config
from diffjax.errors import UserError
from diffjax.train import train
from diffjax.training.checkpoint import Checkpoints


def config_of(cache_dir, **changes):
    config = stage_config()
    config.resolution, config.batch_size, config.log_every = 8, 8, 2
    config.steps = config.checkpoint.every = 5
    config.preview.every = 0
    config.data.update(cache_dir=str(cache_dir), num_concepts=4, num_threads=2)
    config.text.length, config.text.drop = 8, 0.5
    config.model = {"name": "dit", "patch": 4, "embed": 16, "depth": 1, "heads": 2}
    for key, value in changes.items():
        config[key] = value
    return config


def trained(config, workdir, monkeypatch):
    """The batches and the state of a run whose every step forbids transfers that nobody asked for."""
    seen = {"batches": []}
    compiled, add_states, save = runs.compile_train_step, runs.add_states, Checkpoints.save

    def recording(*arguments):
        update = compiled(*arguments)

        def run(state, batch, key):
            seen["batches"].append(batch)
            result = guarded(update)(state, batch, key)
            seen.setdefault("sizes", []).append(update._cache_size())
            return result

        return run

    def saving(checkpoints, state, position, **_):
        seen["state"], seen["position"] = jax.device_get(state), position

    monkeypatch.setattr(runs, "compile_train_step", recording)
    monkeypatch.setattr(runs, "add_states", guarded(add_states))
    monkeypatch.setattr(Checkpoints, "save", saving)  # a real one takes seconds
    train(config, workdir)
    for name, value in (("compile_train_step", compiled), ("add_states", add_states)):
        monkeypatch.setattr(runs, name, value)
    monkeypatch.setattr(Checkpoints, "save", save)
    return seen


@pytest.mark.slow
def test_captions_from_the_cache_and_on_the_fly_train_alike(cache_dir, tmp_path, monkeypatch, capsys):
    runs = []
    for cache in (True, False):
        config = config_of(cache_dir)
        config.text.cache = cache
        runs.append(trained(config, tmp_path / str(cache), monkeypatch))
    cached, live = runs
    assert cached["sizes"] == live["sizes"] == [1] * 5
    # Two batches were read ahead, but the position is that of the last one used.
    assert cached["position"]["next_index"] == live["position"]["next_index"] == 40
    for one, other in zip(cached["batches"], live["batches"], strict=True):
        assert one.keys() == other.keys() == {"image", "text", "mask", "pooled"}
        np.testing.assert_array_equal(one["image"], other["image"])
        np.testing.assert_array_equal(one["mask"], other["mask"])
        np.testing.assert_allclose(one["text"], other["text"], rtol=2e-3, atol=2e-4)
    for one, other in zip(*(jax.tree.leaves(run["state"].params) for run in runs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "True" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.0 <= line["data_wait"] <= 1.0 for line in lines)
    assert "data wait" in capsys.readouterr().out


def test_a_batch_that_does_not_divide_into_its_parts_is_refused(cache_dir, tmp_path):
    with pytest.raises(UserError, match=r"batch_size=8 does not divide over 8 devices and 3 parts.*24"):
        train(config_of(cache_dir, accumulate=3), tmp_path / "run")

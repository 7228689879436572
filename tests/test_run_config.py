import json

import pytest

from diffjax import config as configs
from diffjax import run_config
from diffjax.errors import UserError


def stage(**changes):
    config = configs.stage_config()
    config.update_from_flattened_dict(changes)
    return config


def test_a_kept_configuration_is_loaded_as_it_was(tmp_path):
    config = stage(**{"optimizer.learning_rate": 1e-30, "model.multipliers": (1, 2), "data.cache_dir": "ü"})
    run_config.keep(config, tmp_path, started=False)
    loaded = run_config.load(tmp_path)
    assert run_config.difference(loaded, config) == []
    assert loaded.model.multipliers == (1, 2)
    assert loaded.optimizer.learning_rate == 1e-30
    assert run_config.to_json(loaded) == run_config.to_json(config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["mnist", None])
@pytest.mark.parametrize("key", ["max_rejects", "limits", "animated"])
def test_keys_that_are_newer_than_the_run_get_their_defaults(tmp_path, key, name):
    config = stage(**{"data.name": "mnist"})
    del config.data[key]
    if name is None:
        del config.data["name"]
    (tmp_path / "config.json").write_text(run_config.to_json(config))
    assert run_config.load(tmp_path).data[key] == stage().data[key]


def test_an_entry_of_a_table_takes_its_own_keys(tmp_path):
    config = stage()
    config.preview.sampler.threshold = configs.ConfigDict({"name": "static"})
    config.ema = configs.ConfigDict({"name": "power_function"})
    (tmp_path / "config.json").write_text(run_config.to_json(config))
    loaded = run_config.load(tmp_path)
    assert "decay" not in loaded.ema
    assert "percentile" not in loaded.preview.sampler.threshold


def test_references_are_resolved(tmp_path):
    config = stage(steps=5)
    config.twice = config.get_ref("steps") * 2
    run_config.keep(config, tmp_path, started=False)
    assert run_config.load(tmp_path).twice == 10


def test_a_difference_shows_key_and_both_values():
    lines = run_config.difference(stage(), stage(**{"seed": 1, "optimizer.b2": 0.5, "model.depth": 3}))
    assert [line.strip() for line in lines] == [
        "model.depth: '(absent)' there, 3 now",
        "optimizer.b2: 0.99 there, 0.5 now",
        "seed: 0 there, 1 now",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"log_every": 7},
        {"mesh.fsdp": 2},
        {"checkpoint.every": 9, "checkpoint.keep": 1},
        {"preview.every": 0, "preview.sampler.num_steps": 3},
        {"data.cache_dir": "/elsewhere", "data.num_threads": 1},
    ],
)
def test_what_does_not_change_what_is_learnt_may_differ(changes):
    assert run_config.difference(stage(), stage(**changes)) == []


def test_a_free_key_frees_no_key_that_begins_alike():
    assert run_config.difference(stage(), stage(**{"data.split": "other", "data.resolution": 128}))


@pytest.mark.parametrize(("decay", "contradicts"), [("cosine", True), ("constant", False)])
def test_a_run_may_be_prolonged_if_its_learning_rate_does_not_depend_on_its_length(decay, contradicts):
    one, other = (stage(**{"optimizer.decay": decay, "steps": steps}) for steps in (10, 20))
    assert bool(run_config.difference(one, other)) == contradicts


def test_a_contradicting_configuration_is_refused_and_the_kept_one_stays(tmp_path):
    run_config.keep(stage(), tmp_path, started=False)
    kept = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        run_config.keep(stage(seed=1), tmp_path, started=True)
    assert (tmp_path / "config.json").read_bytes() == kept
    run_config.keep(stage(seed=1), tmp_path, started=False)  # no checkpoint: nothing contradicts it
    assert run_config.load(tmp_path).seed == 1


def test_many_differences_are_cut(tmp_path):
    run_config.keep(stage(), tmp_path, started=False)
    changes = {f"model.key{i}": i for i in range(30)}
    with pytest.raises(UserError) as error:
        run_config.keep(stage(**changes), tmp_path, started=True)
    assert len(str(error.value).splitlines()) == 1 + 8 + 1 + 1


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        run_config.load(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a.b": 1}', b"null"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json( cannot be read|: )"):
        run_config.load(tmp_path)


def test_a_configuration_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "config.tmp").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        run_config.keep(stage(), tmp_path, started=False)


def test_what_is_kept_is_json_for_other_programs(tmp_path):
    run_config.keep(stage(), tmp_path, started=False)
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["clip_norm"] == 1.0

import re

import pytest
from ml_collections import ConfigDict

from diffjax import config as configs
from diffjax.check_config import check_keys, check_stage
from diffjax.errors import UserError


def cascade():
    config = configs.cascade_config()
    config.stages.base = configs.cascade_stage("base", configs.sampler_config(), configs.stage_config())
    config.stages.sr = configs.cascade_stage("sr", configs.sampler_config())
    return config


@pytest.mark.parametrize("make", [configs.stage_config, cascade])
def test_a_configuration_has_all_keys_of_the_right_types(make):
    check_keys(make())


@pytest.mark.parametrize(
    ("make", "key", "value", "message"),
    [
        (configs.stage_config, "low_res", ConfigDict(), "low_res.max_aug_level is missing"),
        (configs.stage_config, "preview", ConfigDict({"count": 1, "every": 1}), "preview.sampler is missing"),
        (configs.stage_config, "model", ConfigDict(), "model.name is missing"),
        (configs.stage_config, "steps", None, "steps is 'None'; expected a int"),
        (configs.stage_config, "steps", 10**20, "steps is '100000000000000000000'; expected a int"),
        (configs.stage_config, "dtype", 32, "dtype is '32'; expected a str"),
        (configs.stage_config, "optimizer", 3, "optimizer is '3'; expected a group of keys"),
        (configs.stage_config, "preview.sampler.guidance_interval", (0, "1"), "guidance_interval is"),
        (configs.stage_config, "text.cache", 1, "text.cache is '1'; expected a bool"),
        (cascade, "evaluate", ConfigDict(), "evaluate.baselines is missing"),
        (cascade, "stages", 1, "stages is '1'; expected a group of keys"),
        (cascade, "stages.sr", ConfigDict(), "stages.sr.sampler is missing"),
        (cascade, "stages.sr", 1, "stages.sr is '1'; expected a group of keys"),
        (cascade, "stages.sr.sampler.threshold", ConfigDict(), "stages.sr.sampler.threshold.name is missing"),
        (cascade, "stages.base.train.data", ConfigDict({"name": "x"}), "stages.base.train.data.animated is"),
        (cascade, "stages.base.train", ConfigDict(), "stages.base.train.accumulate is missing"),
    ],
)
def test_what_is_missing_or_of_another_type_is_named(make, key, value, message):
    config = make()
    group, _, last = key.rpartition(".")
    node = config
    for part in group.split(".") if group else ():
        node = node[part]
    with node.ignore_type():
        node[last] = value
    with pytest.raises(UserError, match=re.escape(message)):
        check_keys(config)


def test_whole_numbers_are_numbers_and_other_entries_of_tables_take_other_keys():
    config = configs.stage_config()
    with config.ignore_type():
        config.optimizer.learning_rate = 1
        config.preview.sampler.guidance_interval = (0, 1)
    config.preview.sampler.threshold = ConfigDict({"name": "static"})
    config.ema = ConfigDict({"name": "power_function"})
    check_keys(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("recovery.max_skips", 0, "expected at least 1"),
        ("recovery.spike_steps", 0, "expected at least 1"),
        ("recovery.spike", -1.0, "which is never"),
        ("recovery.hang_minutes", -1.0, "which is never"),
        ("checkpoint.minutes", -0.5, "which is never"),
        ("eval.every", -1, "which is never"),
        ("data.max_rejects", 1.5, "from 0 to 1"),
        ("conditions", (6.25,), "there are: guidance, label, size, text"),
        ("data.check", "decoded", "did you mean decode?"),
        ("data.animated", "last", "there are: first, reject"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(key, value, message):
    config = configs.stage_config()
    check_stage(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=re.escape(message)) as error:
        check_stage(config)
    assert str(error.value).startswith(f"{key}=")


def test_measures_in_training_need_captions_that_were_encoded_before():
    config = configs.stage_config()
    config.eval.every, config.text.cache = 100, False
    with pytest.raises(UserError, match=r"text\.cache=True"):
        check_stage(config)

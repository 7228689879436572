import re

import pytest

from diffjax import config as configs
from diffjax.errors import UserError


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("bach_size", "did you mean batch_size?"),
        ("stage", "did you mean stages?"),
        ("zzz", "there are: batch_size, prompts, stages."),
    ],
)
def test_nearest(name, advice):
    assert configs.nearest(name, ["stages", "batch_size", "prompts"]) == advice


def test_kinds_of_configuration_are_told_apart():
    assert configs.is_cascade(configs.cascade_config())
    assert not configs.is_cascade(configs.stage_config())


def test_defaults_are_typed():
    config = configs.stage_config()
    with pytest.raises(TypeError):
        config.batch_size = "many"
    with pytest.raises(AttributeError):
        config.lock().bach_size = 3


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
    configs.check_stage(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=re.escape(message)) as error:
        configs.check_stage(config)
    assert str(error.value).startswith(f"{key}=")


def test_measures_in_training_need_captions_that_were_encoded_before():
    config = configs.stage_config()
    config.eval.every, config.text.cache = 100, False
    with pytest.raises(UserError, match=r"text\.cache=True"):
        configs.check_stage(config)

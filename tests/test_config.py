import pytest

from diffjax import config as configs


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

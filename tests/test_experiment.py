from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from diffjax.config import sampler_config, stage_config
from diffjax.errors import UserError
from diffjax.experiment import build, build_sampler, check_classes, without_foreign


def scaled(factor=1.0):
    return ("scaled", factor)


def shifted(offset=0.0):
    if isinstance(offset, str):
        raise TypeError(f"got {offset}")
    if offset < 0:
        raise ValueError("offset must not be negative")
    return ("shifted", offset)


TABLE = {"scaled": scaled, "shifted": shifted}


def test_build_passes_the_other_entries_as_arguments():
    assert build(TABLE, ConfigDict({"name": "shifted", "offset": 2.0}), "part") == ("shifted", 2.0)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"name": "scald"}, "part.name='scald' does not exist; did you mean scaled?"),
        ({"name": "scaled", "facter": 2.0}, "part.facter is no setting of 'scaled'; did you mean factor?"),
        ({"name": "shifted", "offset": -1.0}, "part: offset must not be negative"),
        ({"name": "shifted", "offset": "a\n  b" * 999}, f"part: got {'a b' * 98}a "),
        ({"name": "shifted", "offset": {"a": 1}}, "part.offset is a group of keys; expected a value."),
    ],
)
def test_build_says_what_is_wrong(entries, words):
    with pytest.raises(UserError) as error:
        build(TABLE, ConfigDict(entries), "part")
    assert str(error.value) == words


def test_settings_of_another_entry_are_left_out_but_typing_mistakes_are_not():
    config = ConfigDict({"name": "shifted", "factor": 3.0, "offset": 1.0, "ofset": 2.0})
    assert without_foreign(TABLE, config).to_dict() == {"name": "shifted", "offset": 1.0, "ofset": 2.0}


@pytest.mark.parametrize("name", ["none", "static", "dynamic"])
def test_a_threshold_can_be_renamed_alone(name):
    config = sampler_config()
    config.threshold.name = name
    assert build_sampler(config, "sampler").threshold is not None


def test_changes_of_a_sampler_replace_whole_entries():
    assert sampler_config(threshold={"name": "static"}).threshold.to_dict() == {"name": "static"}


def test_data_that_the_network_has_too_few_classes_for_is_refused():
    config = stage_config()
    config.conditions = ("label",)
    with config.unlocked():
        config.model = ConfigDict({"name": "dit", "classes": 2, "depth": 1})
    source = SimpleNamespace(name="a folder", labels=[0, 1], classes=["cat", "dog"])
    check_classes(config, source)
    with pytest.raises(UserError, match=r"model.classes=2, but a folder has 3 classes"):
        check_classes(config, SimpleNamespace(name="a folder", labels=[0], classes=["cat", "dog", "cow"]))
    with pytest.raises(UserError, match="a folder has none"):
        check_classes(config, SimpleNamespace(name="a folder", labels=[], classes=[]))
    config.conditions = ("text",)
    check_classes(config, SimpleNamespace(name="a folder", labels=[], classes=[]))

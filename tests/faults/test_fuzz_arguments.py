"""Arguments of all kinds: the program starts with them, or ends with exit status 2 and a short error."""

import contextlib
import io

import program
import pytest
from fuzzing import fuzzed
from hypothesis import strategies as st

from diffjax import main as mains
from diffjax.check_config import check_stage
from diffjax.config import cascade_config, stage_config


def flat(config, prefix=""):
    for key, value in config.items():
        yield prefix + key
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")


KEYS = sorted(flat(stage_config()))
OWN = ["steps", "stages.base", "stages.base.train", "", *sorted(flat(cascade_config()))]
OTHERS = ["--mode", "--workdir", "--batch", "--num_processes", "--x", "--noconfig", "-", "--", "surplus"]
PLACES = st.one_of(
    st.sampled_from([f"--config.stages.base.train.{key}" for key in KEYS]),
    st.sampled_from([f"--config.{key}" for key in OWN] + OTHERS),
    st.text(max_size=9).map("--config.{}".format),
    st.text(max_size=9).map("--config.stages.base.train.data.{}".format),
)
SETTINGS = st.one_of(
    st.sampled_from(["", "0", "-1", "1", "1.5", "1e999", "nan", "inf", "true", "None", "[]", "(1,2)", "(1,"]),
    st.sampled_from(["9" * 5000, "x" * 10_000, "__import__('os').system('exit 3')", "lambda: 1", "[" * 500]),
    st.sampled_from(["\0", "\n", "{}"]),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)


@pytest.fixture(scope="module", autouse=True)
def _only_checked():
    """Instead of training, what is checked before it."""

    def run(config, workdir, mode):
        if "base" in config.stages and "train" in config.stages.base:
            check_stage(config.stages.base.train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mains, "run", run)
        yield


@fuzzed(st.lists(st.tuples(PLACES, SETTINGS, st.booleans()), min_size=1, max_size=2), few=100, many=3000)
def test_arguments(made, folder):
    given = [f"{place}={value}" if joined else place for place, value, joined in made]
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = program.call(patch, *program.arguments(folder / "run", folder, *given))
    assert status in (0, 2), err.getvalue()
    if status == 2:
        text = err.getvalue()
        assert text.startswith("error: ")
        assert len(text.splitlines()) <= 3
        assert "Traceback" not in text

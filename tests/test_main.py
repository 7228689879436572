"""Mistakes and faults, as a person at the keyboard meets them: a short answer, exit status 2, no trace."""

import importlib.util
import json
import os
import subprocess
import sys

import program
import pytest

from diffjax.training.checkpoint import FOLDER
from diffjax.workdir import hold

BASE = "--config.stages.base.train"


@pytest.fixture
def no_compilation(monkeypatch):
    """Whoever compiles fails: the mistake should have been seen before."""
    import jax

    def refuse(*args, **kwargs):
        raise AssertionError("the program went on to compile")

    monkeypatch.setattr("diffjax.run.compile_train_step", refuse)
    monkeypatch.setattr("diffjax.run.build_encoder", refuse)
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)


# Flags


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.bach_size=8", ["'bach_size'", "did you mean batch_size?"]),
        ("--config.steps\nor so=8", [r"--config.steps\nor so: there is no"]),
        (f"{BASE}.optimizer.learnin_rate=1", ["'learnin_rate'", "did you mean learning_rate?"]),
        (f"{BASE}.resolution.x=1", ["'x'", "no parts"]),
        ("--config.stages.bse.sampler.num_steps=1", ["'bse'", "did you mean base?"]),
        (f"{BASE}.batch_size=many", [f"{BASE}.batch_size", "many"]),
        (f"{BASE}.ema.decay=x", ["ema.decay", "x"]),
        ("--config.stages=5", ["--config.stages", "5"]),
        ("--mode=trian", ["--mode", "auto|train|sample|evaluate"]),
        ("--worksdir=x", ["worksdir", "Did you mean", "workdir"]),
        ("surplus", ["'surplus'", "--config.key=value"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_would_be_right(fails, argument, words):
    text = fails(argument)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--config=nothing.py"], ["nothing.py", "no such file", "--config=configs/quickstart.py"]),
        (["--config", "nothing.py"], ["nothing.py", "no such file"]),
        (["--config=tests"], ["tests", "no such file"]),
        (["--config=tests/program.py", "--config.steps=1"], ["tests/program.py", "get_config()"]),
        (["--config=setup.cfg"], ["setup.cfg, line", "syntax"]),
        ([], ["--config is missing", "--config=configs/quickstart.py"]),
    ],
)
def test_a_configuration_that_is_none_is_named(monkeypatch, capsys, given, words):
    monkeypatch.chdir(program.ROOT)
    assert program.call(monkeypatch, *given) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text


def test_a_wrong_flag_is_answered_before_jax_is_loaded(tmp_path):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    command = [sys.executable, "-m", "diffjax.main", f"--config={program.TINY}", "--config.bach_size=8"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{program.ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "error: --config.bach_size: there is no 'bach_size' here; did you mean batch_size?\n"
    )


# Values


@pytest.mark.usefixtures("no_compilation")
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (f"{BASE}.batch_size=12", ["batch_size=12", "8 devices", "16"]),
        (f"{BASE}.batch_size=0", ["batch_size=0"]),
        (f"{BASE}.mesh.fsdp=3", ["mesh.fsdp=3", "8"]),
        (f"{BASE}.resolution=24", ["data.resolution=64", "resolution=24"]),
        (f"{BASE}.resolution=-8", ["resolution=-8"]),
        (f"{BASE}.low_res.resolution=3", ["low_res.resolution=3", "resolution=8"]),
        (f"{BASE}.low_res.resolution=16", ["low_res.resolution=16", "smaller"]),
        (f"{BASE}.low_res.max_aug_level=1.5", ["low_res.max_aug_level=1.5"]),
        (f"{BASE}.crop=16", ["crop=16", "resolution=8"]),
        (f"{BASE}.crop=-4", ["crop=-4"]),
        (f"{BASE}.data.resolution=0", ["data.resolution=0"]),
        (f"{BASE}.text.drop=2.0", ["text.drop=2.0"]),
        (f"{BASE}.checkpoint.every=0", ["checkpoint.every=0"]),
        (f"{BASE}.checkpoint.keep=0", ["checkpoint.keep=0"]),
        (f"{BASE}.log_every=0", ["log_every=0"]),
        (f"{BASE}.preview.every=-1", ["preview.every=-1"]),
        (f"{BASE}.preview.count=0", ["preview.count=0"]),
        (f"{BASE}.ema.decay=1.5", ["ema: decay is 1.5"]),
        (f"{BASE}.seed=-1", ["seed=-1"]),
        (f"{BASE}.optimizer.decay=linear", ["optimizer", "'linear'", "'cosine'"]),
        (f"{BASE}.preview.sampler.num_steps=0", ["preview.sampler.num_steps=0"]),
        (f"{BASE}.preview.sampler.aug_level=2.0", ["preview.sampler.aug_level=2.0"]),
        (
            f"{BASE}.preview.sampler.solver.name=dimm",
            ["preview.sampler.solver.name='dimm'", "did you mean ddim?"],
        ),
        (f"{BASE}.preview.sampler.threshold.name=dinamic", ["did you mean dynamic?"]),
        (f"{BASE}.steps=0", ["steps=0"]),
        (f"{BASE}.low_res={{}}", ["stages.base.train.low_res.max_aug_level is missing"]),
    ],
)
def test_a_value_that_does_not_fit_is_refused_before_anything_is_compiled(fails, argument, words):
    text = fails(argument)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (f"{BASE}.model.name=dti", ["model.name='dti'", "did you mean dit?"]),
        (
            f"{BASE}.diffusion.schedule.name=cosin",
            ["diffusion.schedule.name='cosin'", "did you mean cosine?"],
        ),
        (
            f"{BASE}.diffusion.prediction.name=velocty",
            ["diffusion.prediction.name='velocty'", "did you mean velocity?"],
        ),
        (f"{BASE}.diffusion.times.name=unifrm", ["diffusion.times.name='unifrm'", "did you mean uniform?"]),
        (f"{BASE}.data.source=emojy", ["data.source='emojy'", "did you mean emoji?"]),
        (f"{BASE}.data.split=trian", ["'trian'", "train"]),
        (f"{BASE}.data.num_concepts=1000000", ["1000000"]),
        (f"{BASE}.text.encoder=minilmm", ["text.encoder='minilmm'", "did you mean minilm?"]),
        (f"{BASE}.text.length=1000", ["text.length=1000", "256"]),
        (f"{BASE}.model.heads=3", ["model", "3"]),
        (f"{BASE}.model.patch=3", ["model", "patches of 3"]),
        (f"{BASE}.dtype=float33", ["dtype='float33'", "did you mean float32"]),
    ],
)
def test_a_name_or_network_that_does_not_exist_is_answered_with_the_nearest(fails, argument, words):
    text = fails(argument)
    for word in words:
        assert word in text


def test_a_setting_that_a_network_does_not_have_is_answered_with_the_nearest(fails, monkeypatch, tmp_path):
    config = tmp_path / "misspelt.py"
    text = program.TINY.read_text()
    config.write_text(
        text.replace('base = stage(config, name="dit", patch=4', 'base = stage(config, name="dit", pach=4')
    )
    monkeypatch.setattr(program, "TINY", config)
    assert "model.pach is no setting of 'dit'; did you mean patch?" in fails()


# The working directory


def test_a_file_in_the_way_of_the_working_directory_is_named(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / "run") in fails(workdir=tmp_path / "file" / "run")


@pytest.mark.parametrize("name", [FOLDER, "config.tmp", "metrics.jsonl"])
def test_something_in_the_way_inside_the_working_directory_is_named(fails, tmp_path, name):
    place = tmp_path / "run" / "base" / name
    if name == FOLDER:
        place.parent.mkdir(parents=True)
        place.write_text("")
    else:
        place.mkdir(parents=True)
    assert str(place.parent) in fails()


def test_a_second_process_in_the_same_working_directory_is_sent_away(fails, tmp_path):
    with hold(tmp_path / "run" / "base"):
        text = fails()
    assert f"another process (number {os.getpid()})" in text
    assert str(tmp_path / "run" / "base") in text


def test_a_finished_run_says_so_and_does_nothing(run, own):
    before = {
        path: path.stat().st_mtime_ns for path in own.rglob("*") if path.is_file() and path.name != ".lock"
    }
    status, out, text = run("--mode=train")
    assert (status, text) == (0, "")
    assert [line.split(": ", 1)[0] for line in out.splitlines()] == ["base", "super_resolution"]
    assert out.count("is already trained for 6 steps.") == 2
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path for path in before if before[path] != after[path]} <= {
        own / stage / "config.json" for stage in ("base", "super_resolution")
    }


def test_a_contradicting_configuration_is_refused_and_nothing_is_lost(fails, own):
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file() and path.name != ".lock"}
    text = fails("--mode=train", f"{BASE}.seed=5")
    assert "seed: 0 there, 5 now" in text
    assert str(own / "base") in text
    assert {path: path.read_bytes() for path in before} == before


# Training


@pytest.mark.slow
def test_losses_that_are_no_numbers_stop_the_run_and_a_report_says_where_it_began(run, tmp_path):
    arguments = ("--mode=train", f"{BASE}.preview.every=0", f"{BASE}.checkpoint.every=1")
    recovery = (f"{BASE}.recovery.max_skips=2", f"{BASE}.recovery.max_rollbacks=1")
    status, _, text = run(*arguments, *recovery, f"{BASE}.optimizer.learning_rate=1e30")
    assert status == 2
    *said, text, examples, advice = text.splitlines()
    assert said == ["the checkpoint of step 2 is left behind as left-2."]
    text += examples + advice
    assert "error: base: from update 2 on 2 updates in a row" in text
    assert "gone back 1 times" in text
    assert "optimizer.learning_rate" in text
    assert "the checkpoint of step 1 is good" in text
    report = json.loads((tmp_path / "run" / "base" / "trouble-2.json").read_text())
    # With parameters of 1e30 it is a layer, or the square of what the last one gives.
    assert report["first not finite"].startswith(("the output of ", "the loss"))
    assert report["first not finite"] in text
    assert len(report["examples of the batch"]) == 8


def test_a_package_of_an_extra_that_is_missing_is_named(fails, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if "minilm" in name else find(name, *args)
    )
    text = fails("--mode=train")
    assert "diffjax[emoji]" in text

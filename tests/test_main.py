"""Mistakes and faults, as a person at the keyboard meets them: a short answer, exit status 2, no trace."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import program
import pytest

from diffjax.training.checkpoint import FOLDER
from diffjax.workdir import hold

BASE = "--config.stages.base.train"


@pytest.fixture
def run(monkeypatch, capsys, cache_dir, tmp_path):
    """Calls the program with the tiny configuration; returns exit status and what was printed."""

    def call(*extra, workdir=tmp_path / "run"):
        capsys.readouterr()
        status = program.call(monkeypatch, *program.arguments(workdir, cache_dir, *extra))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def fails(run):
    """Calls the program, which must fail in at most three lines; returns them."""

    def call(*extra, **options):
        status, _, text = run(*extra, **options)
        assert status == 2, text
        assert text.startswith("error: ")
        assert 1 <= len(text.splitlines()) <= 3
        assert "Traceback" not in text
        return text

    return call


@pytest.fixture
def no_compilation(monkeypatch):
    """Whoever compiles fails: the mistake should have been seen before."""
    import jax

    def refuse(*args, **kwargs):
        raise AssertionError("the program went on to compile")

    monkeypatch.setattr("diffjax.train.compile_train_step", refuse)
    monkeypatch.setattr("diffjax.train.build_encoder", refuse)
    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)


@pytest.fixture
def own(trained, tmp_path):
    """A copy of the trained cascade that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


# Flags


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.bach_size=8", ["'bach_size'", "did you mean batch_size?"]),
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


def test_a_loss_that_is_no_number_stops_and_keeps_the_good_checkpoint(fails, tmp_path):
    arguments = ("--mode=train", f"{BASE}.preview.every=0", f"{BASE}.checkpoint.every=1")
    text = fails(*arguments, f"{BASE}.optimizer.learning_rate=1e30")
    assert "base: " in text
    assert " became " in text
    assert "optimizer.learning_rate" in text
    step = int(text.split(" at step ")[1].split(";")[0])
    kept = [int(path.name) for path in (tmp_path / "run" / "base" / FOLDER).iterdir()]
    assert max(kept) == step - 1
    assert f"the checkpoint of step {step - 1} is good" in text


def test_a_package_of_an_extra_that_is_missing_is_named(fails, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if "minilm" in name else find(name, *args)
    )
    text = fails("--mode=train")
    assert "diffjax[emoji]" in text


# Sampling


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.prompts="], ["there are no prompts", "--config.prompts="]),
        (["--config.prompts=red apple; ;black cat"], ["prompt 2 of 3 is empty"]),
        (["--config.prompts=  "], ["prompt 1 of 1 is empty"]),
        (["--config.num_per_prompt=0"], ["num_per_prompt=0"]),
        (["--config.prompts_file=nothing.txt"], ["prompts_file=nothing.txt", "No such file"]),
        (["--config.prompts_file=tests"], ["prompts_file=", "directory"]),
    ],
)
def test_prompts_that_are_none_are_named(fails, arguments, words):
    text = fails("--mode=sample", *arguments)
    for word in words:
        assert word in text


def test_a_prompts_file_that_is_not_text_is_named(fails, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"red apple\n\xff\xfe\n")
    assert "is not UTF-8 text (byte 10)" in fails(
        "--mode=sample", f"--config.prompts_file={tmp_path}/prompts.txt"
    )


def test_a_stage_without_a_checkpoint_is_named(fails, own):
    shutil.rmtree(own / "super_resolution" / FOLDER)
    text = fails("--mode=sample")
    assert "'super_resolution'" in text
    assert "no checkpoint" in text
    (own / "super_resolution" / FOLDER).mkdir()
    assert "no checkpoint" in fails("--mode=evaluate")


def test_a_stage_that_was_never_trained_is_named(fails, tmp_path):
    assert str(tmp_path / "run" / "base") in fails("--mode=sample")


def test_stages_that_do_not_follow_each_other_are_named(fails, own):
    config = own / "super_resolution" / "config.json"
    settings = json.loads(config.read_text())
    settings["low_res"]["resolution"] = 4
    config.write_text(json.dumps(settings))
    text = fails("--mode=sample")
    assert "'super_resolution' (16 px) starts from 4 px" in text
    assert "a stage of 8 px" in text


@pytest.mark.parametrize(
    ("kernel", "words"),
    [("fast", "attention='fast' does not exist"), ("cudnn", "attention='cudnn': this kernel runs on GPUs")],
)
def test_a_kernel_of_attention_that_cannot_be_is_named(fails, own, kernel, words):
    assert words in fails("--mode=sample", f"--config.attention={kernel}")


def test_a_batch_of_samples_that_does_not_divide_is_named(fails, own):
    assert "batch_size=5 does not divide over 8 devices" in fails("--mode=sample", "--config.batch_size=5")


def test_a_damaged_checkpoint_of_a_stage_is_named(fails, own):
    for path in (own / "base" / FOLDER / "6" / "ema_params").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    assert "the checkpoint of step 6" in fails("--mode=sample")


def test_a_single_stage_cannot_be_sampled(monkeypatch, capsys, tmp_path):
    config = tmp_path / "stage.py"
    config.write_text("from diffjax.config import stage_config as get_config\n")
    assert program.call(monkeypatch, f"--config={config}", "--mode=sample", f"--workdir={tmp_path}") == 2
    assert "--mode=sample wants a cascade" in capsys.readouterr().err

"""Mistakes of those who sample what was trained: a short answer, exit status 2, no trace."""

import json
import os
import shutil

import program
import pytest

from diffjax.training.checkpoint import FOLDER


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

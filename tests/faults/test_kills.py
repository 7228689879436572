"""The program is killed, or asked to stop, wherever it is; the same command ends as if it had not been."""

import random
import signal

import program
import pytest
from runs import assert_same_cascades

STEP = "diffjax.training.metrics:MetricsBuffer.add"
SAVE = "diffjax.training.checkpoint:Checkpoints.save"

# Moments of a run: after which function, after how many of its calls, and within how many seconds, at most.
MOMENTS = {
    "preparation": ("diffjax.data.emoji:load_emoji", 1, 0.5),
    "compilation": ("diffjax.training.step:compile_train_step", 1, 3.0),
    "step": (STEP, 3, 0.02),
    "save": (SAVE, 2, 0.2),
    "seal": ("diffjax.training.manifest:write_seal", 2, 0.0),
    "restoring": ("diffjax.training.checkpoint:Checkpoints.restore", 1, 0.0),
    "preview": ("diffjax.train:show_preview", 1, 0.0),
    "end": ("diffjax.training.progress:TrainingProgress.say", 1, 0.0),
    "evaluation": ("diffjax.cascade:generate", 1, 0.5),
}
# Those of the evaluation come last: training must be done by then.
KILLS = ["step", "compilation", "save", "preparation", "seal", "preview", "save", "restoring", "step", "end"]
KILLS += [
    "compilation",
    "seal",
    "save",
    "step",
    "restoring",
    "save",
    "seal",
    "end",
    "evaluation",
    "evaluation",
]

SIGNALS = {
    "preparation": "before its first step",
    "compilation": "before its first step",
    "step": "saved",
    "save": "saved",
    "preview": "saved",
    "end": "at the end; it is trained and saved",
}


@pytest.mark.slow
def test_a_program_killed_at_twenty_random_moments_ends_as_if_it_had_not_been(trained, cache_dir, tmp_path):
    workdir, chance = tmp_path / "run", random.Random(20)
    assert len(KILLS) == 20
    for name in KILLS:
        where, calls, delay = MOMENTS[name]
        moment = (where, chance.randint(1, calls), chance.uniform(0.0, delay))
        stopped = program.start(workdir, cache_dir, signal=(*moment, int(signal.SIGKILL)))
        assert stopped.returncode == -signal.SIGKILL, (name, moment, stopped.stdout, stopped.stderr)
    done = program.start(workdir, cache_dir)
    assert done.returncode == 0, done.stderr
    assert_same_cascades(workdir, trained)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_at_every_phase_saves_and_the_same_command_goes_on(trained, cache_dir, tmp_path, number):
    workdir = tmp_path / "run"
    for name, told in SIGNALS.items():
        where, _, _ = MOMENTS[name]
        stopped = program.start(workdir, cache_dir, signal=(where, 1, 0.0, int(number)))
        assert stopped.returncode == 75, (name, stopped.stderr)
        assert len(stopped.stderr.splitlines()) == 1, stopped.stderr
        assert number.name in stopped.stderr
        assert told in stopped.stderr, name
    done = program.start(workdir, cache_dir)
    assert done.returncode == 0, done.stderr
    assert_same_cascades(workdir, trained)


@pytest.mark.slow
def test_the_wall_clock_may_jump(trained, cache_dir, tmp_path):
    code = """
import random, time
clock, chance = time.time, random.Random(0)
time.time = lambda: clock() + chance.uniform(-1e6, 1e6)
"""
    workdir = tmp_path / "run"
    done = program.start(workdir, cache_dir, code=code)
    assert done.returncode == 0, done.stderr
    assert_same_cascades(workdir, trained)

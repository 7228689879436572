"""The program is killed, or asked to stop, wherever it is; the same command ends as if it had not been."""

import random
import signal

import program
import pytest
from runs import STAGES, assert_same, assert_same_cascades

# Moments of a run: after the first call of which function, and within how many seconds then.
MOMENTS = {
    "preparation": ("diffjax.data.emoji:load_emoji", 0.5),
    "compilation": ("diffjax.training.step:compile_train_step", 3.0),
    "step": ("diffjax.training.metrics:MetricsBuffer.add", 0.005),
    "save": ("diffjax.training.checkpoint:Checkpoints.save", 0.2),
    "seal": ("diffjax.training.manifest:write_seal", 0.0),
    "restoring": ("diffjax.training.checkpoint:Checkpoints.restore", 0.0),
    "preview": ("diffjax.train:show_preview", 0.0),
    "end": ("diffjax.training.progress:TrainingProgress.say", 0.0),
    "evaluation": ("diffjax.cascade:generate", 0.0),
}
# In an order in which each is reached: those of the first stage, of the second, and of the evaluation.
KILLS = ["preparation", "compilation", "step", "seal", "restoring", "compilation", "save", "preview", "end"]
KILLS += ["preparation", "compilation", "step", "seal", "restoring", "save", "step", "preview", "end"]
KILLS += ["evaluation", "evaluation"]

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
        where, delay = MOMENTS[name]
        moment = (where, 1, chance.uniform(0.0, delay))
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
        where, _ = MOMENTS[name]
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
import time
from program import after
clock, ahead = time.time, [0.0]
time.time = lambda: clock() + ahead[0]
def jump(result, calls):  # a day back, then two days on, in each stage
    ahead[0] += {2: -86400.0, 5: 172800.0}.get(calls % 6, 0.0)
after("diffjax.training.metrics:MetricsBuffer.add", jump)
"""
    done = program.start(tmp_path, cache_dir, "--mode=train", code=code)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        # To Orbax a save during the second jump took too long; it is said, and the next one is as good.
        assert_same(tmp_path / stage, trained / stage, whole=False)

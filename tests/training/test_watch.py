import json
import subprocess
import sys

import numpy as np
import pytest

from diffjax.training.watch import HUNG, LossWatch

NAN = float("nan")


def watch(**changes):
    return LossWatch(**{"max_skips": 3, "spike": 8.0, "spike_steps": 4, **changes})


def see(watch, losses, start=1):
    """The first trouble, and the number of the update at which it was seen."""
    for step, loss in enumerate(losses, start):
        trouble = watch.see(step, loss, not np.isfinite(loss))
        if trouble:
            assert trouble.last == step
            return trouble
    return None


def noise(count, seed=0):
    """Losses as small batches have them: positive, skewed, with a long tail."""
    return np.random.default_rng(seed).lognormal(0.0, 0.5, count).tolist()


def test_so_many_skipped_updates_in_a_row_are_trouble():
    trouble = see(watch(), [1.0, NAN, NAN, 1.0, NAN, NAN, NAN, 1.0])
    assert (trouble.first, trouble.last, trouble.finite) == (5, 7, False)


def test_skipped_updates_with_others_between_them_are_counted_only():
    each = watch()
    assert see(each, [NAN, NAN, 1.0] * 20) is None
    assert each.skipped == 40


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_losses_and_lone_outliers_are_no_trouble(seed):
    losses = noise(5000, seed)
    for i in range(100, 5000, 37):
        losses[i : i + 3] = [1e3] * 3
    assert see(watch(), losses) is None


def test_losses_that_stay_high_are_a_spike_and_the_first_of_them_is_named():
    trouble = see(watch(), [*noise(300), *[50.0] * 10])
    assert (trouble.first, trouble.last, trouble.finite) == (301, 304, True)
    assert "50" in trouble.why


def test_skipped_updates_do_not_hide_where_a_spike_began():
    trouble = see(watch(), [*noise(300), 50.0, NAN, 50.0, NAN, NAN, 50.0, 50.0])
    assert (trouble.first, trouble.last) == (301, 307)


def test_losses_of_one_value_have_a_spread_too():
    assert see(watch(), [*[1.0] * 100, *[1.07] * 10]) is None
    assert see(watch(), [*[1.0] * 100, *[1.09] * 10]) is not None


def test_the_score_is_that_of_median_and_deviation():
    losses = noise(256)
    median = np.median(losses)
    spread = 1.4826 * np.median(np.abs(losses - median))
    assert see(watch(), [*losses, *[median + 7.99 * spread] * 10]) is None
    assert see(watch(), [*losses, *[median + 8.01 * spread] * 10]) is not None


def test_a_fall_is_none_and_nothing_is_said_before_there_is_something_to_compare_with():
    assert see(watch(), [*noise(300), *[1e-6] * 50]) is None
    assert see(watch(), [*[1.0] * 40, *[1e6] * 20]) is None


def test_spikes_can_be_left_alone():
    assert see(watch(spike=0.0), [*noise(300), *[1e9] * 300]) is None


@pytest.mark.parametrize("cut", [1, 150, 302, 303])
def test_it_goes_on_from_its_state_as_if_it_had_not_been_interrupted(cut):
    losses = [*noise(300), NAN, 50.0, 50.0, NAN, 50.0, 50.0, 1.0]
    whole = see(watch(), losses)
    one, other = watch(), watch()
    assert see(one, losses[:cut]) is None
    other.set_state(json.loads(json.dumps(one.get_state())))
    assert other.get_state() == one.get_state()
    assert see(other, losses[cut:], cut + 1) == whole is not None


def test_a_process_that_hangs_shows_its_threads_and_ends():
    code = """
import time
from diffjax.training.watch import Watchdog
def waits_for_ever():
    time.sleep(100)
with Watchdog(0.5) as dog:
    for _ in range(8):  # more than the limit, but it says that it is well
        time.sleep(0.1)
        dog.well()
    print("well", flush=True)
    waits_for_ever()
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == HUNG
    assert ended.stdout == "well\n"
    assert "hang_minutes" in ended.stderr
    assert "waits_for_ever" in ended.stderr


def test_nothing_ends_where_no_time_is_set_or_the_block_is_left():
    code = """
import time
from diffjax.training.watch import Watchdog
with Watchdog(0.0):
    time.sleep(0.2)
with Watchdog(0.1):
    pass
time.sleep(0.5)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

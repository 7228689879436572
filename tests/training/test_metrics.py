import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.training.metrics import MetricsBuffer, MetricsWriter, Share


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, steps, *, start_step):
    writer = MetricsWriter(folder, start_step=start_step)
    for step in steps:
        writer.scalars(step, {"loss": step / 10})
    writer.close()


def test_scalars_are_lines_of_json_and_on_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, start_step=0)
    writer.scalars(1, {"loss": 0.5, "grad_norm": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "grad_norm": 2.0}]  # at once, not at the end
    writer.image(1, "samples", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    (board,) = (tmp_path / "tensorboard").iterdir()
    content = board.read_bytes()
    assert b"loss" in content
    assert b"samples" in content


def test_a_resumed_run_writes_each_step_once(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5], start_step=0)
    write(tmp_path, [4, 5, 6], start_step=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "tail", ['{"step": 3, "lo', "\n", "[]\n", '{"loss": 1}\n', '{"step": null}\n', "\x00\x00"]
)
def test_what_a_killed_run_left_unfinished_is_removed(tmp_path, tail):
    write(tmp_path, [1, 2], start_step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    write(tmp_path, [3], start_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_bytes_that_are_no_text_do_not_stop_a_run(tmp_path):
    write(tmp_path, [1, 2], start_step=0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x80")
    write(tmp_path, [3], start_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_a_run_from_the_start_begins_the_file_anew(tmp_path):
    write(tmp_path, [1, 2], start_step=0)
    write(tmp_path, [1], start_step=0)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def filled(*losses):
    buffer = MetricsBuffer()
    for step, loss in enumerate(losses, 1):
        skipped = jnp.asarray(float(not np.isfinite(loss)))
        share = Share(jnp.asarray(2.0 * loss), jnp.asarray(2.0 * (step % 2)))
        metrics = {"loss": jnp.asarray(loss), "grad_norm": jnp.asarray(1.0), "skipped": skipped}
        buffer.add(step, {**metrics, "share": share})
    return buffer


def test_the_buffer_gives_means_and_leaves_the_newest():
    buffer = filled(1.0, 2.0, 6.0)
    assert buffer.read(leave=1) == {"loss": 1.5, "grad_norm": 1.0, "share": 3.0}
    assert buffer.read() == {"loss": 6.0, "grad_norm": 1.0, "share": 6.0}
    assert buffer.read() == {}


def test_a_newest_step_alone_is_left():
    assert filled(1.0).read(leave=1) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_updates_that_were_left_out_are_not_part_of_the_means(value):
    assert filled(1.0, value, 3.0).read() == {"loss": 2.0, "grad_norm": 1.0, "share": 2.0}
    assert filled(value).read() == {}


def test_each_update_is_seen_once_and_in_order():
    buffer = filled(1.0, float("nan"), 3.0)
    one, two = buffer.see(leave=1)
    assert one == (1, 1.0, False)
    assert (two.step, two.skipped) == (2, True)
    assert list(buffer.see(leave=1)) == []
    assert list(buffer.see()) == [(3, 3.0, False)]
    assert buffer.read()["loss"] == 2.0  # to see is not to read


def test_what_was_not_read_is_part_of_the_next_means_after_a_restart():
    whole, one, other = filled(1.0, 2.0, 6.0, float("nan"), 8.0), filled(1.0, 2.0, 6.0), MetricsBuffer()
    other.set_state(json.loads(json.dumps(one.get_state())))
    assert one.get_state() == other.get_state()
    skipped, last = jnp.asarray(1.0), {"skipped": jnp.asarray(0.0), "loss": jnp.asarray(8.0)}
    other.add(4, {"skipped": skipped, "loss": jnp.asarray(jnp.nan)})
    other.add(5, last)
    assert other.read()["loss"] == whole.read()["loss"] == 17.0 / 4.0
    assert other.read() == {}


def test_to_see_transfers_nothing_unasked():
    buffer = filled(1.0, 2.0)
    with jax.transfer_guard_device_to_host("disallow"):
        assert [seen.loss for seen in buffer.see()] == [1.0, 2.0]

"""Batches that are placed ahead of time: the order, the position, the wait, and errors."""

import threading
import time

import pytest

from diffjax.data import prefetch as module
from diffjax.data.prefetch import Prefetch


class Numbers:
    """Batches {"x": 0}, {"x": 1}, … of which the position is the next number."""

    def __init__(self, stop=None, start=0):
        self.next, self.stop, self.threads = start, stop, set()
        self.gate = threading.Event()
        self.gate.set()

    def __next__(self):
        self.gate.wait()
        self.threads.add(threading.get_ident())
        if self.next == self.stop:
            raise StopIteration
        self.next += 1
        return {"x": self.next - 1}

    def get_state(self):
        return {"next_index": self.next}


def until(condition):
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.005)
    return False


def test_batches_come_in_order_from_one_other_thread():
    loader = Numbers()
    batches = Prefetch(loader, lambda batch: batch["x"] * 10, ahead=3)
    assert [next(batches) for _ in range(20)] == list(range(0, 200, 10))
    batches.close()
    assert len(loader.threads) == 1
    assert threading.get_ident() not in loader.threads


def test_only_so_many_are_read_ahead():
    loader = Numbers()
    batches = Prefetch(loader, lambda batch: batch, ahead=2)
    assert until(lambda: loader.next == 2)
    time.sleep(0.05)
    assert loader.next == 2
    next(batches)
    assert until(lambda: loader.next == 3)
    time.sleep(0.05)
    assert loader.next == 3
    batches.close()


def test_the_position_is_that_of_the_batch_last_used():
    loader = Numbers(start=5)
    batches = Prefetch(loader, lambda batch: batch, ahead=4)
    for used in range(5):
        assert until(lambda used=used: loader.next == 5 + used + 4)
        assert batches.get_state() == {"next_index": 5 + used}
        next(batches)
    batches.close()
    assert batches.get_state() == {"next_index": 10}
    assert next(Prefetch(Numbers(start=10), lambda batch: batch))["x"] == 10


def test_the_wait_is_counted_once(monkeypatch):
    clock = iter([10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    batches = Prefetch(Numbers(), lambda batch: batch)
    next(batches)
    next(batches)
    monkeypatch.undo()
    assert batches.waited() == 3.5
    assert batches.waited() == 0.0
    batches.close()


def test_the_end_and_errors_reach_whoever_asks():
    batches = Prefetch(Numbers(stop=2), lambda batch: batch["x"], ahead=3)
    assert list(batches) == [0, 1]
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()

    def refuse(batch):
        if batch["x"] == 1:
            raise RuntimeError("no place")
        return batch["x"]

    batches = Prefetch(Numbers(), refuse)
    assert next(batches) == 0
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no place"):
            next(batches)
    assert batches.get_state() == {"next_index": 1}
    batches.close()


def test_none_ahead_is_refused():
    with pytest.raises(ValueError, match="ahead is 0"):
        Prefetch(Numbers(), lambda batch: batch, ahead=0)

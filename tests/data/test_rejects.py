"""Bad examples are skipped the same way everywhere, and each is named once, whatever happens to the file."""

import json
import threading

import numpy as np
import pytest

from diffjax.data.rejects import FILE, IN_A_ROW, Rejects
from diffjax.data.source import BadExample, Example
from diffjax.errors import UserError


class Broken:
    """A source of numbered pictures, of which some cannot be read; counts how often each is tried."""

    name, resolution, classes, labels = "broken", 8, (), ()

    def __init__(self, size, bad=()):
        self.captions = self.keys = self.concepts = self.styles = [f"{i}.png" for i in range(size)]
        self.bad, self.tried = set(bad), []

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        self.tried.append(i)
        if i in self.bad:
            raise BadExample(self.keys[i], f"reason {i % 2}", "more of it")
        return Example(np.full((8, 8, 3), i % 256, np.uint8), *[self.keys[i]] * 4)


def lines(folder, name=FILE):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_a_bad_example_is_replaced_by_the_next_usable_one_and_never_tried_again(tmp_path):
    source, rejects = Broken(10, {3, 4, 8, 9, 0}), Rejects(tmp_path)
    for _ in range(2):
        found = [rejects.usable(source, i) for i in range(10)]
        assert [place for place, _ in found] == [1, 1, 2, 5, 5, 5, 6, 7, 1, 1]
        assert all(example.key == source.keys[place] for place, example in found)
    assert all(source.tried.count(i) == 1 for i in source.bad)
    assert len(rejects) == 5
    assert "3.png" in rejects
    assert rejects.counts == {"reason 0": 3, "reason 1": 2}
    expected = [{"key": f"{i}.png", "reason": f"reason {i % 2}"} for i in (0, 3, 4, 8, 9)]
    assert lines(tmp_path) == expected


def test_threads_name_each_once(tmp_path):
    source, rejects = Broken(60, range(0, 60, 2)), Rejects(tmp_path)
    workers = [
        threading.Thread(target=lambda: [rejects.usable(source, i) for i in range(60)]) for _ in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(line["key"] for line in lines(tmp_path)) == sorted(f"{i}.png" for i in range(0, 60, 2))


@pytest.mark.parametrize("tail", ["", '{"key": "5.png", "rea', "x" * 9000])
def test_a_resumed_run_knows_what_was_skipped_and_drops_half_a_line(tmp_path, tail):
    """A program that is killed leaves half a line; long ones go back over several blocks."""
    first = Rejects(tmp_path)
    first.add("1.png", "truncated")
    first.add("naïve\ud800.png", "truncated")  # half a character, as names of files may have
    with (tmp_path / FILE).open("a") as file:
        file.write(tail)
    again = Rejects(tmp_path, resumed=True)
    assert "1.png" in again
    assert "5.png" not in again
    assert len(lines(tmp_path)) == 2
    source = Broken(3)
    assert again.usable(source, 1)[0] == 2  # mended, but the run goes on as it would have
    again.add("1.png", "truncated")
    again.add("7.png", "empty")
    found = lines(tmp_path)
    assert [line["key"] for line in found if line["key"].isascii() and "ud800" not in line["key"]] == [
        "1.png",
        "7.png",
    ]
    assert len(found) == 3


def test_processes_have_files_of_their_own_and_know_those_of_all(tmp_path):
    Rejects(tmp_path).add("a", "r")
    Rejects(tmp_path, process=1, resumed=True).add("b", "r")
    Rejects(tmp_path, process=1, resumed=True).found([("c", "r")], 1000)  # the first names what all know
    assert lines(tmp_path) == [{"key": "a", "reason": "r"}]
    assert lines(tmp_path, "rejects-1.jsonl") == [{"key": "b", "reason": "r"}]
    assert len(Rejects(tmp_path, process=2, resumed=True)) == 2


def test_a_run_that_begins_anew_knows_nothing_of_an_earlier_one(tmp_path):
    Rejects(tmp_path).add("a", "r")
    Rejects(tmp_path, process=3, resumed=True).add("b", "r")
    assert len(Rejects(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_line_of_ours_is_left_out(tmp_path):
    (tmp_path / FILE).write_bytes(
        b'[]\n{"key": 1}\n\xff\n' + b"[" * 100_000 + b'\n{"key": "a", "reason": "r"}\n'
    )
    assert Rejects(tmp_path, resumed=True).counts == {"r": 1}


def test_a_file_that_cannot_be_written_is_one_warning_and_is_written_later(tmp_path):
    said, path = [], tmp_path / FILE
    rejects = Rejects(tmp_path, log=said.append)
    path.symlink_to("/dev/full")
    source = Broken(9, {1, 3})
    assert [rejects.usable(source, i)[0] for i in (1, 3)] == [2, 4]
    assert len(said) == 1
    assert "warning: cannot write" in said[0]
    path.unlink()
    rejects.close()
    assert [line["key"] for line in lines(tmp_path)] == ["1.png", "3.png"]


# Of the whole: more than the share stops, but three of a small set do not, unless they are half of it.
@pytest.mark.parametrize(
    ("share", "bad", "listed", "stops"),
    [
        (0.01, 1, 3, False),
        (0.01, 3, 4, True),
        (0.01, 3, 20, False),
        (0.01, 4, 20, True),
        (0.01, 10, 1000, False),
        (0.01, 11, 1000, True),
        (0.0, 1, 10**6, True),
        (0.0, 0, 10, False),
        (1.0, 10, 10, False),
    ],
)
def test_more_than_the_allowed_share_before_the_training(tmp_path, share, bad, listed, stops):
    rejects = Rejects(tmp_path, max_share=share)
    examples = [(str(i), "the file is empty" if i else "truncated") for i in range(bad)]
    if not stops:
        rejects.found(examples, listed)
        return
    with pytest.raises(UserError, match=rf"{bad} of {listed:,} examples .*max_rejects={share:g} \(") as error:
        rejects.found(examples, listed)
    assert str(tmp_path) in str(error.value)
    assert len(lines(tmp_path)) == bad  # they are named first


def stopped_after(source, **options):
    """After how many examples, in the order of the source, a run stops; None if it never does."""
    rejects = Rejects(**options)
    for seen in range(5 * len(source)):
        try:
            rejects.usable(source, seen % len(source))
        except UserError:
            return seen + 1
    return None


def test_more_than_the_allowed_share_in_training():
    even = Broken(5000, range(0, 5000, 100))
    assert stopped_after(even, max_share=0.01) is None
    # 1.5 %: within three standard deviations of 1 % until enough was seen.
    assert 500 < stopped_after(Broken(5000, range(0, 5000, 66)), max_share=0.01) <= 5000
    # Every second one: the fifth bad one is beyond max(3, 0.1 + 3 * 0.3).
    assert stopped_after(Broken(5000, range(0, 5000, 2)), max_share=0.01) == 7
    assert stopped_after(Broken(5000, {20}), max_share=0.0) == 21
    # A small set, again and again: a second epoch meets no new bad ones.
    assert stopped_after(Broken(20, {1, 5, 9}), max_share=0.01) is None


def test_a_run_that_is_resumed_does_not_take_the_known_for_a_bad_beginning(tmp_path):
    for i in range(30):
        Rejects(tmp_path, resumed=True).add(f"{i}.png", "r")
    rejects, source = Rejects(tmp_path, resumed=True, max_share=0.01), Broken(5000)
    for i in range(100, 300):
        rejects.usable(source, i)
    rejects.check()


def test_data_that_are_gone_end_the_run():
    with pytest.raises(UserError, match=r"None of 1,000 examples in a row .*500: reason 0"):
        Rejects().usable(Broken(2 * IN_A_ROW, range(2 * IN_A_ROW)), 7)
    with pytest.raises(UserError, match="None of 4 examples"):
        Rejects().usable(Broken(4, range(4)), 0)

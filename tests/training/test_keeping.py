import pytest

from diffjax.training import keeping

LOSSES = {100: 0.5, 200: 0.3, 300: 0.4, 400: 0.3, 500: float("nan"), 600: None}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"keep": 1}, {600}),
        ({"keep": 2}, {500, 600}),
        ({"keep": 0}, {600}),  # one is needed to go on from
        ({"keep": 10}, set(LOSSES)),
        ({"keep": 1, "keep_every": 300}, {300, 600}),
        ({"keep": 1, "keep_every": 200}, {200, 400, 600}),
        ({"keep": 1, "keep_best": 1}, {400, 600}),  # of two that are as good, the later
        ({"keep": 1, "keep_best": 3}, {200, 300, 400, 600}),
        ({"keep": 2, "keep_every": 100, "keep_best": 1}, set(LOSSES)),
    ],
)
def test_the_newest_those_at_intervals_and_the_best_are_kept(rules, expected):
    assert keeping.kept(LOSSES, **rules) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), None])
def test_a_loss_that_is_no_number_is_not_the_best(bad):
    assert keeping.kept({1: bad, 2: 0.5, 3: 0.9}, keep=1, keep_best=1) == {2, 3}


def test_only_folders_with_the_name_of_a_step_are_checkpoints(tmp_path):
    for name in ("7", "100", "damaged-3", "left-4", "9.orbax-checkpoint-tmp", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "5").write_text("a file")
    assert keeping.steps_in(tmp_path) == [7, 100]
    assert keeping.steps_in(tmp_path / "nowhere") == []


def test_what_is_put_away_never_replaces_what_was_put_away_before(tmp_path):
    for i in range(3):
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "file").write_text(str(i))
        keeping.put_away(tmp_path, 7, keeping.DAMAGED)
    names = ["damaged-7", "damaged-7-2", "damaged-7-3"]
    assert [(tmp_path / name / "file").read_text() for name in names] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (2**31, "2.0 GiB"), (2**51, "2,097,152.0 GiB")],
)
def test_sizes_are_for_people(size, text):
    assert keeping.words(size) == text

"""Mode `evaluate` in two processes, with the real feature network."""

import csv
import shutil

import program
import pytest

ASKED = ["--mode=evaluate", "--config.evaluate.num_images=20", "--config.evaluate.num_restored=6"]
ASKED += ["--config.evaluate.splits=('train', 'heldout_pairs')", "--config.batch_size=8"]


def results(workdir):
    with (workdir / "evaluation" / "results.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_measure_what_one_does(trained, cache_dir, tmp_path):
    tables = []
    for count in (1, 2):
        workdir = shutil.copytree(trained, tmp_path / str(count))
        argv, port = program.arguments(workdir, cache_dir, *ASKED), program.free_port()
        processes = [program.start_one_of(number, count, port, argv) for number in range(count)]
        statuses, outputs, errors = program.finish(*processes, timeout=400)
        assert statuses == [0] * count, errors
        assert "retrieval top1" in outputs[0]
        if count == 2:
            assert "sampling" not in outputs[1].lower()  # the first speaks
        tables.append(results(workdir))
        assert (workdir / "report.html").stat().st_size > 10_000
    one, two = tables
    assert [row["name"] for row in one] == [row["name"] for row in two]
    assert len(one) > 8
    for expected, found in zip(one, two, strict=True):
        # Pixels may round to the other side, which networks of features amplify.
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if name not in ("split", "name", "resolution") and value:
                assert float(found[name]) == pytest.approx(float(value), rel=1e-2, abs=1e-2), (
                    expected["name"],
                    name,
                )

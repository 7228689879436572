import csv
import io
import json
import math

from diffjax.evaluation.errorbars import Value
from diffjax.evaluation.tables import Result, shown, to_csv, to_json, to_text

RESULTS = [
    Result(
        "train", "as configured", {}, 500, 50, {"FD": Value(12.345, 0.21), "recall": Value(0.5, math.nan)}
    ),
    Result("train", "steps", {"num_steps": 4}, 500, 8, {"FD": Value(20.0, 1.6)}),
    Result("train", "nearest", {}, 64, 0, {"PSNR (dB)": Value(math.inf, math.nan)}),
]


def test_a_number_has_the_digits_that_its_error_leaves():
    assert shown(Value(12.345, 0.21)) == "12.35 ± 0.21"
    assert shown(Value(1234.5, 160.0)) == "1234 ± 160"
    assert shown(Value(0.00123, 0.000045)) == "0.001230 ± 0.000045"
    assert shown(Value(0.5, math.nan)) == "0.5"
    assert shown(Value(1.0, 0.0)) == "1"
    assert shown(Value(math.inf, math.nan)) == "∞"
    assert shown(Value(math.nan, math.nan)) == shown(None) == "–"


def test_csv_and_json_hold_every_number_exactly_and_nothing_for_what_is_unknown():
    rows = list(csv.DictReader(io.StringIO(to_csv(RESULTS))))
    assert [row["num_steps"] for row in rows] == ["", "4", ""]
    assert float(rows[0]["FD"]) == 12.345
    assert float(rows[1]["FD error"]) == 1.6
    assert rows[0]["recall error"] == rows[1]["recall"] == rows[2]["FD"] == rows[2]["nfe"] == ""
    assert rows[2]["PSNR (dB)"] == "inf"
    found = json.loads(to_json(RESULTS, seed=3), parse_constant=lambda name: 1 / 0)
    assert found["seed"] == 3
    assert found["results"][0]["scores"]["FD"] == {"value": 12.345, "error": 0.21}
    assert found["results"][2]["scores"]["PSNR (dB)"] == {"value": None, "error": None}


def test_tables_are_aligned_narrow_enough_and_without_columns_that_are_foreign():
    text = to_text(RESULTS, width=60)
    first, second = text.split("\n\n")[0], text.split("\n\n")[-1]
    assert max(map(len, text.splitlines())) <= 60
    assert "PSNR" not in first
    assert "FD" not in second
    lines = first.splitlines()
    assert lines[1].index("as configured") == lines[2].index("steps")
    assert lines[1].rindex("50 ") - lines[2].rindex("8 ") == -1

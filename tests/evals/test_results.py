"""results.jsonl: kept at once, read back, and never believed where it is damaged."""

import json
import math

import pytest

from bsbr_pl.results import Results

IDENTITY = {"kind": "cost", "checkpoint": "abc", "length": 256, "environment": {"dtype": "float32"}}


def test_rows_are_kept_at_once_and_found_again(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    results = Results(path)
    assert results.get(IDENTITY) is None
    results.add(IDENTITY, {"a": 1, "b": math.nan}, {"command": "x"})
    assert len(path.read_text().splitlines()) == 1
    again = Results(path)
    assert again.get(dict(reversed(IDENTITY.items()))) == {"a": 1, "b": None}, "the order of keys does not matter"
    assert again.rows == results.rows
    for other in ({"length": 512}, {"environment": {"dtype": "bfloat16"}}, {"kind": "text"}):
        assert again.get(IDENTITY | other) is None


def test_the_last_of_equal_rows_counts(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add(IDENTITY, {"a": 1}, {})
    results.add(IDENTITY, {"a": 2}, {})
    assert [row["values"] for row in Results(results.path).rows] == [{"a": 2}]


@pytest.mark.parametrize("damage", [b'{"identity": {"kind"', b"\xff\xfe\n", b"[1, 2]\n", b'{"identity": 3}'])
def test_damaged_lines_are_left_out_and_said(tmp_path, damage):
    path = tmp_path / "results.jsonl"
    Results(path).add(IDENTITY, {"a": 1}, {})
    with path.open("ab") as stream:
        stream.write(damage)
    with pytest.warns(UserWarning, match="1 damaged lines"):
        results = Results(path)
    results.add(IDENTITY | {"length": 512}, {"a": 2}, {})
    assert [json.loads(line)["values"]["a"] for line in path.read_text().splitlines()] == [1, 2]
    assert len(Results(path).rows) == 2

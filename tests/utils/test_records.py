"""What a number depends on, and how it is kept."""

import errno
import json
import math
import os
import subprocess

import pytest
import torch

import bsbr_pl
from bsbr_pl.attention import LinearAttention
from bsbr_pl.utils import records
from bsbr_pl.utils.code import foreign_code
from bsbr_pl.utils.files import write_json
from bsbr_pl.utils.records import environment, git_commit


def test_environment_is_plain_and_says_what_times_depend_on():
    import json

    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == torch.get_num_threads()
    assert found["device"] == "cpu"
    assert found["cpu"]
    assert {"python", "torch", "lightning", "bsbr_pl"} <= set(found["versions"])
    assert "gpu" not in found


class Own(LinearAttention):
    """A class that is not of this package."""


class Further(Own):
    """A class of it."""


def test_code_of_others_is_that_of_a_class_and_of_its_bases():
    (code,) = foreign_code(Further(8, 2))
    assert [line for line in code.splitlines() if line.startswith("class ")] == [
        "class Further(Own):",
        "class Own(LinearAttention):",
    ]


def test_a_reader_never_sees_half_a_record(tmp_path):
    path = tmp_path / "deep" / "record.json"
    write_json(path, {"a": [1.0, math.nan, -math.inf], "b": (2,), 3: torch.float32})
    assert json.loads(path.read_text()) == {"a": [1.0, None, None], "b": [2], "3": "torch.float32"}
    circular: list = []
    circular.append(circular)
    with pytest.raises((ValueError, RecursionError)):
        write_json(path, circular)
    assert json.loads(path.read_text())["b"] == [2], "the old one is still whole"
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_the_commit_is_looked_for_beside_this_package():
    assert records.PACKAGE.samefile(bsbr_pl.__file__)


def test_git_commit_is_that_of_the_code(tmp_path, monkeypatch):
    package = tmp_path / "bsbr_pl" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr("bsbr_pl.utils.records.PACKAGE", package)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    assert git_commit() is None, "no repository"
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "other").write_text("")
    subprocess.run([*git, "add", "other"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "other"], check=True)
    assert git_commit() is None, "a repository that does not track this code"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_commit() == {"commit": commit, "changed": False}
    package.write_text("changed")
    assert git_commit() == {"commit": commit, "changed": True}


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "record.json", []

    def fsync(number: int) -> None:
        (aside,) = tmp_path.iterdir()
        done.append((os.fstat(number).st_size, aside.name != path.name, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(path, {"a": 1})
    assert done == [(len('{"a": 1}'), True, False)]
    assert path.read_text() == '{"a": 1}'


def test_a_file_that_cannot_be_written_leaves_nothing_but_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*record.json'"):
        write_json(path, {"a": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
    assert path.read_text() == '{"a": 1}'

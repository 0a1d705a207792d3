"""results.jsonl: kept at once, read back, checked; and no line is ever lost."""

import copy
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsbr_pl.results import KINDS, Job, NotKeptError, Results, check, open_problems, read_rows
from bsbr_pl.schema import MAX_DEPTH
from bsbr_pl.values import finite

IDENTITY = {"kind": "cost", "checkpoint": "abc", "length": 256, "environment": {"dtype": "float32"}}
ABOUT = {"checkpoint": {"name": "a.ckpt", "digest": "1", "body": "abc"}}


def row(**changes: Any) -> dict[str, Any]:
    return {"schema": 3, "identity": IDENTITY, "about": ABOUT, "values": {"state_bytes": 1}} | changes


def test_rows_are_kept_at_once_and_found_again(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    results = Results(path)
    assert results.get(IDENTITY) is None
    results.add(IDENTITY, {"state_bytes": 1, "forward_flops": math.nan}, {"command": "x"})
    assert len(path.read_text().splitlines()) == 1
    again = Results(path)
    found = {"state_bytes": 1, "forward_flops": None}
    assert again.get(dict(reversed(IDENTITY.items()))) == found, "the order of keys does not matter"
    assert again.rows == results.rows
    for other in ({"length": 512}, {"environment": {"dtype": "bfloat16"}}, {"kind": "text"}):
        assert again.get(IDENTITY | other) is None


def test_the_last_of_equal_rows_counts(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add(IDENTITY, {"state_bytes": 1}, {})
    results.add(IDENTITY, {"state_bytes": 2}, {})
    assert [row["values"] for row in Results(results.path).rows] == [{"state_bytes": 2}]


def test_without_a_path_rows_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = Results(None)
    results.add(IDENTITY, {"state_bytes": 1}, {})
    results.read()
    with results.claim(IDENTITY, wait=False) as claimed:
        assert claimed
    assert results.get(IDENTITY) == {"state_bytes": 1}
    assert list(tmp_path.iterdir()) == []


DAMAGE = {
    "half a row": b'{"schema": 3, "identity": {"kind"',
    "no text": b"\xff\xfe",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "identity of another type": b'{"schema": 3, "identity": 3, "about": {}, "values": {}}',
    "without values": b'{"schema": 3, "identity": {"kind": "cost", "checkpoint": "a"}, "about": {}}',
    "another schema": json.dumps(row(schema=4)).encode(),
    "schema of another type": json.dumps(row(schema=True)).encode(),
    "unknown kind": json.dumps(row(identity=IDENTITY | {"kind": "song"})).encode(),
    "kind of another type": json.dumps(row(identity=IDENTITY | {"kind": ["cost"]})).encode(),
    "time of another type": json.dumps(row(values={"forward": 3})).encode(),
    "text for a number": json.dumps(row(values={"state_bytes": "many"})).encode(),
    "name of another type": json.dumps(row(about={"checkpoint": "a.ckpt"})).encode(),
    "deep": b'{"schema": 3, "values": ' + b"[" * 100_000,
    "deep but whole": json.dumps(row(values={"x": [[[[[[[[3]]]]]]]]})).encode(),
    "huge number": b'{"schema": 3, "values": ' + b"9" * 10_000 + b"}",
    "nul": b"\x00" * 4096,
    "brackets": b"[" * 200_000 + b"]" * 200_000,
    "objects in objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a comment": b"# rows of 24 November, by hand",
    "not a number": json.dumps(row(values={"state_bytes": math.nan})).encode(),
    "infinite": json.dumps(row()).encode().replace(b'"state_bytes": 1', b'"state_bytes": 1e999'),
    "too large to be squared": json.dumps(row(values={"state_bytes": 1e308})).encode(),
    "beyond 64 bits": json.dumps(row(values={"state_bytes": 2**63})).encode(),
    "beyond 64 bits in the description": json.dumps(row(about={"config": {"x": [-(2**63)]}})).encode(),
    "a name twice": json.dumps(row()).encode()[:-1] + b', "values": {"state_bytes": 2}}',
    "a number as text": json.dumps(row(identity=IDENTITY | {"length": "256"})).encode(),
    "a certificate of nothing": json.dumps(row(identity=IDENTITY | {"kind": "certificate"}, values={})).encode(),
    "passed in words": json.dumps(row(identity=IDENTITY | {"kind": "certificate"},
                                      values={"passed": "no", "length": 8, "checks": []})).encode(),
    "checks as text": json.dumps(row(identity=IDENTITY | {"kind": "certificate"},
                                     values={"passed": True, "length": 8, "checks": "x"})).encode(),
    "passed as a number": json.dumps(row(identity=IDENTITY | {"kind": "certificate"},
                                         values={"passed": 1, "length": 8, "checks": []})).encode(),
}  # fmt: skip


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_lines_are_left_out_said_once_and_kept(tmp_path, damage, end):
    path = tmp_path / "results.jsonl"
    Results(path).add(IDENTITY, {"state_bytes": 1}, {})
    with path.open("ab") as stream:
        stream.write(damage + end)
    said = r"results.jsonl: 1 lines .* are left out; they stay in the file \(line 2: .{5,220}\)$"
    with pytest.warns(UserWarning, match=said):
        results = Results(path)
    results.add(IDENTITY | {"length": 512}, {"state_bytes": 2}, {})
    results.read()  # without another warning, which would be an error
    first, kept, *others = path.read_bytes().split(b"\n")
    assert json.loads(first)["values"] == {"state_bytes": 1}
    assert kept == damage + end.strip(b"\n")
    assert [json.loads(line)["values"] for line in others if line] == [{"state_bytes": 2}], "no row is swallowed"
    with pytest.warns(UserWarning, match="1 lines"):
        assert [one["values"] for one in Results(path).rows] == [{"state_bytes": 1}, {"state_bytes": 2}]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("whole", [True, False])
def test_what_people_write_into_the_file_stays_and_every_row_counts(tmp_path, end, whole):
    path = tmp_path / "results.jsonl"
    lines = [json.dumps(row(identity=IDENTITY | {"length": n})).encode() for n in (1, 2, 3)]
    foreign = [b"// mine", b"", b"   ", b'{"my": "note"}', "größer".encode("utf-16")]
    content = b"\xef\xbb\xbf" + end.join([lines[0], *foreign, *lines[1:]]) + end * whole
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"3 lines .*\(line 2: "):
        results = Results(path)
    results.add(IDENTITY | {"length": 4}, {"state_bytes": 4}, {})
    added = path.read_bytes().removeprefix(content)
    assert path.read_bytes().startswith(content), "not a byte of it has changed"
    assert json.loads(added)["identity"]["length"] == 4
    with pytest.warns(UserWarning, match="3 lines"):
        assert [one["identity"]["length"] for one in read_rows([path])] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_named(tmp_path, kind):
    path = tmp_path / "results.jsonl"
    (Path.mkdir if kind == "folder" else os.mkfifo)(path)
    for call in (Results, lambda path: read_rows([path])):
        with pytest.raises(OSError, match=r"is no file: .*results\.jsonl"):
            call(path)


def test_a_file_that_cannot_be_written_is_named_and_its_rows_are_kept_in_memory(tmp_path, monkeypatch):
    results = Results(tmp_path / "results.jsonl")
    results.add(IDENTITY, {"state_bytes": 1}, {})

    def refuse(path: Path, mode: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(NotKeptError, match=r"Read-only file system: .*results\.jsonl"):
        results.add(IDENTITY | {"length": 512}, {"state_bytes": 2}, {})
    assert [one["values"]["state_bytes"] for one in results.rows] == [1, 2]


@pytest.mark.parametrize("kind", ["link", "file", "of another user"])
def test_a_lock_folder_that_is_not_ones_own_is_not_used(tmp_path, kind, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    folder, results = tmp_path / ".lock", Results(tmp_path / "results.jsonl")
    if kind == "link":
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        folder.write_text("mine")
    else:
        monkeypatch.setattr(os, "getuid", lambda: folder.parent.stat().st_uid + 1)
    with pytest.warns(
        UserWarning, match=r"\.lock cannot be used for locks \(.*another process .* may measure the same"
    ):
        results.add(IDENTITY, {"state_bytes": 1}, {})
    with results.claim(IDENTITY | {"length": 512}, wait=False) as claimed:
        assert claimed, "and it is said once"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert len(results.path.read_text().splitlines()) == 1


def test_nobody_else_can_read_the_folder_of_locks(tmp_path):
    (tmp_path / ".lock").mkdir(mode=0o777)
    Results(tmp_path / "results.jsonl").add(IDENTITY, {"state_bytes": 1}, {})
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o700


def test_a_row_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    results = Results(tmp_path / "results.jsonl")
    results.add(IDENTITY, {"state_bytes": 1}, {})
    length = len(results.path.read_bytes())
    monkeypatch.setattr("bsbr_pl.results.MAX_LINE", length)
    with pytest.raises(ValueError, match=f"^a row of {length + 1} bytes is longer than {length}: measure fewer values"):
        results.add(IDENTITY, {"state_bytes": 12}, {})
    results.add(IDENTITY, {"state_bytes": 2}, {})
    assert [one["values"] for one in Results(results.path).rows] == [{"state_bytes": 2}]


def test_a_whole_row_without_a_newline_counts_and_swallows_none(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row()))
    results = Results(path)
    results.add(IDENTITY | {"length": 512}, {"state_bytes": 2}, {})
    results.read()
    assert [one["values"]["state_bytes"] for one in results.rows] == [1, 2]
    assert [one["values"]["state_bytes"] for one in Results(path).rows] == [1, 2]


def test_rows_of_another_schema_are_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"identity": IDENTITY, "about": {}, "values": {}}) + "\n")
    with pytest.warns(UserWarning, match="1 lines that are no rows of schema 3 are left out"):
        assert Results(path).rows == []


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add(IDENTITY, {"state_bytes": 1}, {})
    results.add(IDENTITY | {"length": 512}, {"state_bytes": 2}, {})
    results.read()
    results.path.write_text(json.dumps(row(values={"state_bytes": 3})) + "\n")
    results.read()
    assert [one["values"] for one in results.rows] == [{"state_bytes": 3}]
    longer = tmp_path / "written by an editor"
    longer.write_text("".join(json.dumps(row(identity=IDENTITY | {"length": n})) + "\n" for n in range(9)))
    longer.replace(results.path)
    results.read()
    assert [one["identity"]["length"] for one in results.rows] == list(range(9))


def test_a_row_that_is_not_of_the_schema_is_not_written(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for values in ({"forward": 3}, {"state_bytes": "x"}, {"forward": {"seconds": 1.0}}):
        with pytest.raises(ValueError, match="values"):
            results.add(IDENTITY, values, {})
    assert not results.path.exists()
    assert results.rows == []


def test_what_is_wrong_is_named():
    for change, message in (
        ({"schema": 2}, "schema 3"),
        ({"identity": {"kind": "cost"}}, "identity lacks checkpoint"),
        ({"identity": IDENTITY | {"length": "x"}}, "identity.length must be of type int"),
        ({"identity": IDENTITY | {"length": True}}, "identity.length must be of type int"),
        ({"values": {"forward": {"seconds": 1, "interval": [1, "x"], "samples": []}}}, r"forward.interval\[\]"),
        ({"about": {"run": {"steps": 1.5}}}, "about.run.steps must be of type int"),
        ({"about": {"attention": "bsbr"}}, "about.attention must be of type list"),
    ):
        with pytest.raises(ValueError, match=message):
            check(row(**change))


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else 0


CERTIFICATE = {
    "passed": True,
    "length": 19,
    "checks": [{"name": "suffix_0", "measured": 0.0, "limit": 1e-8, "passed": True}],
}
TEXT = {
    "loss": 1.0,
    "perplexity": math.e,
    "accuracy": 0.5,
    "bits_per_byte": 0.5,
    "tokens": 8,
    "bytes": 16,
    "documents": 2,
    "interval": {"loss": [1.0, 1.0], "accuracy": [0.5, 0.5], "bits_per_byte": [0.5, 0.5]},
    "blocks": {"nats": [2 * math.log(2), 6 * math.log(2)], "bytes": [6, 10]},
    "by_position": [],
    "recall": [],
}


@pytest.mark.parametrize(
    ("kind", "values", "changes", "words"),
    [
        ("certificate", CERTIFICATE, {"measured": 0.5}, "values.passed=true, but suffix_0 is 0.5, above 1e-08"),
        ("certificate", CERTIFICATE, {"measured": None}, "values.passed=true, but suffix_0 is None, above 1e-08"),
        ("certificate", CERTIFICATE, {"passed": False}, "values.passed=true, but suffix_0 is 0.0, above 1e-08"),
        ("text", TEXT, {"bits_per_byte": 0.4}, "values.bits_per_byte=0.4, but 0.5000 follows from its blocks"),
        ("text", TEXT, {"blocks": {"nats": [1.0], "bytes": [0]}}, "values.bits_per_byte=0.5, but nan follows"),
        ("text", TEXT, {"blocks": {"nats": [1e3], "bytes": [1]}}, "values.bits_per_byte=0.5, but 1442.6950 follows"),
    ],
)
def test_a_row_that_contradicts_itself_is_no_row(kind, values, changes, words):
    of = {"text": {"split": "val", "data": "f", "length": 8}}.get(kind, {})
    one = row(identity=IDENTITY | {"kind": kind} | of, values=copy.deepcopy(values))
    check(one)
    (one["values"]["checks"][0] if kind == "certificate" else one["values"]).update(changes)
    with pytest.raises(ValueError, match=words):
        check(one)


def test_a_row_has_at_most_eight_levels():
    check(row(about={"config": {"x": nested(MAX_DEPTH - 3)}}))
    with pytest.raises(ValueError, match="at most 8 levels"):
        check(row(about={"config": {"x": nested(MAX_DEPTH - 2)}}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=9), part, max_size=3),
    max_leaves=9,
)


@given(JSON, st.sampled_from(["schema", "identity", "about", "values", "checkpoint", "run", "data", "kind", "length"]))
def test_any_json_is_a_row_or_a_value_error(value, where):
    changed = row()
    if where in changed:
        changed[where] = value
    elif where in ("run", "data", "checkpoint"):
        changed["about"] = ABOUT | {where: value}
    else:
        changed["identity"] = IDENTITY | {where: value}
    for one in (changed, value):
        with suppress(ValueError):
            check(one)


@pytest.mark.parametrize("kind", KINDS)
@given(value=JSON)
def test_values_of_any_form_are_kept_or_refused(kind, value):
    values = {"png": value, "problem": value, "metrics": value, "forward": value, "checks": value, "caption": "x"}
    results, identity = Results(None), {"kind": kind, "checkpoint": "a"}
    with suppress(ValueError):
        results.add(identity, values, {})
        assert results.get(identity) == finite(values)


def test_files_of_several_machines_are_merged(tmp_path):
    first, second = Results(tmp_path / "a" / "results.jsonl"), Results(tmp_path / "b" / "results.jsonl")
    first.add(IDENTITY, {"state_bytes": 1}, {})
    first.add(IDENTITY | {"length": 1}, {"state_bytes": 2}, {})
    second.add(IDENTITY, {"state_bytes": 3}, {})
    merged = read_rows([first.path, second.path])
    assert [(one["identity"]["length"], one["values"]["state_bytes"]) for one in merged] == [(256, 3), (1, 2)]
    with pytest.raises(OSError, match="nowhere"):
        read_rows([tmp_path / "nowhere"])


def problem(words: str, checkpoint: str, **of: Any) -> dict[str, Any]:
    identity = {"kind": "problem", "checkpoint": checkpoint, "of": of}
    return {"schema": 3, "identity": identity, "about": {}, "values": {"problem": words}}


def test_a_problem_counts_until_its_row_is_there():
    text = row(identity={"kind": "text", "checkpoint": "abc", "length": 32, "split": "val"})
    problems = [
        problem("it had no memory", "abc", kind="cost", length=256),
        problem("it had no memory", "abc", kind="cost", length=512),
        problem("gone", "abc", kind="text", length=32, split="val"),
        problem("gone", "abc", kind="text", length=32, split="test"),
        problem("the data changed", "abc", kind="data"),
        problem("", "other", kind="data"),
        problem("damaged", "a.ckpt", kind="checkpoint"),
        problem("damaged", "b.ckpt", kind="checkpoint"),
    ]
    left = open_problems([row(), text, *problems])
    assert left == [problems[1], problems[3], problems[4], problems[7]]


def test_jobs_are_run_once_and_an_error_frees_its_lock(tmp_path):
    results, ran = Results(tmp_path / "results.jsonl"), []
    jobs = [Job(IDENTITY | {"length": length}, {}, lambda: {"state_bytes": 1}) for length in (1, 2, 3)]

    def run(job: Job) -> None:
        ran.append(job.identity["length"])
        if ran == [1, 2]:
            raise KeyboardInterrupt
        results.add(job.identity, job.measure(), job.about)

    with pytest.raises(KeyboardInterrupt):
        results.share(jobs, run)
    results.share(jobs, run)
    results.share(jobs, run)
    assert ran == [1, 2, 2, 3]


def append(path: Path, start: int) -> None:
    results = Results(path)
    for i in range(start, start + 40):
        results.add(IDENTITY | {"length": i}, {"state_bytes": i}, {"command": "x" * 5000})


def test_many_processes_append_whole_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=append, args=(path, 100 * i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert {one["values"]["state_bytes"] for one in read_rows([path])} == {
        100 * i + j for i in range(3) for j in range(40)
    }


def test_rows_are_read_without_torch():
    code = "import sys; sys.modules['torch'] = None; import bsbr_pl.results, bsbr_pl.values; print('read')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "read\n", done.stderr


def test_what_another_process_gave_up_is_measured_at_the_end_and_what_it_measured_is_not(monkeypatch):
    """Another process has locked lengths 1 and 3: it gives up 1, and measures 3 while this one waits."""
    results, ran = Results(None), []
    jobs = [Job(IDENTITY | {"length": length}, {}, lambda: {"state_bytes": 1}) for length in (1, 2, 3)]

    @contextmanager
    def claim(identity: dict[str, Any], wait: bool) -> Iterator[bool]:
        if wait and identity["length"] == 3:
            results.add(identity, {"state_bytes": 2}, {})
        yield wait or identity["length"] == 2

    monkeypatch.setattr(results, "claim", claim)
    results.share(jobs, lambda job: (ran.append(job.identity["length"]), results.add(job.identity, job.measure(), {})))
    assert ran == [2, 1]
    assert results.get(jobs[2].identity) == {"state_bytes": 2}


def test_a_claim_keeps_others_away_until_it_ends(tmp_path):
    one, other = Results(tmp_path / "results.jsonl"), Results(tmp_path / "results.jsonl")
    with one.claim(IDENTITY, wait=False) as mine, other.claim(IDENTITY, wait=False) as theirs:
        assert (mine, theirs) == (True, False)
        with other.claim(IDENTITY | {"length": 1}, wait=False) as elsewhere:
            assert elsewhere
        one.add(IDENTITY, {"state_bytes": 7}, {})
    with other.claim(IDENTITY, wait=True) as theirs:
        assert theirs
        assert other.get(IDENTITY) == {"state_bytes": 7}, "the file is read again"

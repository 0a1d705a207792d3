"""What a checkpoint says is not obeyed: no path, address, process or length by its word, unless it is trusted."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from bsbr_pl.__main__ import main
from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import InductionData, NeedleData, TextData, TokenData
from bsbr_pl.evals.checkpoints import read
from bsbr_pl.evals.saved_data import DataLocation, check_lengths
from bsbr_pl.module import LanguageModule
from bsbr_pl.results import Results

watched: list[tuple[str, str]] | None = None  # events and what they concern


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watched is not None and event in ("open", "os.mkdir", "os.listdir", "os.scandir", "socket.connect", "os.fork"):
        watched.append((event, str(arguments[:2])))


sys.addaudithook(watch)  # stays until the process ends


@pytest.fixture
def events() -> Iterator[list[tuple[str, str]]]:
    global watched
    watched = []
    yield watched
    watched = None


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}, the same as {i - 7}, and {i * i % 97}\n" for i in range(400)))
    return path


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "bsbr_pl"


@pytest.fixture
def trained(text, tmp_path) -> Callable[..., Path]:
    """Makes a checkpoint that was trained for one step, and then changes the data's arguments in it."""

    def make(name: str = "one", data: TokenData | None = None, **changes: Any) -> Path:
        path = tmp_path / "runs" / f"{name}.ckpt"
        data = data or TextData(str(text), "bytes", context_length=16, batch_size=4, cache_dir=str(tmp_path / "its"))
        torch.manual_seed(sum(name.encode()))  # files of equal weights count once
        module = LanguageModule(ARCHITECTURES["standard"], data.vocab_size, hidden_dim=8, num_layers=1, num_heads=1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            **{"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "use_distributed_sampler": False},
            **{"enable_checkpointing": False, **quiet},
        )
        trainer.fit(module, data)
        trainer.save_checkpoint(path)
        saved = torch.load(path, weights_only=True)
        saved["datamodule_hyper_parameters"] |= changes
        saved["run"]["arguments"] |= {f"data.{name}": value for name, value in changes.items()}
        saved["run"]["tokens"] = 0  # which no batch contradicts
        torch.save(saved, path)
        return path

    return make


def evaluate(runs: Path, *options: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, the text of the report's problems, and the rows."""
    output = runs.parent / "out"
    arguments = [str(runs), f"--output_dir={output}", "--lengths=[]", "--multiples=[1]", "--device=cpu", *options]
    code = main(["evaluate", *arguments])
    report = (output / "report.md").read_text().replace("\\", "")
    problems = report[report.index("## Problems") :].split("\n## ")[0]
    return code, problems, Results(output / "results.jsonl").rows


SECRET = "/somewhere/secret"
NAMED: dict[str, dict[str, Any]] = {
    "a file": {"source": f"{SECRET}/passwords.txt"},
    "a folder": {"source": SECRET},
    "the hub": {"source": "owner/name", "subset": "x", "streaming": True},
    "a cache": {"source": f"{SECRET}/passwords.txt", "cache_dir": f"{SECRET}/cache"},
    "a tokenizer": {"source": "stdlib", "tokenizer": f"{SECRET}/tokenizer.json"},
    "workers": {"source": f"{SECRET}/passwords.txt", "num_workers": 3000},
}


def test_nothing_that_only_a_checkpoint_names_is_touched(trained, home, tmp_path, monkeypatch, events):
    for name, changes in NAMED.items():
        kept = {k: v.replace(SECRET, str(tmp_path / "secret")) if isinstance(v, str) else v for k, v in changes.items()}
        trained(name, **kept)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "passwords.txt").write_text("hunter2\n" * 1000)
    (tmp_path / "secret" / "tokenizer.json").write_text("{}")
    events.clear()
    code, problems, rows = evaluate(tmp_path / "runs")
    assert code == 0
    assert [event for event in events if "secret" in event[1] or str(tmp_path / "its") in event[1]] == []
    assert {event for event, _ in events}.isdisjoint({"socket.connect", "os.fork"})
    assert sum(event == "open" for event, _ in events) > 10, "the watch is not blind"
    assert problems.count("is named by the checkpoint alone") == len(NAMED)
    assert problems.count("--trust_data") == len(NAMED)
    kinds = [row["identity"]["kind"] for row in rows]
    assert kinds.count("certificate") == len(NAMED), "what needs no data is measured"
    assert "text" not in kinds
    assert not (tmp_path / "secret" / "cache").exists()


def test_what_is_trusted_is_read_from_where_it_says(trained, home, tmp_path, text):
    path = trained()
    code, problems, rows = evaluate(tmp_path / "runs", "--trust_data")
    assert code == 0
    assert "None" in problems, problems
    (row,) = [row for row in rows if row["identity"]["kind"] == "text"]
    assert row["identity"]["data"] == read(path).data_fingerprint
    assert read(path, trusted=True).open_data().num_workers == 0
    assert read(trained("two", num_workers=2), trusted=True).open_data().num_workers == 2


def test_tokens_in_the_users_cache_and_files_that_he_names_are_read(trained, home, tmp_path, text):
    path = trained(num_workers=7, source=f"{SECRET}/passwords.txt")
    expected = read(path).data_fingerprint
    data = read(path, DataLocation(source=str(text))).open_data()
    assert (data.fingerprint, data.num_workers) == (expected, 0)
    assert (home / expected / "tokens.bin").exists(), "prepared in the user's cache, not in the checkpoint's"
    again = read(path).open_data(eval_batch_size=3)
    assert (again.fingerprint, again.eval_batch_size) == (expected, 3)


@pytest.mark.parametrize("name", ["context_length", "eval_context_length"])
def test_no_length_is_taken_by_its_word(trained, home, tmp_path, text, name):
    trained()
    trained("long", **{name: 10**8})
    code, problems, rows = evaluate(tmp_path / "runs", f"--data.source={text}")
    assert code == 0
    assert f"long.ckpt | data.{name} is 100,000,000 tokens, more than 65,536: set --trust_data" in problems
    assert {row["about"]["checkpoint"]["name"] for row in rows if row["identity"]["kind"] == "text"} == {
        f"{tmp_path}/runs/one.ckpt"
    }
    trained("half", **{name: 40_000})
    with pytest.raises(ValueError, match="the length of its samples is 80,000 tokens"):
        read(tmp_path / "runs/half.ckpt", DataLocation(source=str(text))).open_data(eval_context_length=80_000)


@pytest.mark.parametrize(
    ("length", "batch_size", "expected"), [(16, 10**9, 1024), (16, 8, 8), (20_000, 10**9, 1), (65_536, 2, 1)]
)
def test_an_evaluation_batch_has_at_most_16384_tokens_or_one_sample(trained, home, text, length, batch_size, expected):
    path = trained(batch_size=batch_size, eval_context_length=length)
    data = read(path, DataLocation(source=str(text))).open_data()
    assert data.eval_batch_size == expected
    longer = read(path, DataLocation(source=str(text))).open_data(eval_context_length=2 * 16, eval_batch_size=10**6)
    assert longer.eval_batch_size == 512


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_test": 10**12}, "its test samples have 32,000,000,000,000 tokens, more than 33,554,432"),
        ({"num_test": 2**62, "test_lengths": [16] * 4}, "samples have 295,147,905,179,352,825,856 tokens"),
        ({"test_lengths": [8, 10**9]}, "data.test_lengths is 1,000,000,000 tokens, more than 65,536"),
        ({"context_length": 10**9}, "data.context_length is 1,000,000,000 tokens, more than 65,536"),
        ({"test_lengths": [16] * 10**5}, "data.test_lengths has 100,000 items, more than 1,000"),
        ({"num_test": "many"}, ""),
        ({"test_lengths": {"a": 1}}, ""),
    ],
)
def test_a_task_of_too_many_tokens_is_a_problem(trained, home, tmp_path, changes, words):
    data = InductionData(16, 16, [8, 16], num_train=64, num_test=20, batch_size=8)
    trained("task", data)
    whole = read(tmp_path / "runs" / "task.ckpt").open_data()
    assert len(whole.samples("test").bounds) == 3, "as it is, it is measured"
    path = trained("other", data, **changes)
    saved = torch.load(path, weights_only=True)
    del saved["InductionData"]["fingerprint"]  # of the unchanged task
    torch.save(saved, path)
    code, problems, rows = evaluate(tmp_path / "runs")
    assert code == 0
    assert "other.ckpt" in problems
    assert words in problems
    assert [row["about"]["checkpoint"]["name"] for row in rows if row["identity"]["kind"] == "recall"] == [
        f"{tmp_path}/runs/task.ckpt"
    ]


@pytest.mark.parametrize("lengths", [[1, 65_536], [65_536, 1]])
def test_a_task_of_too_many_lengths_is_refused(lengths):
    """Which would all be built, one by one."""
    check_lengths({"train_lengths": [24, 1024]})
    with pytest.raises(ValueError, match=r"^data\.train_lengths has 65,535 items, more than 1,000: set --trust_data"):
        check_lengths({"train_lengths": lengths})


def test_a_needle_is_looked_for_in_the_users_cache_alone(trained, home, tmp_path, text):
    options = {"tokenizer": "bytes", "context_length": 32, "num_train": 64, "num_test": 4, "batch_size": 4}
    path = trained("needle", NeedleData(str(text), cache_dir=str(tmp_path / "its"), **options))
    with pytest.raises(ValueError, match="is named by the checkpoint alone"):
        read(path).open_data()
    assert (
        read(path, DataLocation(cache_dir=str(tmp_path / "its"))).open_data().fingerprint == read(path).data_fingerprint
    )


def test_a_report_is_written_even_if_no_file_can_be_used(tmp_path, home, capsys):
    (tmp_path / "runs").mkdir()
    for name in ("a", "b"):
        (tmp_path / "runs" / f"{name}.ckpt").write_bytes(b"nothing")
    (tmp_path / "runs" / "folder.ckpt").mkdir()
    code, problems, _ = evaluate(tmp_path / "runs")
    assert code == 1
    for name in ("a.ckpt", "b.ckpt", "folder.ckpt"):
        assert name in problems


def test_results_that_cannot_be_written_leave_a_report(trained, home, tmp_path, capsys, monkeypatch):
    trained()
    evaluate(tmp_path / "runs", "--trust_data")
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    (tmp_path / "out" / "report.md").unlink()
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if path.name == "results.jsonl" and mode != "rb":
            raise PermissionError(13, "Permission denied")
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", refuse)
    trained("two")
    code, _, rows = evaluate(tmp_path / "runs", "--trust_data")
    assert code == 2
    place = tmp_path / "out" / "results.jsonl"
    assert f"results cannot be written: {place}: Permission denied\n" in capsys.readouterr().err
    assert "one.ckpt" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    assert len(rows) == len(before.splitlines())


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_lock_for_times_that_cannot_be_had_costs_the_times_alone(trained, home, tmp_path, capsys, kind):
    trained()
    home.mkdir(parents=True)
    if kind == "link":
        (home / "locks").symlink_to(tmp_path)
    else:
        (home / "locks").write_text("")
    code, problems, rows = evaluate(tmp_path / "runs", "--trust_data", "--lengths=[16,32]", "--rounds=1")
    assert code == 0
    assert problems.count("times cannot be locked") == 1
    assert str(home / "locks") in capsys.readouterr().err
    assert {row["identity"]["kind"] for row in rows} == {"certificate", "text", "map", "training", "problem"}
    (home / "locks").unlink()
    code, problems, rows = evaluate(tmp_path / "runs", "--trust_data", "--lengths=[16,32]", "--rounds=1")
    assert "times cannot be locked" not in problems
    assert [row["identity"]["length"] for row in rows if row["identity"]["kind"] == "cost"] == [16, 32]
    assert not list(tmp_path.glob("*.lock"))

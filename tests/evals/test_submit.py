"""`bsbr submit` on rows of real checkpoints: what it appends, and a sentence for each refusal."""

import copy
import json
import threading
from pathlib import Path

import pytest
from lightning import Trainer, seed_everything

from bsbr_pl.__main__ import main
from bsbr_pl.attention import LinearAttention
from bsbr_pl.evals.submit import entries
from bsbr_pl.module import LanguageModule
from bsbr_pl.results import read_rows
from callbacks import LastCheckpoint, RunRecorder

BOARD = Path(__file__).parents[2] / "results" / "board.jsonl"


@pytest.fixture(scope="module")
def measured(tmp_path_factory, make_data) -> tuple[list[dict], list[str]]:
    """The rows of three seeds, and where their text is, as options."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed in range(3):
        seed_everything(seed, verbose=False)
        data = make_data(context_length=16, batch_size=2, seed=seed)
        module = LanguageModule(LinearAttention, data.vocab_size, hidden_dim=16, num_layers=1, num_heads=2)
        Trainer(
            default_root_dir=folder / str(seed),
            logger=False,
            callbacks=[RunRecorder(), LastCheckpoint()],
            max_epochs=-1,
            max_steps=4,
            val_check_interval=4,
            check_val_every_n_epoch=None,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        ).fit(module, data)
    where = [f"--data.source={data.hparams['source']}", f"--data.cache_dir={data.hparams['cache_dir']}"]
    out = f"--output_dir={folder / 'out'}"
    assert main(["evaluate", str(folder), out, "--lengths=[]", "--multiples=[1]", "--device=cpu", *where]) == 0
    rows = read_rows([folder / "out" / "results.jsonl"])
    for row in rows:  # as from a clean checkout
        if "environment" in row["identity"]:
            row["identity"]["environment"]["commit"] = {"commit": "12345678" * 5, "changed": False}
    return rows, where


@pytest.fixture
def submit(measured, tmp_path, capsys):
    """Submits rows to a board; returns the exit code and what was printed."""

    def run(rows: list[dict]) -> tuple[int, str, str]:
        path = tmp_path / "results.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = main(["submit", str(path), f"--board={tmp_path / 'board.jsonl'}", *measured[1]])
        return code, *capsys.readouterr()

    return run


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [row for row in rows if row["identity"]["kind"] == kind]


def test_a_model_that_passes_is_appended_once_and_drawn(submit, measured, tmp_path):
    rows, board = measured[0], tmp_path / "board.jsonl"
    board.write_bytes(json.dumps(of_kind(rows, "text")[0]).encode())  # a board that ends without a newline
    code, out, _ = submit(rows)
    kept = [row for row in rows if row["identity"]["kind"] != "map"]
    assert code == 0
    assert out == f"{len(kept) - 1} rows of 3 checkpoints appended to {board}\n"
    assert sorted(map(json.dumps, read_rows([board]))) == sorted(map(json.dumps, kept))
    content = board.read_bytes()
    assert submit(rows)[:2] == (0, f"0 rows of 3 checkpoints appended to {board}\n")
    assert board.read_bytes() == content
    assert main(["report", str(board), f"--output_dir={tmp_path / 'page'}"]) == 0
    assert "| linear | " in (tmp_path / "page" / "report.md").read_text()


def change(row: dict, path: str, value) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        row = row[folder]
    row[name] = value


@pytest.mark.parametrize(
    ("kind", "path", "value", "sentence"),
    [
        ("certificate", "values.passed", False, "seed 0: its certificate failed (no check was measured)"),
        ("certificate", "identity.version", 1, "seed 0: it has no certificate of version "),
        ("text", "about.run.finished", False, "seed 0: its run did not finish: "),
        ("text", "about.run.tokens", None, "seed 0: its budget is not stated: run.tokens is missing"),
        ("text", "about.seed", 1, "2 seeds, fewer than 3: "),
        ("text", "identity.environment.commit", None, "seed 0: the commit that measured it is not known"),
        (
            "text",
            "identity.environment.commit.changed",
            True,
            "seed 0: it was measured with changes to commit 12345678",
        ),
        ("text", "values.bytes", 9, "seed 0: its nats and bytes are not those of its blocks"),
        ("text", "about.data.fingerprint", "another", "seed 0: the bytes of its text cannot be counted: "),
    ],
)
def test_each_refusal_is_a_sentence(submit, measured, tmp_path, kind, path, value, sentence):
    rows = copy.deepcopy(measured[0])
    row = next(row for row in of_kind(rows, kind) if row["about"]["seed"] == 0)
    change(row, path, value)
    if path == "about.data.fingerprint":
        row["identity"]["data"] = value
    if sentence.endswith("(no check was measured)"):
        row["values"]["checks"] = []
    code, out, err = submit(rows)
    assert code == 1
    assert out.startswith("0 rows of 0 checkpoints")
    assert all(line.startswith("refused: linear, TextData, val split, ") for line in err.splitlines())
    assert sentence in err
    assert not (tmp_path / "board.jsonl").exists()


def test_bytes_are_counted_in_the_text(submit, measured):
    """Twice the bytes, everywhere in the row, halve the bits per byte; the text says no."""
    rows = copy.deepcopy(measured[0])
    for row in of_kind(rows, "text"):
        values = row["values"]
        true = values["bytes"]
        values["bytes"] *= 2
        values["bits_per_byte"] /= 2
        values["blocks"]["bytes"] = [2 * count for count in values["blocks"]["bytes"]]
    code, _, err = submit(rows)
    assert code == 1
    assert f"seed 2: its text has {true:,} bytes, not {2 * true:,}" in err


FAILED = {"name": "suffix_0", "measured": 0.5, "limit": 1e-8, "passed": True}


def contradicted(rows: list[dict], kind: str, name: str, value) -> list[dict]:
    rows = copy.deepcopy(rows)
    of_kind(rows, kind)[0]["values"][name] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            lambda rows: of_kind(rows, "certificate"),
            "no accuracy that this version measured is in ",
        ),
        (lambda rows: [*rows, {"schema": 3}], "nothing is appended, because a line is no row: "),
        (lambda rows: contradicted(rows, "text", "bits_per_byte", 0.9), "values.bits_per_byte=0.9, but "),
        (lambda rows: contradicted(rows, "certificate", "checks", [FAILED]), "values.passed=true, but suffix_0 is 0.5"),
    ],
)
def test_what_is_no_submission(submit, measured, tmp_path, capsys, rows, sentence):
    with pytest.raises(SystemExit):
        submit(rows(measured[0]))
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "board.jsonl").exists()


def test_several_processes_may_append(measured, tmp_path):
    """Under the lock of the board, no row is lost and none is there twice."""
    from bsbr_pl.evals.submit import append

    rows, board = [row for row in measured[0] if row["identity"]["kind"] != "map"], tmp_path / "board.jsonl"
    threads = [threading.Thread(target=append, args=(board, rows[i:] + rows[:i])) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = board.read_text().splitlines()
    assert sorted(lines) == sorted(json.dumps(row) for row in rows)


def test_seeds_of_a_recall_task_are_one_model():
    """Their samples differ, and so do the fingerprints of their data. The board has five models with three seeds."""
    rows = [json.loads(line) for line in BOARD.read_text().splitlines()]
    recall = [row for row in rows if row["identity"]["kind"] == "recall"]
    found = {tuple(one.accuracies[0]["about"]["attention"]): one for one in entries(recall)}
    assert {("rwkv7",), ("delta_net",), ("standard",)} <= found.keys()
    for one in found.values():
        assert sorted(of.seed for of in one.checkpoints.values()) == [1, 2, 3]
        assert len({row["identity"]["data"] for row in one.accuracies}) == 3

"""study/run.py at toy size: it matches, sweeps, trains at the best rate and repeats nothing; check.py repeats it.

Nothing is lost when it is killed, when the disk is full, or when another study works in the same folder.
"""

import copy
import csv
import json
import math
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from faults import environment
from faults.kill_and_resume import start
from filelock import FileLock
from PIL import Image
from test_readme import run as in_this_process

from bsbr_pl.__main__ import main
from bsbr_pl.attention import BSBRAttention, LinearAttention, SlidingWindowAttention, StandardAttention
from bsbr_pl.data import TextData
from bsbr_pl.evals.checkpoints import open_checkpoint
from bsbr_pl.model import LanguageModel
from bsbr_pl.results import Results

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300))

ONE_STEP = ["--tasks", "mqar", "--models", "linear", "--rates", "0.1", "--seeds", "1", "--steps", "1"]


@pytest.fixture
def _at_home(tmp_path, monkeypatch, one_thread):
    """In a folder of its own, where a script finds its modules and may change the arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.syspath_prepend(ROOT / "study")


def study(folder: Path, *options: str) -> list[str]:
    (folder / "text.py").write_text(TEXT)
    return [
        *(sys.executable, str(ROOT / "study/run.py"), str(folder / "runs"), "--tasks", "text"),
        *("--models", "linear", "--workers", "2", *options, "--"),
        *(f"--data.source={folder / 'text.py'}", "--data.tokenizer=bytes", "--data.context_length=32"),
        *("--trainer.accelerator=cpu", f"--data.cache_dir={folder / 'cache'}", "--model.hidden_dim=32"),
    ]


@pytest.mark.usefixtures("_at_home")
@pytest.mark.filterwarnings("ignore")  # of scripts, which are not tested for warnings
def test_study(tmp_path, capsys):
    """At 1e-9 nothing is learnt, at 1e30 the loss is no longer a number. Half of the steps choose the rate here."""
    command = study(tmp_path, "--seeds", "1", "--rates", "1e-9", "1e30", "1e-2", "--steps", "8", "--sweep_share", "0.5")

    def run() -> list[str]:
        code, printed = in_this_process("study/run.py", command[2:]), capsys.readouterr()
        assert not code, printed.err
        assert "| linear | 8 | 0.01 | 1 | " in printed.out  # the table
        return [line for line in printed.out.splitlines() if line.startswith(("sweep", "final"))]

    lines = run()
    assert len([line for line in lines if ": started" in line]) == 4
    assert len([line for line in lines if ": finished, val/loss " in line]) == 3
    (failed,) = (tmp_path / "runs").rglob("failed.txt")
    assert failed.parent.name == "rate1e+30_steps4_seed0"
    assert "the loss is nan at step 1" in failed.read_text()
    every = read(tmp_path / "runs/text/results.jsonl")
    certificate, test, *_ = (row for row in every if row["identity"]["kind"] != "training")
    assert (certificate["values"]["passed"], test["identity"]["kind"], test["identity"]["split"]) == (
        True,
        "text",
        "test",
    )
    rows = [row for row in every if row["identity"]["kind"] == "training"]
    rows.sort(key=lambda row: (row["about"]["study"]["phase"] == "final", row["about"]["study"]["rate"]))
    assert len(every) == len(rows) + 2
    (digests,) = {tuple(row["about"]["study"][name] for name in ("configuration", "base")) for row in rows}
    facts = {"task": "text", "model": "linear", "options": command[-6:]} | dict(
        zip(("configuration", "base"), digests, strict=True)
    )
    assert [(row["about"]["study"], row["about"]["seed"], row["about"]["run"]["planned_steps"]) for row in rows] == [
        (
            {**facts, "phase": phase, "rate": rate, **more},
            seed,
            steps,
        )
        for phase, rate, more, seed, steps in (
            ("sweep", 1e-9, {}, 0, 4),
            ("sweep", 1e-2, {}, 0, 4),
            ("sweep", 1e30, {}, 0, 4),
            ("final", 1e-2, {"rates": [1e-9, 1e-2, 1e30]}, 1, 8),
        )
    ]
    statuses = [row["about"]["run"]["status"] for row in rows]
    assert statuses[2].startswith("diverged: the loss is nan at step 1")
    assert statuses[:2] + statuses[3:] == ["finished"] * 3
    assert rows[2]["values"]["metrics"] == {}
    result = rows[3]["values"]["result"]
    assert result["val"] == rows[3]["values"]["metrics"]["val/bits_per_byte"]["value"][-1]
    assert result["test"] == test["values"]["bits_per_byte"] != result["val"]
    assert 0 < result["plateau"] < result["test"] < 8
    assert result["learned"] is False
    assert result["flops_per_token"] > result["state_bytes"] > 0
    record = json.loads((tmp_path / "runs/text/final/linear/rate0.01_steps8_seed1/record.json").read_text())
    assert rows[3]["values"]["metrics"]["val/loss"] == record["metrics"]["val/loss"]
    assert 0 < rows[3]["values"]["seconds"] <= record["seconds"]  # the checkpoint is saved before the run ends
    assert rows[3]["about"]["parameters"] == record["parameters"]
    assert rows[3]["about"]["config"]["model.ff_dim"] not in (None, 512)
    assert rows[3]["about"]["data"]["fingerprint"] == record["data_fingerprint"]
    assert run() == []
    assert read(tmp_path / "runs/text/results.jsonl") == every, "a second call adds no row"

    published = tmp_path / "runs/text/results.jsonl"
    assert main(["report", str(published), f"--output_dir={tmp_path / 'report'}"]) == 0
    (verdict,) = (tmp_path / "report").rglob("verdict_*.csv")
    (shown,) = csv.DictReader(verdict.read_text().splitlines())
    assert float(shown["bits per byte"]) == result["test"]
    assert not in_this_process("study/figure.py", ["--results", str(tmp_path / "runs")])
    assert np.asarray(Image.open(tmp_path / "runs/study.png")).std() > 0

    out = tmp_path / "lengths.jsonl"
    for _ in range(2):  # the second call measures nothing
        assert not in_this_process("study/lengths.py", ["runs", "--length", "64", "--out", str(out)])
        truncated, overlapping, longer, stretched = read(out)
    assert (truncated["way"], truncated["model"], truncated["seed"]) == ("truncated", "linear", 1)
    assert truncated["bits_per_byte"] == pytest.approx(result["test"], abs=1e-6)
    assert 0 < longer["bits_per_byte"] != truncated["bits_per_byte"]
    last = tmp_path / "runs/text/final/linear/rate0.01_steps8_seed1/checkpoints/last.ckpt"
    assert overlapping["bits_per_byte"] == pytest.approx(one_by_one(last), abs=1e-5)
    assert stretched["bits_per_byte"] is None, "it has no rotary positions"

    def repeat() -> tuple[int, str]:
        capsys.readouterr()
        code = in_this_process("study/check.py", ["--published", str(published), "--models", "linear"])
        return code, capsys.readouterr().out

    code, printed = repeat()
    assert code == 0, printed
    assert printed.strip().endswith("agrees")
    for changed, expected in (("data", (0, "not compared")), ("loss", (1, "DOES NOT AGREE"))):
        altered = copy.deepcopy(rows)
        for row in altered:
            if changed == "data" and row["about"].get("data"):
                row["about"]["data"]["fingerprint"] = "another"
            elif row["values"]["metrics"]:
                row["values"]["metrics"]["val/loss"]["value"][-1] = 9.0
        published.write_text("".join(json.dumps(row) + "\n" for row in altered))
        code, printed = repeat()
        assert code == expected[0], printed
        assert expected[1] in printed


def one_by_one(path: Path) -> float:
    """Bits per byte of the test text: each token from what precedes it in the last window that has it in its second
    half; windows of 32 tokens start every 16."""
    subject = open_checkpoint(path, trusted=True).subject()
    data = subject.open_data()
    tokens = torch.as_tensor(np.asarray(data.corpus.tokens("test"), np.int64))
    nats, num_bytes = 0.0, 0
    for place in range(1, len(tokens)):
        start = max(0, (place - 1) // 16 - 1) * 16
        with torch.no_grad():
            logits = subject.model(tokens[None, start:place])[0, -1]
        nats -= float(logits.double().log_softmax(-1)[tokens[place]])
        num_bytes += int(data.tokenizer.token_bytes[tokens[place]])
    return nats / math.log(2) / num_bytes


@pytest.mark.usefixtures("_at_home")
def test_a_mistake_is_a_sentence(tmp_path, capsys):
    """An unknown model or task, or a number of steps below 1."""
    for options, words in (
        (["--models", "linar"], "--models: linar not in "),
        (["--tasks", "texts"], "--tasks: texts not in "),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--sweep_share", "1.5"], "--sweep_share must be above 0 and at most 1, got 1.5"),
        (["--seeds", "1", "2", "1"], "--seeds: 1 is there twice"),
        (["--models", "linear", "linear"], "--models: linear is there twice"),
        (["--rates", "5e-3", "0.005"], "--rates: 0.005 is there twice (6 digits tell numbers apart)"),
        (["--rates", "0.00123456781", "0.00123456782"], "--rates: 0.00123457 is there twice (6 digits"),
        (["--rates", "nan"], "--rates must be finite and above 0, got nan"),
        (["--rates", "0"], "--rates must be finite and above 0, got 0"),
        (["--decays", "-0.1"], "--decays must be finite and at least 0, got -0.1"),
    ):
        assert in_this_process("study/run.py", [str(tmp_path / "runs"), *options]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        (None, [], "--configs: mine has no YAML file of a task"),
        ("{model: {learning_rate: 0.1}}", [], "--configs: mine/models has no YAML file, so name the --models"),
        (
            "{model: {learning_rate: 0.1}}",
            ["--models", "linear"],
            "mine/toy.yaml must have a positive trainer.",
        ),
        (
            "{trainer: {max_steps: 4}}",
            ["--models", "linear"],
            "positive model.learning_rate, or give --rates",
        ),
        ("{trainer: {max_steps: four}}", ["--models", "linear"], "trainer.max_steps, or give --steps"),
        ("[1]", ["--models", "linear"], "mine/toy.yaml must hold sections such as model, data and trainer, got [1]"),
        ("{a: 1, a: 2}", ["--models", "linear"], "mine/toy.yaml is no YAML: "),
    ],
)
def test_a_mistake_in_configurations_of_your_own_is_a_sentence(tmp_path, capsys, task, options, words):
    if task:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "toy.yaml").write_text(task)
    code = in_this_process("study/run.py", ["runs", "--configs", "mine", *options])
    said = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(("run.py: error: ", "study/run.py: error: "))
    assert words in said


@pytest.mark.usefixtures("_at_home")
def test_files_are_read_as_train_py_reads_them(tmp_path):
    """YAML 1.1 takes 1e-2 for a text."""
    from settings import merged

    (tmp_path / "a.yaml").write_text("{model: {learning_rate: 1e-2}, data: {class_path: bsbr_pl.data.MQARData}}")
    model, data_class, data = merged([tmp_path / "a.yaml"], ["--model.dropout=1e-1", "--data.power=1e-3"])
    assert (model, data_class, data) == ({"learning_rate": 0.01, "dropout": 0.1}, "MQARData", {"power": 0.001})


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize(
    ("options", "name", "instead"),
    [
        (["--", "--trainer.max_steps=4"], "--trainer.max_steps", "--steps"),
        (["--", "--trainer.val_check_interval=4"], "--trainer.val_check_interval", "--steps"),
        (["--", "--model.learning_rate", "0.1"], "--model.learning_rate", "--rates"),
        (["--", "--seed_everything=4"], "--seed_everything", "--seeds"),
        (["--", "--data.seed", "4"], "--data.seed", "--seeds"),
        (["--", "--model.attention=gla"], "--model.attention", "--models"),
        (["--decays", "0", "--", "--model.weight_decay=0.1"], "--model.weight_decay", "--decays"),
    ],
)
def test_options_that_the_study_sets_are_refused(tmp_path, capsys, options, name, instead):
    assert in_this_process("study/run.py", ["runs", *ONE_STEP, *options]) == 2
    words = f"error: {name} after --: the study sets it: use {instead}"
    assert capsys.readouterr().err.splitlines()[-1].endswith(words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize("option", ["--seed_everything=1", "--data.seed=1"])
def test_seeds_are_no_option_of_train_all(tmp_path, capsys, option):
    """All runs would have the same."""
    assert in_this_process("study/train_all.py", ["runs", "--architectures", "linear", "--", option]) == 2
    assert "it would be that of all runs: use --seeds" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize(("theirs", "ours"), [([], ["--data.power=1"]), (["--data.power=1"], ["--data.power=2"])])
def test_runs_with_other_options_need_another_folder(tmp_path, capsys, theirs, ours):
    """Rows without options are of runs without options."""
    about = {"study": {"task": "mqar", "model": "linear", "phase": "final", "rate": 0.1}, "seed": 1}
    about["study"] |= {"options": theirs} if theirs else {}
    results = Results(tmp_path / "runs/mqar/results.jsonl")
    results.add({"kind": "training", "checkpoint": "c"}, {"metrics": {}}, about)
    assert in_this_process("study/run.py", ["runs", *ONE_STEP, "--", *ours]) == 2
    words = f"runs/mqar has runs with other options after --: {' '.join(theirs) or 'none'}, not {ours[0]}"
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {words}: choose another folder")
    assert not (tmp_path / "runs/mqar/final").exists()


@pytest.mark.usefixtures("_at_home")
def test_runs_of_an_edited_configuration_need_another_folder(tmp_path, monkeypatch):
    """What the study sets may change, as loggers and callbacks; rows of earlier versions have no digest."""
    from run import Study

    own, results = Study(tmp_path / "runs", [], tmp_path), Results(tmp_path / "runs/mqar/results.jsonl")

    def digest(weight_decay: float, steps: int) -> dict[str, str]:
        section = f"model: {{weight_decay: {weight_decay}}}\ntrainer: {{max_steps: {steps}}}"
        (tmp_path / "mqar.yaml").write_text(section)
        return own.configuration("mqar", "linear")

    kept = digest(0.1, 5)
    study = {"task": "mqar", "model": "linear", "phase": "final", "rate": 0.1}
    for seed, more in enumerate(({}, kept)):
        about = {"study": study | more, "seed": seed}
        results.add({"kind": "training", "checkpoint": str(seed)}, {"metrics": {}}, about)
        own.check_configurations("mqar", ["linear"])
    assert digest(0.1, 6) == kept != digest(0.2, 5)
    with pytest.raises(ValueError, match="has runs of linear on mqar with another configuration: its files were"):
        own.check_configurations("mqar", ["linear"])
    own.check_configurations("mqar", ["standard"])
    told = in_this_process("study/run.py", ["runs", *ONE_STEP])
    assert told.startswith("study/run.py: error: runs/mqar has runs of linear on mqar with another configuration")
    digest(0.1, 5)
    text = (ROOT / "configs/base.yaml").read_text()
    for change, refused in (("beta2: 0.99", True), ("save_dir: runs", False), ("every_n_steps: 320", False)):
        assert change in text
        (tmp_path / "base.yaml").write_text(text.replace(change, f"{change}9"))
        monkeypatch.setattr("run.BASE", tmp_path / "base.yaml")
        if refused:
            with pytest.raises(ValueError, match=r"another configuration: base\.yaml was changed since"):
                own.check_configurations("mqar", ["linear"])
        else:
            own.check_configurations("mqar", ["linear"])


@pytest.mark.usefixtures("_at_home")
def test_a_run_with_other_arguments_is_missing(tmp_path):
    """Whether it has finished or can be resumed; a run of the same arguments, or without a file of them, is reused."""
    from trainings import Training, other_arguments, train_all

    script, folder = tmp_path / "train.py", tmp_path / "run"
    script.write_text(
        f'open({str(folder / "record.json")!r}, \'w\').write(\'{{"status": "finished", "metrics": {{}}}}\')'
    )
    first = Training("run", folder, 0, [], ["--trainer.max_steps=6"], script)
    longer, more = (first._replace(arguments=one) for one in (["--trainer.max_steps=12"], [*first.arguments, "--a=1"]))
    assert train_all([first]) == train_all([first._replace(configs=[tmp_path])], workers=2) == {}
    words = "trained with other arguments (--trainer.max_steps=6 instead of --trainer.max_steps=12)"
    assert train_all([longer]) == {"run": f"{words}: choose another folder"}
    assert train_all([more]) == {
        "run": "trained with other arguments (nothing instead of --a=1): choose another folder"
    }
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/last.ckpt").touch()
    (folder / "record.json").unlink()
    assert train_all([longer]) == {"run": f"{words}: choose another folder"}
    assert train_all([first]) == {}
    edited = first._replace(configuration="another")
    for file, expected in (
        ({"arguments": first.arguments, "configuration": "one"}, "trained with another configuration: its files or "),
        (first.arguments, ""),  # of an earlier version
    ):
        (folder / "arguments.json").write_text(json.dumps(file))
        assert (other_arguments(edited) or "").startswith(expected)
        assert other_arguments(first) is None, "one that says no configuration"
    for damaged in ('["--trainer', "null", '{"arguments": 1}'):
        (folder / "arguments.json").write_text(damaged)
        assert train_all([longer]) == {"run": "arguments.json is damaged: choose another folder"}
    (folder / "arguments.json").unlink()
    assert train_all([longer]) == {}, "a folder of an earlier version"


def trained(**changes: Any) -> dict[str, Any]:
    """What a checkpoint says of the run `RUN`."""
    facts = {"seed": 1, "data.seed": 1, "rate": 0.1, "decay": 0.0, "steps": 8, "planned_steps": 8} | changes
    return {
        "seed": facts["seed"],
        "data": {"arguments": {"seed": facts["data.seed"]}},
        "run": {name: facts[name] for name in ("steps", "planned_steps")},
        "config": {"model.learning_rate": facts["rate"], "model.weight_decay": facts["decay"]},
    }


RUN = {"task": "toy", "model": "m", "rate": 0.1, "seed": 1, "steps": 8, "phase": "final"}


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": 0.5}, "learning rate 0.5 instead of 0.1"),
        ({"seed": 2}, "seed 2 instead of 1"),
        ({"data.seed": 0}, "data.seed 0 instead of 1"),
        ({"planned_steps": 6, "steps": 6}, "planned_steps 6 instead of 8"),
        ({"steps": 6}, "steps 6 instead of 8"),  # it ended early
        ({"decay": 0.1}, "weight decay 0.1 instead of 0.0"),
    ],
)
def test_a_run_that_was_trained_otherwise_has_no_row(tmp_path, monkeypatch, changes, words):
    """As with `-- --config=FILE`, which may set the rate, or `--trainer.max_time`."""
    import rows

    class Opened:
        def subject(self, command: str) -> SimpleNamespace:
            return SimpleNamespace(about=trained(**changes))

    run, kept = rows.Run(**RUN, decay=0.0), rows.results(tmp_path, "toy")
    assert rows.trained_otherwise(run, trained()) is None
    assert rows.trained_otherwise(rows.Run(**RUN), trained(decay=0.5)) is None, "that of the configuration"
    monkeypatch.setattr(rows, "finished_record", lambda folder: {"metrics": {}})
    monkeypatch.setattr(rows, "open_checkpoint", lambda path, trusted: Opened())
    missing = rows.keep([run], tmp_path, kept, "", [], {"m": {}})
    expected = f"trained with {words}: change the options after --, or the folder"
    assert (missing, kept.rows) == ({str(run): expected}, [])


@pytest.mark.usefixtures("_at_home")
def test_two_rows_of_one_run_are_refused(tmp_path):
    """As after two files were joined: which one counts, nobody knows."""
    study = {"task": "mqar", "model": "linear", "phase": "sweep", "rate": 0.1}
    for digest in ("one", "other"):
        about = {"study": study, "seed": 0, "run": {"planned_steps": 1}}
        Results(tmp_path / "runs/mqar/results.jsonl").add(
            {"kind": "training", "checkpoint": digest}, {"metrics": {}}, about
        )
    told = in_this_process("study/run.py", ["runs", *ONE_STEP])
    words = "two rows are of the run 'sweep mqar linear rate 0.1 seed 0', with checkpoints one and other: remove one"
    assert told.startswith(f"study/run.py: error: {words}")


@pytest.mark.usefixtures("_at_home")
def test_what_is_matched_is_what_is_trained(tmp_path):
    """With options after `--`, and with sizes that base.yaml alone has."""
    from run import Study

    (tmp_path / "text.py").write_text(TEXT)
    (tmp_path / "toy.yaml").write_text(
        f"data: {{class_path: TextData, init_args: {{source: {tmp_path / 'text.py'}, cache_dir: {tmp_path}}}}}"
    )
    for options, sizes in (
        ([], {"vocab_size": 8192, "hidden_dim": 128}),
        (["--model.hidden_dim", "32", "--data.tokenizer=bytes"], {"vocab_size": 257, "hidden_dim": 32}),
    ):
        found = Study(tmp_path / "runs", options, tmp_path).matched_arguments("toy", ["linear"])
        sizes |= {"num_layers": 2, "num_heads": 4}  # of base.yaml
        counts = [
            sum(parameter.numel() for parameter in LanguageModel(attention, **sizes, **more).parameters())
            for attention, more in ((StandardAttention, {}), (LinearAttention, found["linear"]))
        ]
        assert counts[1] == pytest.approx(counts[0], rel=1e-3)
    assert Study(tmp_path, ["--model.ff_dim=0"], tmp_path).matched_arguments("toy", ["linear"]) == {"linear": {}}


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize("script", ["train.py", "my_train.py"])
def test_the_reason_of_a_failure_is_its_error(script):
    from trainings import _last_words

    output = f"warning\n{script}: error: no such model\n`{script} fit --help` shows every option\n"
    assert _last_words(2, output) == f"{script}: error: no such model"


DAMAGED = ['{"status": "fin', "[]", "null", '{"status": "finished"}', '{"status": "finished", "metrics": []}',
           '{"status": "finished", "metrics": {"val/loss": {"value": []}}}']  # fmt: skip


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_record_is_none(tmp_path, content):
    """Without values, a record is one of a run without validation."""
    from trainings import finished_record, validation_loss

    (tmp_path / "record.json").write_text(content)
    assert finished_record(tmp_path) is None
    columns = {"step": [], "value": []}
    (tmp_path / "record.json").write_text(json.dumps({"status": "finished", "metrics": {"val/loss": columns}}))
    assert validation_loss(finished_record(tmp_path)) is None


@pytest.mark.usefixtures("_at_home")
def test_only_layers_that_see_the_whole_context_are_stretched():
    from lengths import stretch

    model = LanguageModel([StandardAttention, SlidingWindowAttention], 5, 24, num_layers=2, num_heads=2)
    assert stretch(model, 8)
    whole, window = model.attentions
    assert whole.rope_base == pytest.approx(10_000 * 8 ** (12 / 10))
    assert window.rope_base == 10_000
    assert not stretch(LanguageModel(BSBRAttention, 5, 24, num_layers=1, num_heads=2), 8)


@pytest.mark.usefixtures("_at_home")
def test_ways_to_read_are_by_the_length_of_training(tmp_path, monkeypatch):
    """Trained at 31 tokens, an odd number, and validated at 64. Token by token, from what its window has before it."""
    import lengths

    (tmp_path / "text.py").write_text(TEXT)
    given = {"source": str(tmp_path / "text.py"), "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    given |= {"context_length": 31, "eval_context_length": 64, "batch_size": 4}
    torch.manual_seed(0)
    model = LanguageModel(StandardAttention, 257, 16, num_layers=1, num_heads=2).eval()
    subject = SimpleNamespace(model=model, open_data=lambda **changes: TextData(**given | changes))
    monkeypatch.setattr(lengths, "subject_of", lambda *of: subject)
    stretched = []
    monkeypatch.setattr(lengths, "stretch", lambda model, times: stretched.append(times))
    found = {way: lengths.read(None, {}, tmp_path, 124, way)["bits_per_byte"] for way in lengths.WAYS}
    assert stretched == [4.0]
    assert found["stretched"] is None

    data = subject.open_data()
    data.setup("test")
    tokens = torch.as_tensor(np.asarray(data.corpus.tokens("test"), np.int64))
    starts = {  # of the window that predicts a token
        "truncated": lambda place: (place - 1) // 31 * 31,
        "overlapping": lambda place: max(0, -((31 - place) // 15)) * 15,  # the first that ends behind it
        "as it is": lambda place: (place - 1) // 124 * 124,
    }
    for way, start_of in starts.items():
        nats, num_bytes = 0.0, 0
        for place in range(1, len(tokens)):
            with torch.no_grad():
                logits = model(tokens[None, start_of(place) : place])[0, -1]
            nats -= float(logits.double().log_softmax(-1)[tokens[place]])
            num_bytes += int(data.tokenizer.token_bytes[tokens[place]])
        assert found[way] == pytest.approx(nats / math.log(2) / num_bytes, abs=2e-6), way


@pytest.mark.usefixtures("_at_home")
def test_a_longer_context_is_read_for_each_run_that_counts(tmp_path, monkeypatch):
    """Runs of other steps have lines of their own; one that diverged has none; lines of earlier versions stay."""
    import lengths
    import rows
    from lines import add_missing

    kept = rows.results(tmp_path, "text")
    for steps, seed, result in ((8, 1, {"test": 2.0}), (4, 1, {"test": 3.0}), (8, 2, {})):
        study = {"task": "text", "model": "m", "phase": "final", "rate": 0.1}
        about = {"study": study, "seed": seed, "run": {"planned_steps": steps}}
        values = {"metrics": {}, "result": {"val": 1.0} | result}
        kept.add({"kind": "training", "checkpoint": f"{steps}, {seed}"}, values, about)
    measured = []

    def read(run, row, output, length, way):
        measured.append(way)
        return {"bits_per_byte": run.steps / 2}

    monkeypatch.setattr(lengths, "read", read)
    wanted = partial(lengths.wanted, tmp_path, 64)
    found = add_missing(tmp_path / "new.jsonl", wanted())
    assert [(one["checkpoint"], one["bits_per_byte"]) for one in found] == [("8, 1", 4.0)] * 4 + [("4, 1", 2.0)] * 4
    assert add_missing(tmp_path / "new.jsonl", wanted()) == found
    assert len(measured) == 8
    old = {"model": "m", "rate": 0.1, "seed": 1, "length": 64, "way": "truncated", "bits_per_byte": 9.0}
    (tmp_path / "old.jsonl").write_text(json.dumps(old) + "\n")
    assert len(add_missing(tmp_path / "old.jsonl", wanted())) == 7
    assert set(measured[8:]) == {"overlapping", "as it is", "stretched"}
    _, _, *lines = lengths.table(found).splitlines()
    assert lines == [
        "| m | 8 | 1 | 4.0000 | 4.0000 | 4.0000 | 4.0000 |",
        "| m | 4 | 1 | 2.0000 | 2.0000 | 2.0000 | 2.0000 |",
    ]


@pytest.mark.usefixtures("_at_home")
def test_a_folder_that_was_trained_again_is_not_read(tmp_path, monkeypatch):
    import rows

    opened = SimpleNamespace(subject=lambda: SimpleNamespace(digest="new"))
    monkeypatch.setattr(rows, "open_checkpoint", lambda path, trusted: opened)
    run = rows.Run(**RUN)
    assert rows.subject_of(run, {"identity": {"checkpoint": "new"}}, tmp_path).digest == "new"
    with pytest.raises(ValueError, match="has other weights than the row of 'final toy m rate"):
        rows.subject_of(run, {"identity": {"checkpoint": "old"}}, tmp_path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(folder: Path) -> dict[str, dict]:
    """Seed -> record of the runs that count."""
    paths = (folder / "runs/text/final/linear").glob("*/record.json")
    return {path.parent.name[-1]: json.loads(path.read_text()) for path in paths}


def test_nothing_is_lost(tmp_path):
    """A full disk, another process in a run's folder, the study killed, and then two studies at once."""
    command = study(tmp_path, "--seeds", "0", "1", "--rates", "1e-2", "--steps", "300")
    runs = tmp_path / "runs/text/final/linear"
    lasts = [runs / f"rate0.01_steps300_seed{seed}/checkpoints/last.ckpt" for seed in (0, 1)]

    full = subprocess.run(
        study(tmp_path, "--seeds", "0", "--rates", "1e-2", "--steps", "300"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert full.returncode == 1
    *_, last = full.stderr.splitlines()
    name = "missing: final text linear rate 0.01 seed 0"
    assert last.startswith(f"{name}: train.py: error: [Errno 27] File too large: ")
    assert not list(runs.rglob("failed.txt"))

    folder = lasts[1].parent.parent
    folder.mkdir()
    (folder / "foreign").touch()
    with FileLock(folder / ".training.lock"):
        killed, output = start_study(tmp_path / "killed", command)
        try:
            wait_for(lambda: lasts[0].exists() and "another process trains in" in output.read_text())
        finally:
            killed.kill()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        assert (folder / "foreign").exists(), "the folder in which a process is alive is left alone"
    both = [start_study(tmp_path / name, command) for name in ("one", "other")]
    for process, _ in both:
        process.join(1200)
    printed = [output.read_text() for _, output in both]
    assert [process.exitcode for process, _ in both] == [0, 0], printed
    assert sum(output.count(": started") for output in printed) == 2, "nothing is trained twice"
    assert all("| linear | 300 | 0.01 | 2 | " in output for output in printed)
    found = records(tmp_path)
    assert {seed: (record["status"], record["steps"]) for seed, record in found.items()} == {
        "0": ("finished", 300),
        "1": ("finished", 300),
    }
    assert found["0"]["resumed_at_step"] >= 100
    assert not (folder / "foreign").exists()
    assert not list(runs.rglob("failed.txt"))


def run_study(*options: str) -> None:
    """What a process of `start_study` does."""
    sys.path.insert(0, str(ROOT / "study"))
    if code := in_this_process("study/run.py", list(options)):
        raise RuntimeError(f"exit code {code}")


def start_study(folder: Path, command: list[str]) -> tuple[Any, Path]:
    """A process that is forked from one that has imported everything, and the file of what it prints."""
    (folder / "temporary").mkdir(parents=True)
    environment.preload("faults.environment")
    return start(folder, run_study, *command[2:]), folder / "output.txt"


def wait_for(condition) -> None:
    deadline = time.monotonic() + 1200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

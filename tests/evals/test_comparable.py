"""Only what is comparable is compared: unfinished runs, unequal budgets, changed runs, data that moved or changed."""

import csv
import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from bsbr_pl.__main__ import main as command
from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import InductionData, MQARData, NeedleData, TextData
from bsbr_pl.evals.checkpoints import Checkpoint, read, read_all
from bsbr_pl.evals.evaluation import Evaluation
from bsbr_pl.evals.runs import RECORD_BYTES
from bsbr_pl.evals.saved_data import DataChangedError, DataLocation
from bsbr_pl.module import LanguageModule
from bsbr_pl.report import budgets, clocks, sources, verdict
from bsbr_pl.report.studies import Findings
from bsbr_pl.results import Results
from bsbr_pl.utils.flops import count_flops
from callbacks import LastCheckpoint, RunRecorder, Stopped

CONTEXT, BATCH, STEPS = 32, 4, 8


class Counted(Callback):
    """Counts the tokens of the batches that a model is trained on."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.tokens += batch["input_ids"].numel()


class CtrlC(Callback):
    """Sends SIGINT in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == self.step - 1:
            signal.raise_signal(signal.SIGINT)


def train(folder: Path, name: str, data: Any, seed: int = 0, **options: Any) -> int:
    """A run of `train.py`'s form in a folder; the number of tokens it was trained on."""
    stop = options.pop("stop_at", None)
    seed_everything(seed, verbose=False)
    chunks = {} if name == "standard" else {"chunk_size": 8}
    attention = partial(ARCHITECTURES[name], **chunks)
    module = LanguageModule(attention, data.vocab_size, hidden_dim=16, num_layers=1, num_heads=2, warmup_steps=2)
    best = ModelCheckpoint(folder / "checkpoints", "best", monitor="val/loss", enable_version_counter=False)
    counted = Counted()
    trainer = Trainer(
        **{
            "default_root_dir": folder,
            "logger": False,
            "callbacks": [RunRecorder(), best, LastCheckpoint(1), counted, *([CtrlC(stop)] if stop else [])],
            "max_epochs": -1,
            "max_steps": STEPS,
            "val_check_interval": 2,
            "log_every_n_steps": 2,
            "check_val_every_n_epoch": None,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
            **options,
        }
    )
    if stop:
        with pytest.raises(Stopped):
            trainer.fit(module, data)
    else:
        trainer.fit(module, data)
    return counted.tokens


def with_run(folder: Path, status: str | None = None, ended_by: str | None = None, **run: Any) -> None:
    """Write the description of a run into a real run's folder, in all its checkpoints and its record.json."""
    path = folder / "record.json"
    record = json.loads(path.read_text())
    arguments = record["run"]["arguments"] | run.pop("arguments", {})
    described = {"arguments": arguments, "changes": [], "planned_steps": STEPS, "step": record["steps"]}
    described |= {"tokens": record["steps"] * BATCH * CONTEXT} | run
    record |= {"run": described} | {name: v for name, v in (("status", status), ("ended_by", ended_by)) if v}
    path.write_text(json.dumps(record))
    for file in folder.glob("checkpoints/*.ckpt"):
        saved = torch.load(file, weights_only=True)
        done = saved["global_step"] / record["steps"]
        own = described | {"step": saved["global_step"], "tokens": int(done * described["tokens"])}
        model = {name: arguments.get(f"model.{name}", value) for name, value in saved["hyper_parameters"].items()}
        saved["hyper_parameters"] = model | {"attention": saved["hyper_parameters"]["attention"]}
        torch.save(saved | {"run": own}, file)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i}, the same as {i - 7}, and {i * i % 97}\n" for i in range(600)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, text) -> dict[str, int]:
    """The tokens that each of the runs was trained on."""
    root = tmp_path_factory.mktemp("made")
    cache = str(tmp_path_factory.mktemp("cache"))

    def data(**arguments: Any) -> TextData:
        small = {"context_length": CONTEXT, "batch_size": BATCH, "val_fraction": 0.1, "test_fraction": 0.1}
        return TextData(str(text), "bytes", cache_dir=cache, **small | arguments)

    tokens = {
        "seed0": train(root / "seed0", "bsbr", data()),
        "seed1": train(root / "seed1", "bsbr", data(seed=1), 1),
        "stopped2": train(root / "stopped2", "bsbr", data(), 2, stop_at=3),
        "stopped3": train(root / "stopped3", "bsbr", data(), 3, stop_at=3),
        "linear": train(root / "linear", "linear", data()),
        "linear_short": train(root / "linear_short", "linear", data(), max_steps=4),
        "batch2": train(root / "batch2", "bsbr", data(batch_size=2), 4),
        "context16": train(root / "context16", "bsbr", data(context_length=16), 5),
        "bfloat16": train(root / "bfloat16", "bsbr", data(), 6, precision="bf16-mixed"),
    }
    return {str(root / name): number for name, number in tokens.items()}


@pytest.fixture
def runs(made, tmp_path) -> Path:
    """A folder for copies of runs."""
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def take(made, runs):
    """Copies runs into the folder, without last.ckpt."""
    root = Path(next(iter(made))).parent

    def copy(*names: str, last: bool = False) -> None:
        for name in names:
            shutil.copytree(root / name, runs / name)
            if not last:
                (runs / name / "checkpoints" / "last.ckpt").unlink()

    return copy


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Measured once for all tests: a row is of weights, whatever is said of their run."""
    return tmp_path_factory.mktemp("results") / "results.jsonl"


def main(arguments: list[str]) -> int:
    return command(["evaluate", *arguments])


class Evaluated:
    """An evaluation of the checkpoints in a folder, and what a report says of it."""

    def __init__(self, results: Path, runs: Path) -> None:
        files = sorted(read_all([runs], trusted=True), key=lambda one: one.name)
        self.checkpoints = [one for one in files if isinstance(one, Checkpoint)]
        evaluation = Evaluation(Results(results))
        subjects = [checkpoint.subject() for checkpoint in self.checkpoints]
        evaluation.run(subjects, multiples=[1], lengths=[])
        self.results = evaluation.results
        self.rows = evaluation.rows(subjects)
        self.problems = {one.name: one.problem for one in files if one.problem}
        self.problems |= {r["about"]["checkpoint"]["name"]: r["values"]["problem"] for r in evaluation.problems}
        self.findings = Findings(self.rows)
        self.warnings = budgets.warned(self.findings)
        self.marks = sources.marks(self.findings)

    @property
    def names(self) -> dict[str, str]:
        """The label of each checkpoint by the name of its run."""
        return {Path(c.name).parts[-3]: self.findings.labels[c.digest] for c in self.checkpoints}

    @property
    def summaries(self) -> list[str]:
        return [f"{verdict.summary(study)} {verdict.background(study)}" for study in self.findings.studies]


def evaluate(results: Path, runs: Path) -> Evaluated:
    return Evaluated(results, runs)


def tables(evaluated: Evaluated) -> list[list[dict[str, Any]]]:
    """The rows of each ranking, by column."""
    found = []
    for study in evaluated.findings.studies:
        table = verdict.ranking(study)
        assert table is not None
        names = [column.name for column in table.columns]
        found.append([dict(zip(names, row, strict=True)) for row in table.frame.itertuples(index=False)])
    return found


def bits(evaluated: Evaluated) -> dict[str, float]:
    """Bits per byte of each checkpoint, by the name of its run."""
    digests = {c.digest: Path(c.name).parts[-3] for c in evaluated.checkpoints}
    rows = [row for row in evaluated.rows if row["identity"]["kind"] == "text"]
    return {digests[row["identity"]["checkpoint"]]: row["values"]["bits_per_byte"] for row in rows}


def test_a_stopped_run_is_no_seed_of_a_finished_one(take, runs, results):
    take("seed0", "stopped2")
    evaluation = evaluate(results, runs)
    assert evaluation.problems == {}
    found, own = tables(evaluation), bits(evaluation)
    rows = [(row["architecture"], row["run"], row["seeds"].value, row["bits per byte"].value) for (row,) in found]
    assert rows == [
        ("bsbr(chunk_size=8) [8 steps]", "finished", 1, own["seed0"]),
        ("bsbr(chunk_size=8) [stopped at 3 of 8 steps]", "stopped at 3 of 8 steps", 1, own["stopped2"]),
    ]
    unequal, unfinished = evaluation.warnings
    given = "bsbr(chunk_size=8) 8 steps, bsbr(chunk_size=8) stopped at 3 of 8 steps."
    assert unequal == f"These have unequal budgets, so the ranking does not compare architectures: {given}"
    assert "runs did not finish" in unfinished
    assert "stopped2 (stopped at 3 of 8 steps)" in unfinished
    (mark,) = evaluation.marks
    assert mark == ("stopped2", "stopped at 3 of 8 steps")
    words = evaluation.summaries
    assert all(given[:-1] in said and "none is tied" not in said for said in words)


def test_finished_seeds_are_averaged_with_their_budget_in_one_sentence(take, runs, results, made):
    take("seed0", "seed1", "linear")
    evaluation = evaluate(results, runs)
    (rows,), own = tables(evaluation), bits(evaluation)
    by_name = {row["architecture"]: row for row in rows}
    assert set(by_name) == {"bsbr(chunk_size=8)", "linear(chunk_size=8)"}
    seeds = by_name["bsbr(chunk_size=8)"]
    assert seeds["bits per byte"].value == pytest.approx((own["seed0"] + own["seed1"]) / 2)
    (tokens,) = {number for path, number in made.items() if Path(path).name in ("seed0", "seed1", "linear")}
    for row in rows:
        assert (row["steps"], row["batch"], row["training tokens"]) == (STEPS, BATCH, tokens)
    assert evaluation.warnings == []
    said = evaluation.summaries[0]
    assert "Equal budgets: 8 optimiser steps of 4 windows; 1,024 training tokens; " in said
    assert "training FLOPs, counted as 3 forward passes; " in said
    assert "data TextData text.txt D1, tokenizer bytes." in said


def test_the_clock_of_tokens_counts_those_of_the_batches(made, results):
    evaluation = Evaluation(Results(None))
    for path, tokens in made.items():
        one = read(Path(path) / "checkpoints" / "last.ckpt")
        assert one.run.tokens == tokens
        evaluation.courses([one.subject()])
        row = evaluation.results.rows[-1]
        validated = row["values"]["metrics"]["val/loss"]["step"][-1] + 1  # a logger counts from 0
        found = clocks.clock_values(Findings([row]).checkpoints[one.digest], row)
        assert found["tokens"][-1] == tokens * validated / one.step


def test_training_flops_are_those_that_another_counter_finds(take, runs):
    take("seed0", "linear_short")
    for name, steps in (("seed0", 8), ("linear_short", 4)):
        one = read(runs / name / "checkpoints" / "best.ckpt")
        forward = count_flops(one.module.model, torch.zeros(1, CONTEXT, dtype=torch.long))
        assert one.training_flops == pytest.approx(3 * forward * steps * BATCH, rel=0.02)


def test_flops_of_a_task_of_several_lengths_are_those_of_each(tmp_path):
    data = MQARData(64, [[16, 2, 64], [32, 4, 32]], [[16, 2, 8]], batch_size=8)
    tokens = train(tmp_path / "run", "standard", data, max_steps=12)  # one pass over the data: 8 and 4 batches
    with_run(tmp_path / "run", planned_steps=12, tokens=tokens)
    one = read(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert (tokens, one.run.tokens) == (64 * 16 + 32 * 32, tokens)
    forward = {n: count_flops(one.module.model, torch.zeros(1, n, dtype=torch.long)) for n in (16, 32)}
    assert one.training_flops == pytest.approx(3 * (64 * forward[16] + 32 * forward[32]), rel=0.02)


def test_unequal_budgets_are_warned_of_at_the_top_and_never_ranked_together(take, runs, tmp_path, capsys):
    take("seed0", "linear_short")
    output = tmp_path / "out"
    assert (
        main([str(runs), f"--output_dir={output}", "--lengths=[]", "--multiples=[1]", "--device=cpu", "--trust_data"])
        == 0
    )
    warned = "the ranking does not compare architectures: bsbr(chunk_size=8) 8 steps, linear(chunk_size=8) 4 steps."
    assert warned in capsys.readouterr().err
    page, text = (output / "report.html").read_text(), (output / "report.md").read_text().replace("\\", "")
    for shown, title in ((page, "</h1>"), (text, "# Attention architectures compared")):
        after = shown[shown.index(title) + len(title) :]
        assert warned in after[:400], "it stands before anything else"
        assert "none is tied" not in shown
        assert shown.count("The only one with this budget") == 2
    files = sorted(output.glob("tables/verdict_*.csv"))
    found = [list(csv.DictReader(file.read_text().splitlines())) for file in files]
    assert [[(row["architecture"], row["steps"], row["training tokens"]) for row in rows] for rows in found] == [
        [("bsbr(chunk_size=8) [8 steps]", "8", "1024")],
        [("linear(chunk_size=8) [4 steps]", "4", "512")],
    ]
    about = [json.loads(line)["about"]["run"] for line in (output / "results.jsonl").read_text().splitlines()]
    assert {(run["steps"], run["planned_steps"], run["tokens"], run["finished"]) for run in about} == {
        (8, 8, 1024, True),
        (4, 4, 512, True),
    }


@pytest.mark.parametrize(
    ("other", "own", "others", "tables_shown"),
    [
        ("batch2", "batch_size=4", "batch_size=2", 2),
        ("context16", "context_length=32", "context_length=16", 2),
        ("bfloat16", "precision=32-true", "precision=bf16-mixed", 1),
    ],
)
def test_what_differs_is_visible_in_the_names_of_all(take, runs, results, other, own, others, tables_shown):
    take("seed0", "linear", other)
    evaluation = evaluate(results, runs)
    assert evaluation.names == {
        "seed0": f"bsbr(chunk_size=8) [{own}]",
        "linear": f"linear(chunk_size=8) [{own}]",
        other: f"bsbr(chunk_size=8) [{others}]",
    }
    found = tables(evaluation)
    assert len(found) == tables_shown
    assert all(row["seeds"].value == 1 for rows in found for row in rows)
    assert bool(evaluation.warnings) == (tables_shown > 1)


def test_other_data_and_other_tokenizers_are_ranked_apart(take, runs, results, text, tmp_path):
    take("seed0")
    for name, options in (("bpe", {"tokenizer": "bpe", "bpe_vocab_size": 300}), ("less", {"test_fraction": 0.2})):
        data = {"tokenizer": "bytes", "context_length": CONTEXT, "batch_size": BATCH, "val_fraction": 0.1}
        train(runs / name, "bsbr", TextData(str(text), cache_dir=str(tmp_path / "cache"), **data | options), 1)
        (runs / name / "checkpoints" / "last.ckpt").unlink()
    evaluation = evaluate(results, runs)
    found = tables(evaluation)
    assert [[row["seeds"].value for row in rows] for rows in found] == [[1], [1], [1]]
    (apart,) = evaluation.warnings
    assert apart.startswith("Runs with different data or tokenizers are ranked separately: ")
    for words in ("D1, tokenizer", "D2, tokenizer", "D3, tokenizer", "tokenizer bytes", "tokenizer bpe (300 ids)"):
        assert words in apart


def test_two_runs_that_stopped_at_one_step_are_no_seeds_of_each_other(take, runs, results):
    take("stopped2", "stopped3")
    evaluation = evaluate(results, runs)
    (rows,) = tables(evaluation)
    assert sorted(row["architecture"] for row in rows) == [
        "bsbr(chunk_size=8) [stopped at 3 of 8 steps, seed=2]",
        "bsbr(chunk_size=8) [stopped at 3 of 8 steps, seed=3]",
    ]
    assert all(row["seeds"].value == 1 for row in rows)
    (unfinished,) = evaluation.warnings
    assert "stopped2" in unfinished
    assert "stopped3" in unfinished


def of_step(saved: dict[str, Any], step: int) -> dict[str, Any]:
    """A checkpoint as if it were of an earlier step."""
    return saved | {"global_step": step, "run": saved["run"] | {"step": step, "tokens": step * BATCH * CONTEXT}}


CONTRADICTIONS = {
    "another model": ({"hyper_parameters": {"ff_activation": "gelu"}}, "model.ff_activation='gelu' instead of 'relu2'"),
    "another rate": ({"hyper_parameters": {"learning_rate": 1.0}}, "model.learning_rate=1.0 instead of "),
    "another length": ({"datamodule_hyper_parameters": {"context_length": 64}}, "context_length=64 instead of 32"),
    "another step": ({"global_step": 6}, "it is of step 6, but its run is of step 8"),
    "more tokens": ({"run": {"tokens": 10**6}}, "8 steps read at most 1,024 tokens, not 1,000,000"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_checkpoint_that_contradicts_itself_is_a_problem(take, runs, name):
    take("seed0")
    path = runs / "seed0" / "checkpoints" / "best.ckpt"
    saved = torch.load(path, weights_only=True)
    changes, words = CONTRADICTIONS[name]
    for part, values in changes.items():
        saved[part] = saved[part] | values if isinstance(values, dict) else values
    torch.save(saved, path)
    assert words in read(path).problem


def test_a_copy_without_its_record_is_not_known_to_be_finished(take, runs, results):
    take("seed0", "seed1")
    (runs / "seed1" / "record.json").unlink()
    best = runs / "seed1" / "checkpoints" / "best.ckpt"
    saved = torch.load(best, weights_only=True)
    torch.save(of_step(saved, 6), best)  # the best of an earlier step
    evaluation = evaluate(results, runs)
    said = {"/".join(Path(c.name).parts[-3:]): c.run.status for c in evaluation.checkpoints}
    assert said["seed1/checkpoints/best.ckpt"] == "at 6 of 8 steps, not known whether its run finished"
    _, unknown = evaluation.warnings
    assert unknown.startswith("It is not known whether these runs finished, and they are not averaged with others: ")
    assert "seed1 (at 6 of 8 steps" in unknown


def test_the_best_and_the_last_of_one_run_have_one_budget_and_two_names(take, runs, results):
    take("linear", last=True)
    best, last = (runs / "linear" / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    saved = torch.load(best, weights_only=True)
    saved["state_dict"]["model.norm.bias"] += 0.01  # as if the best were another step's
    torch.save(of_step(saved, 4), best)
    (rows,) = tables(evaluate(results, runs))
    names = sorted(row["architecture"] for row in rows)
    assert names == ["linear(chunk_size=8) [checkpoint=best]", "linear(chunk_size=8) [checkpoint=last]"]
    assert {row["steps"] for row in rows} == {STEPS}, "the best was chosen from the whole run"
    shutil.copy(last, best)
    assert [Path(c.name).name for c in read_all([runs])] == ["best.ckpt"], "the same weights count once"


def test_of_the_same_weights_the_file_whose_run_is_known_counts(take, runs):
    take("stopped2")
    (runs / "a").mkdir()
    shutil.copy(runs / "stopped2/checkpoints/best.ckpt", runs / "a" / "copy.ckpt")
    (one,) = read_all([runs / "a", runs / "stopped2"])
    assert (one.name, one.run.finished) == (f"{runs}/stopped2/checkpoints/best.ckpt", False)


CHANGE = {"step": 5, "argument": "model.learning_rate", "before": 0.003, "after": 0.001}


def test_a_run_that_was_changed_is_marked_and_is_no_seed(take, runs, results):
    take("seed0", "seed1")
    with_run(runs / "seed0")
    with_run(runs / "seed1", changes=[CHANGE], arguments={"model.learning_rate": 0.001})
    evaluation = evaluate(results, runs)
    (rows,) = tables(evaluation)
    words = "learning_rate changed at step 5 (0.003 to 0.001)"
    assert sorted(row["architecture"] for row in rows) == [
        f"bsbr(chunk_size=8) [learning_rate=0.001, {words}]",
        "bsbr(chunk_size=8) [learning_rate=0.003]",
    ]
    (changed,) = evaluation.warnings
    assert changed == f"Arguments were changed during these runs: seed1 ({words})."
    assert evaluation.marks == [("seed1", words)]


def test_a_run_that_ended_early_has_the_budget_of_its_steps(take, runs, results):
    take("seed0", "linear_short")
    with_run(runs / "seed0", ended_by="max_steps")
    with_run(runs / "linear_short", ended_by="EarlyStopping")
    evaluation = evaluate(results, runs)
    full, early = tables(evaluation)
    assert (full[0]["run"], full[0]["steps"]) == ("finished", 8)
    assert (early[0]["run"], early[0]["steps"]) == ("4 of 8 steps, ended by EarlyStopping", 4)
    assert early[0]["architecture"] == "linear(chunk_size=8) [4 of 8 steps, ended by EarlyStopping]"
    (unequal,) = evaluation.warnings
    assert unequal.endswith("bsbr(chunk_size=8) 8 steps, linear(chunk_size=8) 4 steps.")
    said = evaluation.summaries
    assert "ended by EarlyStopping" in said[1]


def test_a_run_bounded_by_time_has_the_budget_of_its_steps(take, runs):
    take("seed0")
    with_run(runs / "seed0", ended_by="max_time", planned_steps=None, arguments={"trainer.max_time": 5.0})
    one = read(runs / "seed0" / "checkpoints" / "best.ckpt")
    assert (one.run.length, one.run.finished) == ("8 steps, ended by max_time", True)
    with_run(runs / "seed0", status="stopped by Stopped: SIGINT", planned_steps=None)
    one = read(runs / "seed0" / "checkpoints" / "best.ckpt")
    assert (one.run.length, one.run.finished) == ("stopped at 8 steps", False)


def test_weights_to_start_from_are_a_part_of_the_budget(take, runs, results):
    take("seed0", "linear")
    saved = torch.load(runs / "linear/checkpoints/best.ckpt", weights_only=True)
    torch.save(saved | {"initial_weights": "gpt2"}, runs / "linear/checkpoints/best.ckpt")
    evaluation = evaluate(results, runs)
    assert len(tables(evaluation)) == 2
    (unequal,) = evaluation.warnings
    assert "bsbr(chunk_size=8) 8 steps from its own start, linear(chunk_size=8) 8 steps from gpt2." in unequal


def finished(name: str, run: dict[str, Any], record: dict[str, Any] | None, step: int) -> Checkpoint:
    """A checkpoint that says this of its run, beside a record.json that says that."""
    module = LanguageModule(ARCHITECTURES[name], 257, hidden_dim=16, num_layers=1, num_heads=2)
    arguments = {"seed": 0, "model.attention": name, "model.hidden_dim": 16} | run.get("arguments", {})
    if "model.attention.0" in arguments:  # layers that differ have names of their own
        del arguments["model.attention"]
    beside = {}
    if record is not None:
        of = {"arguments": arguments | record.get("arguments", {}), "step": record["steps"]}
        of |= {"planned_steps": record.get("planned_steps"), "changes": record.get("changes", [])}
        beside = record | {"run": of}
    return Checkpoint("a.ckpt", "0", module, step, {"run": run | {"arguments": arguments}}, run_record=beside)


UNKNOWN = "at 50 of 600 steps, not known whether its run finished"
RUNNING = "stopped at 90 of 600 steps, or still running"
PLAN, MORE = {"planned_steps": 600}, {"planned_steps": 900}
DONE = {"status": "finished", "steps": 600}
LR = "model.learning_rate"
RATE = {"arguments": {LR: 0.01, "data.batch_size": 8, "data.num_workers": 0}}
CHANGED = [{"argument": LR, "step": 20, "before": 0.1, "after": 0.01}]
LAYERS = {"arguments": {"model.attention.0": "standard", "model.attention.1": "linear"}}


@pytest.mark.parametrize(
    ("run", "record", "step", "expected"),
    [
        (PLAN, None, 600, "600 steps"),
        (PLAN, None, 320, "at 320 of 600 steps, not known whether its run finished"),
        ({}, None, 600, "at 600 steps, not known whether its run finished"),
        (PLAN, {"status": "finished", "steps": 600}, 320, "600 steps"),
        (PLAN, {"status": "finished", "steps": 70}, 70, "70 of 600 steps"),
        (PLAN, {"status": "stopped by Stopped: SIGINT after 50 steps", "steps": 50}, 50, "stopped at 50 of 600 steps"),
        (PLAN, {"status": "stopped by Stopped", "steps": 90}, 50, "stopped at 90 of 600 steps"),
        (PLAN, {"status": "running", "steps": 50}, 90, "stopped at 90 of 600 steps, or still running"),
        (PLAN, {"status": "running", "steps": 590}, 600, "600 steps"),
        # The record of another run, or one from before this checkpoint, says nothing.
        (PLAN, {"status": "finished", "steps": 600, "arguments": {"seed": 1}}, 50, UNKNOWN),
        (PLAN, {"status": "finished", "steps": 20}, 50, UNKNOWN),
        (PLAN, {"status": "finished", "steps": 600, "arguments": {"model.attention": None}}, 50, UNKNOWN),
        (PLAN | RATE, {"status": "finished", "steps": 600, "arguments": {"model.learning_rate": 0.1}}, 50, UNKNOWN),
        (PLAN | RATE, DONE | {"arguments": {"data.batch_size": 16}}, 50, UNKNOWN),
        (PLAN | RATE, DONE | {"arguments": {"data.num_workers": 3}}, 50, "600 steps"),
        # An argument that a resume changed, as the record or the checkpoint says.
        (
            PLAN | RATE,
            {"status": "finished", "steps": 600, "arguments": {LR: 0.1}, "changes": CHANGED},
            50,
            "600 steps",
        ),
        (PLAN | RATE | {"changes": CHANGED}, {"status": "running", "steps": 50, "arguments": {LR: 0.1}}, 90, RUNNING),
        (PLAN | LAYERS, {"status": "finished", "steps": 600, "arguments": LAYERS["arguments"]}, 50, "600 steps"),
        # A run that was asked for more later.
        (PLAN, MORE | {"status": "stopped by Stopped", "steps": 700}, 320, "stopped at 700 of 900 steps"),
        (PLAN, MORE | {"status": "finished", "steps": 900}, 320, "900 steps"),
    ],
)
def test_whether_a_run_finished(run, record, step, expected):
    assert finished("standard", run, record, step).run.length == expected


def test_a_record_that_contradicts_itself_is_not_believed():
    ended = {"status": "finished", "steps": 50, "ended_by": "max_steps"}
    assert finished("standard", PLAN, ended, 50).run.finished is None
    assert finished("standard", PLAN, ended | {"ended_by": "EarlyStopping"}, 50).run.finished is True


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"\xff\xfe{}",
        b"{" * 9,
        b"[" * 200_000,
        b'{"status": "finished"}',
        b'{"status": 3, "steps": 8}',
        b'{"status": "finished", "steps": "many", "model": {}, "run": [1]}',
        b'{"status": "finished", "steps": 1e999, "run": {"arguments": 3, "step": true, "changes": 5}}',
        b'{"status": "finished", "run": {"arguments": {"model.attention": "x"}, "step": -1, "planned_steps": NaN}}',
    ],
)
def test_a_damaged_record_is_no_record(take, runs, content):
    take("stopped2")
    (runs / "stopped2" / "record.json").write_bytes(content)
    one = read(runs / "stopped2" / "checkpoints" / "best.ckpt")
    assert isinstance(one, Checkpoint)
    assert one.run.length == "at 2 of 8 steps, not known whether its run finished"


@pytest.mark.parametrize("kind", ["folder", "pipe", "endless", "huge", "own loop"])
def test_what_is_no_file_of_a_record_is_not_read(take, runs, kind):
    take("stopped2")
    path = runs / "stopped2" / "record.json"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with path.open("wb") as stream:
            stream.truncate(RECORD_BYTES + 1)
    else:
        path.symlink_to(path)
    assert read(runs / "stopped2" / "checkpoints" / "best.ckpt").run.finished is None


EMPTY_RUN: dict[str, Any] = {"arguments": {}}
#: What an odd or hostile checkpoint may hold: part -> value, and the field that the problem names.
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "run is a number": ({"run": 3}, "run must be of type object, got 3"),
    "run is a list": ({"run": []}, "run must be of type object"),
    "arguments are a list": ({"run": {"arguments": [1]}}, "run.arguments must be of type object"),
    "changes are an object": ({"run": EMPTY_RUN | {"changes": {"a": 1}}}, "run.changes must be of type list"),
    "a change is a number": ({"run": EMPTY_RUN | {"changes": [3]}}, r"run.changes\[\] must be of type object"),
    "steps below 0": ({"run": EMPTY_RUN | {"planned_steps": -1}}, "run.planned_steps=-1 must be at least 0"),
    "steps beyond 64 bits": ({"run": EMPTY_RUN | {"step": 10**30}}, "beyond 64 bits"),
    "tokens as text": ({"run": EMPTY_RUN | {"tokens": "1"}}, "run.tokens must be of type int, got '1'"),
    "steps in words": ({"global_step": "many"}, r"global_step is of type str"),
    "a long text": ({"run": {"arguments": {"trainer.x": "x" * (2**20 + 1)}}}, "a text of 1,048,577 characters"),
    "half a character": ({"run": {"arguments": {"trainer.x": "\ud800"}}}, "surrogates not allowed"),
    "a tensor": ({"run": {"arguments": {"trainer.x": torch.zeros(2)}}}, "a value of type Tensor"),
    "deep": ({"run": {"arguments": {"trainer.x": eval("[" * 90 + "]" * 90)}}}, "levels deep"),
    "a fingerprint that is a number": ({"TextData": {"fingerprint": 3}}, "data.fingerprint must be of type str"),
    "weights of a number": ({"initial_weights": 3}, r"initial_weights is of type int"),
}
RECORDED: dict[str, tuple[dict[str, Any], str]] = {
    "columns of unequal lengths": (
        {"metrics": {"val/loss": {"step": [1, 2, 3], "value": [1.0], "seconds": [1.0]}}},
        "metrics.val/loss has columns of different lengths",
    ),
    "a column of text": ({"metrics": {"val/loss": {"step": [1], "value": ["x"]}}}, "value.* must be of type float"),
    "no values": ({"metrics": {"val/loss": {"step": [1]}}}, "metrics.val/loss lacks value"),
    "no metrics": ({"metrics": "many"}, "metrics must be of type object"),
    "seconds in words": ({"seconds": "many"}, "seconds must be of type float"),
    "a number that cannot be squared": ({"seconds": 1e300}, r"the number 1e\+300"),
    "an environment of numbers": ({"facts": {"environment": [3]}}, "environment must be of type object"),
    "half a process": ({"facts": {"environment": {"processes": 0.5}}}, "processes must be of type int"),
    "facts that are a list": ({"facts": [1]}, "facts must be of type object"),
}


@pytest.mark.parametrize("odd", [*HOSTILE, *RECORDED])
def test_a_hostile_description_is_a_problem_of_its_file_alone(take, runs, results, odd):
    take("stopped2", "seed0")
    path = runs / "stopped2" / "checkpoints" / "best.ckpt"
    saved = torch.load(path, weights_only=True)
    if odd in HOSTILE:
        saved |= HOSTILE[odd][0]
    else:
        (recorder,) = (name for name in saved["callbacks"] if name.startswith("RunRecorder"))
        saved["callbacks"][recorder] |= RECORDED[odd][0]
    torch.save(saved, path)
    evaluation = evaluate(results, runs)
    assert evaluation.problems.keys() == {path.as_posix()}
    assert re.search((HOSTILE | RECORDED)[odd][1], evaluation.problems[path.as_posix()])
    ((row,),) = tables(evaluation)
    assert row["architecture"] == "bsbr(chunk_size=8)"
    assert bits(evaluation).keys() == {"seed0"}


EVIL = '"><script>alert(1)</script>| $x$ $y **b** `c`\n# z'


def test_what_a_run_says_of_itself_is_only_text(take, runs, tmp_path):
    take("seed0", "linear")
    changes = [{"step": 1, "argument": f"model.{EVIL}", "before": EVIL, "after": EVIL}]
    with_run(runs / "seed0", changes=changes, ended_by=EVIL, planned_steps=None, arguments={f"trainer.{EVIL}": EVIL})
    with_run(runs / "linear", arguments={f"trainer.{EVIL}": 1, "initial_weights": EVIL})
    output = tmp_path / "out"
    assert main([str(runs), f"--output_dir={output}", "--lengths=[16]", "--multiples=[1]", "--device=cpu"]) == 0
    page, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    assert page.count("<script") == 1
    assert "&lt;script&gt;" in page
    assert "<script" not in text.replace("\\<", "")
    assert "\n# z" not in text


def test_a_value_without_end_is_a_problem(take, runs, results):
    take("stopped2", "seed0")
    value: Any = []
    value.append(value)
    path = runs / "stopped2/checkpoints/best.ckpt"
    torch.save(torch.load(path, weights_only=True) | {"run": {"arguments": {"trainer.x": value}}}, path)
    evaluation = evaluate(results, runs)
    assert "levels deep" in evaluation.problems[path.as_posix()]
    assert len(tables(evaluation)) == 1


# The data.


def test_a_text_that_moved_is_found_and_gives_the_same_numbers(take, runs, results, tmp_path, text):
    take("seed0")
    before = bits(evaluate(results, runs))
    path = runs / "seed0/checkpoints/best.ckpt"
    elsewhere(path, source="gone.txt", cache_dir=str(tmp_path / "empty"))
    output = tmp_path / "out"
    options = [str(runs), f"--output_dir={output}", "--lengths=[]", "--multiples=[1]", "--device=cpu"]
    assert main([*options, f"--data.source={text}", f"--data.cache_dir={tmp_path / 'other'}"]) == 0
    (row,) = [row for row in Results(output / "results.jsonl").rows if row["identity"]["kind"] == "text"]
    assert row["values"]["bits_per_byte"] == before["seed0"]
    assert list((tmp_path / "other").glob("*/tokens.bin")), "and is prepared where it was told"


def elsewhere(path: Path, **arguments: Any) -> None:
    """Change the arguments of the data in a checkpoint."""
    saved = torch.load(path, weights_only=True)
    saved["datamodule_hyper_parameters"] |= arguments
    saved["run"]["arguments"] |= {f"data.{name}": value for name, value in arguments.items()}
    torch.save(saved, path)


@pytest.fixture
def cache(take, runs) -> Path:
    """The folder of prepared text that the run of seed 0, copied now, was trained from."""
    take("seed0")
    return Path(read(runs / "seed0/checkpoints/best.ckpt").data_arguments["cache_dir"])


@pytest.mark.parametrize("where", ["own", "given", "default"])
def test_prepared_tokens_stand_for_a_source_that_has_gone(cache, runs, tmp_path, where, monkeypatch):
    path = runs / "seed0/checkpoints/best.ckpt"
    expected = read(path, trusted=True).open_data()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if where == "default":
        shutil.copytree(cache, tmp_path / "xdg" / "bsbr_pl")
    elsewhere(path, source="gone.txt", cache_dir=str(cache) if where == "own" else None)
    location = DataLocation(cache_dir=str(cache)) if where == "given" else DataLocation()
    data = read(path, location, trusted=where == "own").open_data(eval_batch_size=2)
    assert data.fingerprint == expected.fingerprint
    assert data.text("val") == expected.text("val")
    assert next(iter(data.loader("val")))["input_ids"].shape == (2, CONTEXT)


def test_a_source_that_cannot_be_found_names_the_folder_and_the_options(cache, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    elsewhere(runs / "seed0/checkpoints/best.ckpt", source="small.txt", cache_dir=None)
    one = read(runs / "seed0/checkpoints/best.ckpt", trusted=True)
    with pytest.raises(ValueError, match=r"source='small\.txt' does not exist") as error:
        one.open_data()
    for words in (f"looked in {tmp_path}", "--data.source=PATH", "--data.cache_dir=PATH"):
        assert words in str(error.value)
    assert "--trust_data" not in str(error.value)


@pytest.mark.parametrize("fingerprint", ["../../secret", "x" * 32, "", "0" * 31])
def test_a_fingerprint_leads_out_of_no_folder(cache, runs, tmp_path, fingerprint, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    one = read(runs / "seed0/checkpoints/best.ckpt", DataLocation(cache_dir=str(cache)))
    prepared = next(folder for folder in cache.iterdir() if folder.is_dir())
    shutil.copytree(prepared, cache.parent / "secret", dirs_exist_ok=True)
    one.data_arguments["source"], one.data_fingerprint = "gone.txt", fingerprint
    with pytest.raises(ValueError, match=r"gone\.txt"):
        one.open_data()


def test_another_text_is_a_problem_and_nothing_is_measured_on_it(take, runs, tmp_path, text, capsys):
    take("seed0", "linear")
    mine = tmp_path / "mine.txt"
    shutil.copy(text, mine)
    elsewhere(runs / "seed0/checkpoints/best.ckpt", source=str(mine))
    output = tmp_path / "out"
    options = [str(runs), f"--output_dir={output}", "--lengths=[]", "--multiples=[1]", "--device=cpu", "--trust_data"]
    assert main(options) == 0
    assert "Problems" not in capsys.readouterr().err
    trained_on = read(runs / "linear/checkpoints/best.ckpt").data_fingerprint
    mine.write_text(text.read_text() + "one more line\n")
    assert main(options) == 0
    errors = capsys.readouterr().err
    now = TextData(str(mine), "bytes", val_fraction=0.1, test_fraction=0.1, cache_dir=str(tmp_path / "c")).fingerprint
    name = f"{runs}/seed0/checkpoints/best.ckpt"
    assert f"{name}: the data changed since training: source='{mine}'" in errors
    report = (output / "report.md").read_text().replace("\\", "")
    problems = report[report.index("## Problems") : report.index("## Certificates")]
    assert "seed0" in problems
    for words in (now, trained_on):
        assert words in errors
        assert words in problems
    assert "None: every" not in report
    rows = [row for row in Results(output / "results.jsonl").rows if row["identity"]["kind"] == "text"]
    assert {row["identity"]["data"] for row in rows} == {trained_on}, "nothing was measured on the other text"
    (file,) = output.glob("tables/verdict_*.csv")
    shown = {row["architecture"]: row["bits per byte"] for row in csv.DictReader(file.read_text().splitlines())}
    assert shown["bsbr(chunk_size=8)"] == "", "nor is an accuracy shown that was measured earlier"
    assert float(shown["linear(chunk_size=8)"]) > 0


def test_a_task_that_changed_is_a_problem(tmp_path, results):
    data = InductionData(16, 16, [8, 16], num_train=64, num_test=20, batch_size=8)
    train(tmp_path / "runs" / "recall", "bsbr", data)
    path = tmp_path / "runs/recall/checkpoints/best.ckpt"
    (tmp_path / "runs/recall/checkpoints/last.ckpt").unlink()
    saved = torch.load(path, weights_only=True)
    saved["InductionData"]["fingerprint"] = "0" * 32  # as another version of the task would have
    torch.save(saved, path)
    with pytest.raises(DataChangedError, match=f"InductionData has the fingerprint {data.fingerprint}.* {'0' * 32}"):
        read(path).open_data(test_lengths=[8])
    evaluation = evaluate(results, tmp_path / "runs")
    assert "the data changed since training" in evaluation.problems[path.as_posix()]
    assert "--data.source" not in evaluation.problems[path.as_posix()]
    assert not [row for row in evaluation.results.rows if row["identity"].get("data") == data.fingerprint]


def test_a_needle_in_a_text_that_moved_is_found(tmp_path, text, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    options = {"tokenizer": "bytes", "context_length": 32, "num_train": 64, "num_test": 4, "batch_size": 4}
    cache = str(tmp_path / "cache")
    source = shutil.copy(text, tmp_path / "was_here.txt")
    data = NeedleData(str(source), cache_dir=cache, **options)
    data.prepare_data()
    source.unlink()
    module = LanguageModule(ARCHITECTURES["standard"], data.vocab_size, hidden_dim=16, num_layers=1, num_heads=2)
    arguments = {**options, "source": str(source), "cache_dir": None}
    for location in (DataLocation(source=str(text)), DataLocation(cache_dir=cache)):
        one = Checkpoint("a", "0", module, 1, {}, "NeedleData", arguments, data.fingerprint, location=location)
        assert one.open_data(eval_batch_size=2).fingerprint == data.fingerprint
    one.location = DataLocation()
    assert one.open_data().fingerprint == data.fingerprint, "from the default folder, where the first one left it"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(ValueError, match=r"--data\.source=PATH"):
        one.open_data()


def test_the_standard_library_of_another_python_is_read_from_its_tokens(cache, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = runs / "seed0/checkpoints/best.ckpt"
    expected = read(path, trusted=True).open_data().text("val")
    elsewhere(path, source="stdlib", cache_dir=str(tmp_path / "own"))  # whose fingerprint is another one here
    assert read(path, DataLocation(cache_dir=str(cache))).open_data().text("val") == expected
    with pytest.raises(DataChangedError, match=r"standard library of Python .* --data\.cache_dir=PATH"):
        read(path).open_data()


def test_a_tokenizer_that_has_gone_is_named(cache, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = runs / "seed0/checkpoints/best.ckpt"
    elsewhere(path, tokenizer="gone.json", cache_dir=str(tmp_path / "own"))
    with pytest.raises(ValueError, match=r"tokenizer='gone\.json' does not exist .* --data\.cache_dir=PATH") as error:
        read(path, trusted=True).open_data()
    assert "--data.source" not in str(error.value)
    assert read(path, DataLocation(cache_dir=str(cache))).open_data().corpus.fingerprint == read(path).data_fingerprint


def test_one_text_under_two_paths_is_one_configuration(take, runs, results, text, tmp_path):
    take("seed0", "seed1")
    shutil.copy(text, tmp_path / "again.txt")
    elsewhere(runs / "seed1/checkpoints/best.ckpt", source=str(tmp_path / "again.txt"))
    ((row,),) = tables(evaluate(results, runs))
    assert (row["architecture"], row["seeds"].value) == ("bsbr(chunk_size=8)", 2)


def test_seeds_have_one_configuration_and_runs_of_another_length_or_precision_have_not(take, runs, tmp_path):
    take("seed0", "seed1", "stopped2")
    configs = {Path(c.name).parts[-3]: c.config for c in read_all([runs])}
    assert configs["seed0"] == configs["seed1"]
    assert configs["seed0"]["length"] == "8 steps"
    differing = {k for k, value in configs["seed0"].items() if configs["stopped2"].get(k) != value}
    assert differing == {"length"}
    content = torch.load(next(runs.glob("seed0/**/best.ckpt")), weights_only=True)
    content["run"]["arguments"]["trainer.precision"] = "bf16-mixed"
    torch.save(content, tmp_path / "best.ckpt")
    other = read(tmp_path / "best.ckpt").config
    assert {k for k, value in configs["seed0"].items() if other[k] != value} >= {"trainer.precision"}

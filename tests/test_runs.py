"""A run tells the truth under every option: which run is continued, how long it is, what is reported at its end."""

import contextlib
import csv
import inspect
import json
import math
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from bsbr_pl.attention import BSBRAttention, SlidingWindowAttention
from bsbr_pl.checkpoint import load_checkpoint
from bsbr_pl.data import DATA_SETS, MQARData, TextData, TokenData
from bsbr_pl.evals.checkpoints import read
from bsbr_pl.module import LanguageModule
from bsbr_pl.run import check_same_model, fixed_differences, in_words, kind, model_arguments

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n\n" for i in range(500))
OPTIONS = {
    "data": {"source": "text.txt", "tokenizer": "bytes", "context_length": 32, "batch_size": 4, "cache_dir": "cache"},
    "model": {"hidden_dim": 16, "num_heads": 2, "num_layers": 1, "attention.chunk_size": 8, "warmup_steps": 2},
    "trainer": {"accelerator": "cpu", "max_steps": 6, "val_check_interval": 4, "log_every_n_steps": 1},
}
TEXT_OPTIONS = [f"--data.{key}={value}" for key, value in OPTIONS["data"].items()]
FEW = "trainer: {enable_progress_bar: false, callbacks: []}\n"  # those that every run has are there all the same


class Seen(Callback):
    """The samples and the learning rate of every batch, and SIGINT at the start of step `stop`."""

    batches: ClassVar[list[tuple[int, list[int], float]]] = []
    stop: ClassVar[int | None] = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.batches.append((trainer.global_step, batch["index"].tolist(), rate))
        if trainer.global_step == self.stop:
            Seen.stop = None  # a second one would end the process
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(train, "REQUIRED", (*train.REQUIRED, Seen))
    monkeypatch.setattr(Seen, "batches", [])
    monkeypatch.setattr(Seen, "stop", None)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "few.yaml").write_text(FEW)
    return tmp_path


def fit(*options: str, command: str = "fit") -> Any:
    """Train a tiny model; None where the command ends before."""
    sections = [f"--{section}.{key}={value}" for section, values in OPTIONS.items() for key, value in values.items()]
    Seen.batches.clear()
    with contextlib.suppress(SystemExit):  # stopped, or finished before
        return train.main([command, f"--config={ROOT / 'configs/bsbr.yaml'}", "--config=few.yaml", *sections, *options])


def record(run: str = "runs/version_0") -> dict[str, Any]:
    return json.loads(Path(run, "record.json").read_text())


def files(folder: str | Path = "runs") -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def steps_of(name: str, run: str = "runs/version_0") -> list[int]:
    return record(run)["metrics"][name]["step"]


@torch.no_grad()
def loss_of(path: str, batches: int | None = None) -> tuple[float, int]:
    """The validation loss of a checkpoint (nats a token) and the tokens it is of, without the product's metrics."""
    model = LanguageModule.load(path).model
    data = TextData("text.txt", "bytes", context_length=32, batch_size=4, cache_dir="cache")
    tokens = torch.from_numpy(data.corpus.tokens("val").astype("int64"))
    nats, count = 0.0, 0
    for start in list(range(0, len(tokens) - 1, 32))[: None if batches is None else 4 * batches]:
        window = tokens[start : start + 33]
        logits = model(window[None, :-1])[0]
        nats += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return nats / count, count


# Which run is continued


def test_last_continues_the_run_of_this_command_not_the_newest(folder):
    Seen.stop = 2
    fit()
    Seen.stop = None
    fit("--seed_everything=1")
    other = files("runs/version_1")
    fit("--ckpt_path=last")
    assert (record()["run"]["arguments"]["seed"], record()["steps"], record()["resumed_at_step"]) == (0, 6, 3)
    assert [batch[0] for batch in Seen.batches] == [3, 4, 5]
    assert files("runs/version_1") == other
    with pytest.raises(
        ValueError, match=r"no run in runs is this command's: version_0 has seed=0 instead of 2; ver.*1"
    ):
        fit("--seed_everything=2", "--ckpt_path=last")


def test_a_finished_run_is_not_touched(folder, capsys):
    fit()
    before = files(".")
    for path in ("last", "runs/version_0/checkpoints/last.ckpt"):
        for options in ([], ["--trainer.max_steps=3"], ["--model.learning_rate=1"]):
            fit(f"--ckpt_path={path}", *options)
            assert not Seen.batches
            assert files(".") == before
            said = "runs/version_0 is finished: 6 steps, by max_steps. Nothing was changed. For more steps, give the "
            assert capsys.readouterr().out.endswith(said + "same command a larger --trainer.max_steps\n")


def test_an_earlier_checkpoint_of_a_finished_run_can_be_trained_on_from(folder):
    saving = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: '{step}', "
    saving += "every_n_train_steps: 3, save_top_k: -1}}"
    (folder / "few.yaml").write_text(FEW.replace("[]", f"[{saving}]"))
    fit()
    before = files("runs/version_0")
    fit("--ckpt_path=runs/version_0/checkpoints/step=3.ckpt")
    assert [batch[0] for batch in Seen.batches] == [3, 4, 5]
    assert record("runs/version_1")["steps"] == 6
    assert files("runs/version_0") == before


FOREIGN_RUNS = {
    "the checkpoint.run must be of type object, got 5": 5,
    "the checkpoint.run lacks arguments": {},
    "the checkpoint.run.arguments must be of type object, got 3": {"arguments": 3},
    "the checkpoint.run.changes must be of type list, got {}": {"arguments": {}, "changes": {}, "step": "x"},
}


@pytest.mark.parametrize("words", FOREIGN_RUNS)
def test_a_checkpoint_with_a_foreign_description_is_not_resumed(folder, words):
    fit()
    path = Path("runs/version_0/checkpoints/last.ckpt")
    torch.save(torch.load(path, weights_only=True) | {"run": FOREIGN_RUNS[words]}, path)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        fit("--ckpt_path=last", "--trainer.max_steps=7")


FIXED = {
    "--model.attention.chunk_size=16": "model.attention.chunk_size=16 instead of 8",
    "--model.attention=linear": "model.attention='linear' instead of 'bsbr'",
    "--model.ff_activation=gelu": "model.ff_activation='gelu' instead of 'relu2'",
    "--model.num_heads=4": "model.num_heads=4 instead of 2",
    "--data.batch_size=8": "data.batch_size=8 instead of 4",
    "--data.seed=1": "data.seed=1 instead of 0",
    "--data.context_length=16": "data.context_length=16 instead of 32",
    "--data.eval_context_length=16": "data.eval_context_length=16 instead of None",
    "--data.val_fraction=0.1": "data.val_fraction=0.1 instead of 0.05",
    "--seed_everything=3": "seed=3 instead of 0",
    "--trainer.accumulate_grad_batches=2": "trainer.accumulate_grad_batches=2 instead of 1",
    "--trainer.limit_val_batches=1": "trainer.limit_val_batches=1 instead of None",
    "--trainer.max_epochs=2": "trainer.has_epochs=True instead of False",
    "--trainer.callbacks+=EMAWeightAveraging": "trainer.weight_averaging='EMAWeightAveraging' instead of None",
}


def test_fixed_arguments_are_refused_by_name(folder):
    fit()
    path, before = "runs/version_0/checkpoints/last.ckpt", files("runs")
    for option, words in FIXED.items():
        with pytest.raises(ValueError) as refused:  # noqa: PT011 - all of it is looked at below
            fit("--trainer.max_steps=9", option, f"--ckpt_path={path}")
        assert str(refused.value).startswith(f"a run cannot be resumed with {words}")
        assert str(refused.value).endswith(
            ": give its own arguments, or start a new run, from its weights with --initial_weights=<the checkpoint>"
        )
    assert files("runs") == before


#: Options of an evaluation with which the weights fit, but those of another model.
OTHER_MODELS = {
    "--model.attention.chunk_size=16": "model.attention.chunk_size=16 instead of 8",
    "--model.ff_activation=gelu": "model.ff_activation='gelu' instead of 'relu2'",
    "--model.num_heads=4": "model.num_heads=4 instead of 2",
}


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_not_evaluated_as_another_model(folder, command, recwarn):
    fit("--trainer.max_steps=1")
    path, before = "--ckpt_path=runs/version_0/checkpoints/last.ckpt", files()
    for option, words in OTHER_MODELS.items():
        expected = (
            f"the checkpoint's model cannot be evaluated with {words}: give the arguments that it was trained with"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            fit(option, path, command=command)
    assert files() == before
    recwarn.clear()
    free = ["--model.learning_rate=1", "--model.dropout=0.5", "--model.beta1=0.1", "--model.compile=false"]
    assert fit(*free, path, command=command) is not None
    assert [str(warning.message) for warning in recwarn if "dirpath" in str(warning.message)] == []


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_are_part_of_the_run(folder):
    """Without the callback, a run would go on from the averaged weights."""
    averaging = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"]
    fit(*averaging)
    kept = {name: value for name, value in record()["run"]["arguments"].items() if "averaging" in name}
    settings = {"decay": 0.5, "use_buffers": True, "update_every_n_steps": 1}
    settings |= dict.fromkeys(("update_starting_at_step", "update_starting_at_epoch"))
    settings = {f"trainer.weight_averaging.{name}": value for name, value in settings.items()}
    assert kept == {"trainer.weight_averaging": "EMAWeightAveraging", **settings}
    path, more = Path("runs/version_0/checkpoints/last.ckpt"), "--trainer.max_steps=9"
    for other, words in (
        ([], r"=None instead of 'EMAWeightAveraging'"),
        ([averaging[0], "--trainer.callbacks.decay=0.9"], r"\.decay=0.9 instead of 0.5"),
    ):
        with pytest.raises(ValueError, match=f"^a run cannot be resumed with trainer.weight_averaging{words}: give"):
            fit(*other, more, f"--ckpt_path={path}")
    config = read(path).config
    assert (config["trainer.weight_averaging"], config["trainer.weight_averaging.decay"]) == ("EMAWeightAveraging", 0.5)
    saved = torch.load(path, weights_only=True)
    for name in kept:
        del saved["run"]["arguments"][name]
    torch.save(saved, path)
    fit(*averaging, more, "--ckpt_path=last")
    assert record()["steps"] == 9, "a checkpoint of an earlier version"


def test_a_window_is_part_of_the_model(folder):
    before = {"attention": partial(SlidingWindowAttention, window_size=8), "hidden_dim": 16}
    now = {"attention": SlidingWindowAttention, "hidden_dim": 16}
    with pytest.raises(ValueError, match=r"evaluated with model\.attention\.window_size=128 instead of 8: give the"):
        check_same_model(model_arguments(before), model_arguments(now))


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ([8, 8], [8, 8], None),
        ([8, 16], [8, 16, 8, 16], None),
        ([8, 16], [8, 16, 16, 8], "model.attention.2.window_size=16 instead of 8"),
        ([8, 16], [16], "model.attention.0.window_size=16 instead of 8"),
        ([16], [8, 16], "model.attention.0.window_size=8 instead of 16"),
    ],
)
def test_layers_are_compared_one_by_one(before, now, words):
    """Of four layers, by their windows."""
    windows = [[partial(SlidingWindowAttention, window_size=size) for size in sizes] for sizes in (before, now)]
    arguments = [model_arguments({"attention": attention, "num_layers": 4}) for attention in windows]
    found = in_words(fixed_differences(*arguments), 1)
    assert found.startswith(words) if words else found == ""


def test_a_run_in_a_folder_of_a_folder_is_resumed_there(folder):
    version = "--trainer.logger.version=exp/one"
    fit(version, "--trainer.max_steps=1")
    fit(version, "--trainer.max_steps=2", "--ckpt_path=last")
    assert record("runs/exp/one")["steps"] == 2
    assert sorted(path.name for path in Path("runs/exp").iterdir()) == ["one"]


def test_another_text_is_refused_and_a_moved_one_is_not(folder):
    fit()
    (folder / "moved").mkdir()
    (folder / "text.txt").rename(folder / "moved" / "text.txt")
    fit("--data.source=moved/text.txt", "--trainer.max_steps=8", "--ckpt_path=last")
    assert record()["steps"] == 8
    (folder / "moved" / "text.txt").write_text(TEXT + "# more\n")
    with pytest.raises(ValueError, match=r"^a run cannot be resumed with data.fingerprint='\w+' instead of '\w+'"):
        fit("--data.source=moved/text.txt", "--trainer.max_steps=9", "--ckpt_path=last")


def test_applied_arguments_take_effect_and_both_values_are_kept(folder):
    fit()
    new = ["--model.learning_rate=1e-5", "--model.weight_decay=0.9", "--model.beta1=0.1", "--trainer.max_steps=9"]
    fit(*new, "--ckpt_path=last")
    for step, _, rate in Seen.batches:
        assert rate == pytest.approx(1e-5 * (1 + math.cos(math.pi * (step - 2) / 7)) / 2, rel=1e-6)
    saved = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)
    decayed, others = saved["optimizer_states"][0]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.9, 0.0)
    assert (decayed["betas"], others["betas"]) == ((0.1, 0.99), (0.1, 0.99))
    changes = {
        change["argument"]: (change["step"], change["before"], change["after"]) for change in saved["run"]["changes"]
    }
    assert changes == {
        "model.learning_rate": (6, 0.015, 1e-5),
        "model.weight_decay": (6, 0.1, 0.9),
        "model.beta1": (6, 0.9, 0.1),
        "trainer.max_steps": (6, 6, 9),
    }
    assert record()["run"]["changes"] == saved["run"]["changes"]
    assert record()["run"]["arguments"]["model.learning_rate"] == 1e-5


@pytest.mark.parametrize(
    "options", [["--data.num_workers=1"], ["--trainer.log_every_n_steps=2", "--data.eval_batch_size=2"]]
)
def test_free_arguments_change_nothing(folder, options):
    fit()
    whole = Seen.batches[:]
    weights = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    Seen.stop = 2
    fit()
    Seen.stop = None
    fit("--ckpt_path=last", *options)
    assert Seen.batches == whole[3:]
    again = torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize("option", ["--trainer.precision=64-true", "--trainer.overfit_batches=4"])
def test_a_stopped_run_ends_as_one_that_was_not(folder, option):
    """fp64 weights are not rounded on the way; within an epoch of equal batches the order goes on."""
    fit(option)
    whole = Seen.batches[:]
    Seen.stop = 2
    fit(option)
    Seen.stop = None
    fit("--ckpt_path=last", option)
    assert Seen.batches == whole[3:]
    expected, found = (load_checkpoint(f"runs/version_{i}/checkpoints/last.ckpt")["state_dict"] for i in (0, 1))
    assert {weight.dtype for weight in found.values()} == {torch.float64 if "64" in option else torch.float32}
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("interval", [2, 3, 50])
def test_a_checkpoint_of_an_epochs_end_resumes_with_as_many_epochs(folder, interval):
    saving = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: '{step}', "
    saving += "save_on_train_epoch_end: true, every_n_epochs: 1, save_top_k: -1}}"
    (folder / "few.yaml").write_text(FEW.replace("[]", f"[{saving}]"))
    epochs = ["--trainer.max_steps=-1", "--trainer.max_epochs=3", "--trainer.limit_train_batches=3"]
    epochs += [f"--trainer.val_check_interval={interval}"]
    fit(*epochs)
    whole = Seen.batches[:]
    assert whole[-1][0] == 8
    for number, step in enumerate((3, 6), 1):
        fit(*epochs, f"--ckpt_path=runs/version_0/checkpoints/step={step}.ckpt")
        assert Seen.batches == whole[step:]
        assert record(f"runs/version_{number}")["ended_by"] == "max_epochs"


# How long a run is, and what is reported at its end


@pytest.mark.parametrize(
    ("options", "validated", "ended_by"),
    [
        (["--trainer.max_steps=5"], [3, 4], "max_steps"),
        (["--trainer.val_check_interval=320"], [5], "max_steps"),
        (["--trainer.accumulate_grad_batches=3"], [3, 5], "max_steps"),
        (["--trainer.max_epochs=2", "--data.batch_size=300", "--trainer.max_steps=640"], [3], "max_epochs"),
        (
            ["--trainer.max_epochs=3", "--data.batch_size=300", "--trainer.val_check_interval=1.0"],
            [1, 3, 5],
            "max_steps",
        ),
        (
            [
                "--trainer.max_epochs=2",
                "--data.batch_size=300",
                "--trainer.val_check_interval=1.0",
                "--trainer.check_val_every_n_epoch=3",
            ],
            [3],
            "max_epochs",
        ),
        (["--trainer.min_steps=2"], [3, 5], "max_steps"),
    ],
)
def test_the_end_is_validated_on_the_weights_that_are_saved(folder, options, validated, ended_by):
    fit(*options)
    assert steps_of("val/loss") == validated
    assert record()["run"]["planned_steps"] == record()["steps"] == validated[-1] + 1
    assert record()["ended_by"] == ended_by
    loss, _ = loss_of("runs/version_0/checkpoints/last.ckpt")
    assert record()["metrics"]["val/loss"]["value"][-1] == pytest.approx(loss, rel=1e-5)
    assert Path("runs/version_0/checkpoints/best.ckpt").exists()


def test_without_validation_there_is_no_best_checkpoint_and_the_end_says_so(folder, capsys):
    (folder / "few.yaml").write_text(FEW.replace("[]", "[callbacks.RunSummary]"))
    fit("--trainer.limit_val_batches=0")
    assert not Path("runs/version_0/checkpoints/best.ckpt").exists()
    said = re.sub(r" in \d\d:\d\d \([\d,]+ tokens/s\)", "", capsys.readouterr().out)
    assert "After 6 steps and 768 tokens:\n  validation       none: limit_val_batches=0\n" in said


@pytest.mark.parametrize(("given", "batches"), [("1", 1), ("2", 2), ("1.0", None)])
def test_limits_of_validation_are_numbers_of_batches_and_said(folder, capsys, given, batches):
    (folder / "few.yaml").write_text(FEW.replace("[]", "[callbacks.RunSummary]"))
    fit(f"--trainer.limit_val_batches={given}")
    loss, tokens = loss_of("runs/version_0/checkpoints/last.ckpt", batches)
    assert record()["metrics"]["val/loss"]["value"][-1] == pytest.approx(loss, rel=1e-5)
    total = loss_of("runs/version_0/checkpoints/last.ckpt")[1]
    said = capsys.readouterr().out
    part = "" if batches is None else f"the first {tokens:,} of "
    assert f"  validated on     {part}{total:,} tokens, {total - 1:,} bytes\n" in said
    assert ("xz -9" in said) == (batches is None)


def test_the_schedule_ends_with_the_last_epoch(folder):
    fit("--trainer.max_epochs=2", "--data.batch_size=300", "--trainer.max_steps=640")
    rates = [rate for *_, rate in Seen.batches]
    assert rates == pytest.approx(
        [0.0075, 0.015, 0.015, 0.0075], rel=1e-6
    )  # two steps of warm-up, half a cosine over 2


def test_a_run_bounded_by_time_alone_has_a_constant_rate_and_ends(folder, caplog):
    fit("--trainer.max_steps=-1", "--trainer.max_time=00:00:00:01")
    assert {rate for step, _, rate in Seen.batches if step >= 1} == {0.015}
    steps = record()["steps"]
    assert record()["status"] == "finished"
    assert (record()["ended_by"], record()["run"]["planned_steps"]) == ("max_time", None)
    assert steps_of("val/loss")[-1] == steps - 1
    assert "No number of steps is asked for: the learning rate stays constant after warm-up" in caplog.text
    before = files("runs")
    fit("--trainer.max_steps=-1", "--trainer.max_time=00:00:00:01", "--ckpt_path=last")
    assert files("runs") == before


@pytest.mark.parametrize("bounds", [["--trainer.max_steps=-1"], ["--trainer.max_steps=20", "--trainer.min_steps=2"]])
def test_early_stopping_ends_a_run_before_any_other_bound(folder, bounds):
    stopping = "init_args: {monitor: val/loss, patience: 1, min_delta: 9}"
    classes = f"[{{class_path: lightning.pytorch.callbacks.EarlyStopping, {stopping}}}]"
    (folder / "few.yaml").write_text(FEW.replace("[]", classes))
    fit(*bounds)
    assert (record()["ended_by"], record()["steps"]) == ("EarlyStopping", 8)
    assert steps_of("val/loss") == [3, 7]


def test_every_step_is_whole(folder):
    """More batches a step than there are in the text: the stream goes on."""
    fit("--data.batch_size=300", "--trainer.accumulate_grad_batches=4", "--trainer.max_steps=3")
    sizes: dict[int, int] = {}
    for step, samples, _ in Seen.batches:
        sizes[step] = sizes.get(step, 0) + len(samples)
    assert sizes == {0: 1200, 1: 1200, 2: 1200}
    assert record()["run"]["samples"] == 3600
    assert record()["run"]["tokens"] == 3600 * 32


def by_hand(data: TokenData, plan: list[list[Any]], rate: float) -> tuple[list[float], LanguageModule]:
    """Losses and weights of steps on the mean over all tokens of each step's batches, by AdamW and half a cosine."""
    torch.manual_seed(0)
    module = LanguageModule(
        partial(BSBRAttention, chunk_size=8), data.vocab_size, hidden_dim=16, num_layers=1, num_heads=2
    )
    matrices = [part.weight for part in module.modules() if isinstance(part, torch.nn.Linear)]
    others = [p for p in module.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    samples, losses = data.samples("train"), []
    for step, batches in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / len(plan))) / 2
        nats, count = torch.zeros(()), 0
        for batch in map(samples.__getitem__, batches):
            asked = batch["targets"] != -100
            logits = module.model(batch["input_ids"])[asked]
            nats = nats + F.cross_entropy(logits, batch["targets"][asked], reduction="sum")
            count += int(asked.sum())
        optimizer.zero_grad()
        (nats / count).backward()
        optimizer.step()
        losses.append(float(nats.detach() / count))
    return losses, module


UNEQUAL = "{class_path: bsbr_pl.data.MQARData, init_args: {vocab_size: 64, train_segments: [[32,2,40],[32,6,40]], "
UNEQUAL += "test_segments: [[32,2,8]], batch_size: 8}}"


@pytest.mark.parametrize("task", ["the last step of an epoch is short", "batches ask unequally often"])
def test_an_accumulated_step_is_the_mean_over_its_tokens(folder, task):
    if task.startswith("batches"):
        data: TokenData = MQARData(64, [(32, 2, 40), (32, 6, 40)], [(32, 2, 8)], batch_size=8)
        (folder / "few.yaml").write_text(FEW + f"data: {UNEQUAL}\n")
        batches, own = data.samples("train").train_batches(8, 0), ["--data.batch_size=8"]
        counts = [int((data.samples("train")[ids]["targets"] != -100).sum()) for ids in batches]
        assert len({tuple(counts[i : i + 2]) for i in range(0, 10, 2)}) > 2
    else:
        data = TextData("text.txt", "bytes", context_length=32, batch_size=120, cache_dir="cache")
        batches, own = data.samples("train").train_batches(120, 0), [*TEXT_OPTIONS, "--data.batch_size=120"]
        assert len(batches) == 5
    plan = [list(batches[i : i + 2]) for i in range(0, len(batches), 2)]
    losses, module = by_hand(data, plan, 1e-2)
    model = [f"--model.{key}={value}" for key, value in (OPTIONS["model"] | {"warmup_steps": 0}).items()]
    trainer = ["--trainer.max_epochs=1", "--trainer.accumulate_grad_batches=2", "--trainer.gradient_clip_val=0"]
    config = [f"--config={ROOT / 'configs/bsbr.yaml'}", "--config=few.yaml"]
    more = ["--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu", "--model.learning_rate=1e-2"]
    train.main(["fit", *config, *own, *model, *trainer, *more])
    assert record()["metrics"]["train/loss"]["value"] == pytest.approx(losses, rel=1e-5)
    weights = torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=2e-4, atol=2e-5)


def test_options_that_would_change_the_size_of_a_step_are_refused(folder):
    accumulate = "--trainer.accumulate_grad_batches=2"
    for option, words in {
        "--trainer.limit_train_batches=3": "limit_train_batches=3 must be a multiple of accumulate_grad_batches=2",
        "--trainer.overfit_batches=3": "overfit_batches=3 must be a multiple of accumulate_grad_batches=2",
        "--trainer.val_check_interval=0.5": "val_check_interval=0.5 is a share of an epoch, but this run has no epochs",
        "--trainer.min_epochs=1": "min_epochs=1, and this run has no epochs",
        "--trainer.min_steps=1000": "min_steps=1000 has no effect beside max_steps=",
        "--trainer.max_epochs=0": "max_epochs=0 trains nothing",
        "--trainer.max_time=00:00:00:00": "max_time=00:00:00:00 trains nothing",
        "--trainer.max_time=soon": "max_time='soon' must be DD:HH:MM:SS",
        "--trainer.limit_train_batches=0": "limit_train_batches=0 trains nothing",
        "--trainer.callbacks+=GradientAccumulationScheduler": "GradientAccumulationScheduler changes the size",
        "--trainer.callbacks+=StochasticWeightAveraging": "StochasticWeightAveraging changes the weights after",
        "--trainer.callbacks+=ModelPruning": "ModelPruning changes the weights after the last validation",
        "--trainer.callbacks+=BackboneFinetuning": "BackboneFinetuning trains only some of the parameters",
        "--trainer.callbacks+=LearningRateFinder": "LearningRateFinder changes the learning rate: set learning_rate",
        "--trainer.callbacks+=BatchSizeFinder": "BatchSizeFinder changes the batch size: set batch_size",
    }.items():
        needed = {
            "Pruning": ["pruning_fn=l1_unstructured"],
            "Gradient": ["scheduling={0: 1, 2: 4}"],
            "Stochastic": ["swa_lrs=0.1", "device=null"],
        }
        values = next((values for key, values in needed.items() if key in option), [])
        more = [f"--trainer.callbacks.{value}" for value in values]
        with pytest.raises(ValueError, match=f"^{words}"):
            fit(option, *more, *([] if more else [accumulate]))
    assert not Path("runs").exists()


# Loggers and callbacks of the user's choice


CSV, TENSORBOARD = "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"
LOGGERS = {
    "tensorboard": "--trainer.logger=TensorBoardLogger",
    "csv": "--trainer.logger=CSVLogger",
    "none": "--trainer.logger=false",
    "two": f"--trainer.logger=[{{class_path: {TENSORBOARD}, init_args: {{save_dir: runs, name: null}}}},"
    f" {{class_path: {CSV}, init_args: {{save_dir: elsewhere}}}}]",
    "wandb": "--trainer.logger={class_path: lightning.pytorch.loggers.WandbLogger, init_args: {offline: true}}",
}


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_run_is_one_folder_whatever_logs_it(folder, logger, monkeypatch):
    if logger == "wandb":
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_SILENT", "true")
    option = LOGGERS[logger]
    Seen.stop = 3
    fit(option)  # stopped in step 3, after which a validation comes
    Seen.stop = None
    fit(option, "--seed_everything=1", "--trainer.max_steps=2")
    fit(option, "--ckpt_path=last")
    runs = sorted(path.parent for path in Path().rglob("record.json"))
    root = runs[0].parent
    assert [run.relative_to(root).as_posix() for run in runs] == ["version_0", "version_1"]
    for run, steps in zip(runs, (6, 2), strict=True):
        assert sorted(path.name for path in run.glob("checkpoints/*")) == ["best.ckpt", "last.ckpt"]
        assert (run / "config.yaml").exists()
        assert record(str(run))["steps"] == steps
        assert record(str(run))["metrics"]["train/loss"]["step"] == list(range(steps))
    left = {path.parts[0] for path in Path().rglob("*") if path.is_file()}
    assert left <= {root.parts[0], "cache", "few.yaml", "text.txt"}
    expected = record(str(runs[0]))["metrics"]["train/loss"]["value"]
    if logger in ("csv", "two"):
        with (runs[0] / "metrics.csv").open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
        assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 5]
        assert [float(row["train/loss"]) for row in rows] == pytest.approx(expected)
    if logger in ("tensorboard", "two"):
        events = EventAccumulator(str(runs[0]), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")
        assert sorted((event.step, event.value) for event in events) == [
            (step, pytest.approx(value)) for step, value in enumerate(expected)
        ]
    if logger == "wandb":
        first, second = sorted((runs[0] / "wandb").glob("offline-run-*"))
        assert first.name.split("-")[-1] == second.name.split("-")[-1]  # one run for its server


def test_a_list_of_callbacks_of_ones_own_keeps_what_every_run_has(folder):
    (folder / "own.yaml").write_text("trainer: {callbacks: [{class_path: callbacks.StepTimer}]}\n")
    (folder / "more.yaml").write_text("trainer: {callbacks+: [{class_path: callbacks.PeakMemory}]}\n")
    names = [type(callback).__name__ for callback in fit("--config=own.yaml", "--config=more.yaml").trainer.callbacks]
    assert names[:2] == ["StepTimer", "PeakMemory"]
    required = ["RunRecorder", "FiniteLoss", "FailTogether", "Seen", "SaveConfig", "ModelCheckpoint", "LastCheckpoint"]
    assert names[2:] == required
    without = fit("--without=[FiniteLoss, LastCheckpoint]").trainer.callbacks
    assert {*required, "FiniteLoss"} - {type(callback).__name__ for callback in without} == {
        "FiniteLoss",
        "LastCheckpoint",
    }
    with pytest.raises(ValueError, match=r"without=\['StepTimer'\]: only RunRecorder, .* can be left out by it"):
        fit("--without=[StepTimer]")


def test_nothing_is_remarked_at_a_checkpoint(folder, caplog):
    fit()
    assert "weights_only" not in caplog.text


# The table in docs/howto/resume.md


def test_the_table_of_what_may_change_is_that_of_the_code():
    rows = (ROOT / "docs/howto/resume.md").read_text().split("| kind | arguments |")[1].split("\n\n")[0]
    named = {name: set(re.findall(r"`([\w.]+)`", row)) for name, row in re.findall(r"^\| (\w+) \|(.*)\|", rows, re.M)}
    for argument in named["free"] - {"trainer"}:
        assert kind(argument) == "free", argument
    for argument in named["applied"] - {"record.json", "run.changes"}:
        assert kind(argument) == "applied", argument
    known = [f"model.{name}" for name in inspect.signature(LanguageModule).parameters]
    for cls in DATA_SETS.values():
        known += [f"data.{name}" for name in inspect.signature(cls).parameters]
    for argument in [*known, "seed"]:  # all that the table does not name is fixed
        found = next((key for key in ("free", "applied") if argument in named[key]), "fixed")
        assert kind(argument) == found, argument
    of_trainer = {f"trainer.{name}" for name in inspect.signature(Trainer).parameters}
    for argument in of_trainer - named["applied"]:
        assert kind(argument) == ("fixed" if argument in named["fixed"] else "free"), argument

"""The protocol of the study: sweeps go beyond their edges; rows say what was learned and how sure differences are."""

import itertools
import math
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import InductionData, MQARData, NeedleData, TextData
from bsbr_pl.evals.accuracy import recall_accuracy
from bsbr_pl.model import LanguageModel
from bsbr_pl.report.study import differences, frame, runs, summary
from bsbr_pl.values import paired_difference

ROOT = Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch):
    """The modules of study/, which find each other as scripts do."""
    monkeypatch.syspath_prepend(ROOT / "study")
    import reached
    import rows
    import run

    return {"rows": rows, "reached": reached, "run": run}


def row(model: str, seed: int, rate: float, accuracy: float, loss: float, phase: str = "final", **more) -> dict:
    """A row of kind `training` of a recall task."""
    study = {"task": "toy", "model": model, "phase": phase, "rate": rate} | more.pop("study", {})
    about = {"study": study, "seed": seed, "run": {"planned_steps": 8}, "parameters": 1000, "architecture": model}
    metrics = {"val/loss": {"step": [8], "value": [loss]}, "val/accuracy_T8": {"step": [8], "value": [accuracy]}}
    identity = {"kind": "training", "checkpoint": f"{model}{seed}{rate}{phase}"}
    return {"schema": 3, "identity": identity, "about": about, "values": {"metrics": metrics, **more}}


@pytest.mark.parametrize(
    ("best_at", "start", "most", "expected"),
    [
        (0.01, [0.005, 0.01, 0.02], 8, [0.005, 0.01, 0.02]),  # inside from the start
        (0.08, [0.005, 0.01, 0.02], 8, [0.005, 0.01, 0.02, 0.04, 0.08, 0.16]),
        (0.00125, [0.005, 0.01], 8, [0.000625, 0.00125, 0.0025, 0.005, 0.01]),
        (1.0, [0.005, 0.01], 4, [0.005, 0.01, 0.02, 0.04]),  # as far as it may
    ],
)
def test_a_sweep_goes_on_until_its_best_is_inside(study, tmp_path, monkeypatch, best_at, start, most, expected):
    """`Study.sweep` with a training whose loss is known: the distance from a rate, in octaves."""
    trained = []

    def train(self, wanted, arguments, ended):
        for run in wanted:
            trained.append(run)
            ended(run)
        return {}

    def write(wanted):
        known = study["rows"].runs_in(kept.rows)
        for run in set(wanted) - set(known):
            found = row("m", run.seed, run.rate, 0.5, abs(math.log2(run.rate / best_at)), "sweep")
            kept.add(found["identity"], found["values"], found["about"])
        return {}

    monkeypatch.setattr(study["run"].Study, "train", train)
    grid = study["run"].Grid(start, [None], 8, most)
    kept = study["rows"].results(tmp_path, "toy")
    best, tried, missing = study["run"].Study(tmp_path, []).sweep("toy", grid, {"m": {}}, kept, write)
    assert (sorted(tried["m"]), missing) == (expected, {})
    assert best["m"].rate == min(expected, key=lambda rate: abs(math.log2(rate / best_at)))
    assert sorted(run.rate for run in trained) == expected, "each once"


def test_the_best_run_has_the_least_loss_of_the_most_accurate(study):
    rows = study["rows"]
    found = rows.runs_in(
        [row("a", 0, 0.1, 0.9, 3.0, "sweep"), row("a", 0, 0.2, 0.9, 2.0, "sweep"), row("a", 0, 0.4, 0.3, 1.0, "sweep")]
    )
    best = rows.best_runs(found, found)
    assert {model: run.rate for model, run in best.items()} == {"a": 0.2}
    plateau = rows.runs_in([row("b", 0, 0.1, 0.28, 2.6, "sweep"), row("b", 0, 0.4, 0.263, 2.0, "sweep")])
    assert rows.best_runs(plateau, plateau)["b"].rate == 0.4, "within noise of each other"
    rates = {0.1: 0.985, 0.2: 1.0, 0.4: 1.0, 0.8: 0.99, 1.6: 0.3}
    solved = rows.runs_in([row("c", 0, rate, accuracy, 1 / rate, "sweep") for rate, accuracy in rates.items()])
    assert rows.best_runs(solved, solved)["c"].rate == 0.4, "the middle of those that solve it"
    absent = rows.Run("toy", "a", 0.8, 0, 8, "sweep")
    assert rows.best_runs([*found, absent], found) == {}, "a run is missing"
    decay = row("a", 0, 0.1, 0.95, 1.0, "sweep", study={"weight_decay": 0.1})
    (run,) = rows.runs_in([decay])
    assert run.folder(Path("o")) == Path("o/toy/sweep/a/rate0.1_decay0.1_steps8_seed0")


def test_what_has_not_learned_is_within_noise_of_the_plateau(study):
    has_learned = study["reached"].has_learned
    error = math.sqrt(0.25 * 0.75 / 300)
    assert not has_learned(0.25 + 2.9 * error, 0.25, 300)
    assert has_learned(0.25 + 3.1 * error, 0.25, 300)
    assert has_learned(1.29, 1.3, None)
    assert not has_learned(1.31, 1.3, None)


def test_plateaus(tmp_path):
    segments = [(64, 4, 100), (64, 8, 100)]
    assert MQARData(test_segments=segments).plateau() == (1 / 4 + 1 / 8) / 2
    induction = InductionData(16, 32, [32], 20, 500)
    assert induction.plateau() == induction.chance() == 1 / 15
    text = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(200))
    (tmp_path / "text.py").write_text(text)
    source = {"source": str(tmp_path / "text.py"), "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    needle = NeedleData(**source, context_length=32, num_test=20)
    assert needle.plateau() == (needle.chance() + 1 / 4) / 2


def test_the_plateau_of_a_text_is_a_bigram_model(tmp_path):
    """Again, pair by pair."""
    (tmp_path / "text.py").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(200)))
    data = TextData(str(tmp_path / "text.py"), "bytes", cache_dir=str(tmp_path / "cache"), context_length=32)
    train, test = (data.corpus.tokens(split).tolist() for split in ("train", "test"))
    bits = 0.0
    for a, b in itertools.pairwise(test):
        followers = [after for before, after in itertools.pairwise(train) if before == a]
        single = (train.count(b) + 1) / (len(train) + data.vocab_size)
        different = len(set(followers)) or 1
        bits -= math.log2((followers.count(b) + different * single) / (len(followers) + different))
    assert data.plateau() == pytest.approx(bits / data.sizes["test"]["bytes"], rel=1e-9)


def test_needles_are_learned(tmp_path):
    """DeltaNet finds them after 200 steps of 32 samples, at another length too, alone and among others."""
    letters = np.random.default_rng(0).choice(list("abcdefgh \n"), 20_000)
    (tmp_path / "text.txt").write_text("".join(letters))
    few = {"num_train": 6400, "num_test": 40, "batch_size": 32, "depths": [0, 0.5, 1], "test_lengths": [64, 128]}
    source = {"source": str(tmp_path / "text.txt"), "tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")}
    data = NeedleData(**source, **few, context_length=64)
    torch.manual_seed(0)
    model = LanguageModel(ARCHITECTURES["delta_net"], data.vocab_size, 64, 2, 1, ff_dim=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99))
    for step, batch in enumerate(data.train_dataloader()):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20, (200 - step) / 100)
        loss = torch.nn.functional.cross_entropy(model(batch["input_ids"]).mT, batch["targets"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    found = {one["slice"]: one["accuracy"] for one in recall_accuracy(model.eval(), data)["slices"]}
    assert len(found) == 12
    assert min(found.values()) > 0.8, found
    assert fmean(found.values()) > 0.95, found


@pytest.mark.parametrize(("pairs", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (11, 2.228)])
def test_a_paired_difference_is_students(pairs, t):
    """Critical values of t for p = .05, from the printed tables; differences of mean t standard errors have this p."""
    spread = np.random.default_rng(pairs).normal(size=pairs)
    spread = (spread - spread.mean()) / spread.std(ddof=1) * math.sqrt(pairs)
    theirs = dict(enumerate(range(pairs)))
    found = paired_difference({i: theirs[i] + t + spread[i] for i in theirs}, theirs | {"other": 0.0})
    assert found["pairs"] == pairs
    assert found["mean"] == pytest.approx(t)
    assert found["p"] == pytest.approx(0.05, abs=1e-4)
    assert found["interval"] == pytest.approx([0, 2 * t], abs=2e-3)


def test_too_few_pairs_say_nothing():
    assert paired_difference({1: 2.0}, {1: 1.5}) == {"pairs": 1, "mean": 0.5, "interval": None, "p": None}
    assert paired_difference({1: 2.0}, {2: 1.5})["mean"] is None
    assert paired_difference({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}) == {"pairs": 2, "mean": 1, "interval": [1, 1], "p": 0}


def test_the_table_shows_test_results_costs_and_flags():
    def final(model: str, seed: int, test: float, learned: bool, rate: float) -> dict:
        result = {"val": 0.9, "test": test, "plateau": 0.25, "learned": learned, "flops_per_token": 1234.0}
        result |= {"state_bytes": 4096, "tokens_per_second": 5e4}
        return row(model, seed, rate, 0.9, 1.0, study={"rates": [0.1, 0.2, 0.4]}, result=result)

    good, bad = {1: 0.91, 2: 0.93, 3: 0.92}, {1: 0.25, 2: 0.26, 3: 0.51}
    rows = [final("good", seed, value, True, 0.2) for seed, value in good.items()]
    rows += [final("bad", seed, value, value > 0.5, 0.4) for seed, value in bad.items()]
    first, second = frame(runs(rows)).to_dict("records")
    shown = ("model", "accuracy", "least to largest", "validation", "parameters", "FLOPs/token", "state bytes", "note")
    assert [first[name] for name in shown] == [
        *("good", "0.920", "0.910 to 0.930", "0.900", "1,000", "1,234", "4,096", "")
    ]
    assert second["note"] == "not learned yet: 2 of 3 seeds; rate at the edge of its sweep"
    (compared,) = differences(rows).to_dict("records")
    expected = paired_difference(bad, good)
    assert compared["difference to good"] == f"{fmean(bad.values()) - fmean(good.values()):+.4f}"
    assert compared["p"] == f"{expected['p']:.3g}"
    assert differences(rows, "bad").columns[2] == "difference to bad"
    assert "Paired by seed" in summary(rows)


def test_weight_decays_are_rows_and_not_seeds():
    """Neither is a second run of a seed."""
    result = {"val": 0.9, "test": 0.9}
    rows = [row("m", seed, 0.1, 0.9, 1.0, result=result) for seed in (1, 2)]
    decayed = row("m", 1, 0.1, 0.9, 1.0, study={"weight_decay": 0.5}, result=result | {"test": 0.8})
    again = row("m", 1, 0.1, 0.9, 1.0, study={"weight_decay": 0.5}, result=result | {"test": 0.6})
    decayed["identity"]["checkpoint"], again["identity"]["checkpoint"] = "decayed", "again"
    shown = frame(runs([*rows, decayed, again]))[["seeds", "accuracy", "weight decay"]]
    assert shown.to_numpy().tolist() == [["2", "0.900", "-"], ["1", "0.700", "0.5"]]


def test_only_runs_of_equal_steps_are_compared():
    """The best model has 8 steps, so of `both` the worse run of 8 steps counts, and `short` is left out."""
    best, both, better, short = (
        row(*one, 1.0)
        for one in (("best", 1, 0.1, 0.9), ("both", 1, 0.1, 0.6), ("both", 1, 0.2, 0.8), ("short", 1, 0.1, 0.7))
    )
    better["about"]["run"] = short["about"]["run"] = {"planned_steps": 4}
    (compared,) = differences([best, both, better, short]).to_dict("records")
    assert (compared["model"], compared["difference to best"]) == ("both", "-0.3000")
    assert differences([best, short]).empty


@pytest.mark.parametrize("rates", [[0.1], [0.1, 0.2]])
def test_a_folder_with_another_run_gives_no_row(study, tmp_path, monkeypatch, rates):
    """Whatever the folder holds: a run that the launcher reports as missing is not written."""
    written = []
    monkeypatch.setattr(study["run"], "keep", lambda runs, **more: written.extend(runs) or {})
    launched = study["run"].Study(tmp_path, [], launch=lambda trainings, _: {one.name: "another" for one in trainings})
    missing = launched.run("mqar", {"linear": {}}, [1], study["run"].Grid(rates, [None], 8, 2), 8)
    assert "another" in missing.values()
    assert written == []

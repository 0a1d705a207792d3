"""The protocol of the study: sweeps go beyond their edges; rows say what was learned and how sure differences are."""

import itertools
import math
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import InductionData, MQARData, NeedleData, SelectiveCopyData, TextData
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


def most_frequent(data):
    """Question by question: the answer that occurred most often so far, the mean over those that did."""
    batches = [(batch["input_ids"].tolist(), batch["targets"].tolist()) for batch in data.test_dataloader()]
    answers = {y for _, targets in batches for row in targets for y in row if y >= 0}
    shares = []
    for inputs, targets in batches:
        for xs, ys in zip(inputs, targets, strict=True):
            right = []
            for t, y in enumerate(ys):
                if y >= 0:
                    seen = {one: xs[: t + 1].count(one) for one in answers}
                    best = [one for one in answers if seen[one] == max(seen.values())]
                    right.append((y in best) / len(best))
            shares.append(sum(right) / len(right))
    return sum(shares) / len(shares)


def test_plateaus(tmp_path):
    segments = [(64, 4, 100), (64, 8, 100)]
    assert MQARData(test_segments=segments).plateau() == (1 / 4 + 1 / 8) / 2
    induction = InductionData(16, 32, [32], 20, 500)
    assert induction.chance() == 1 / 15
    assert induction.plateau() == pytest.approx(most_frequent(induction))
    copying = SelectiveCopyData(16, 40, 4, 20, 200)
    assert copying.plateau() == pytest.approx(most_frequent(copying))
    assert copying.plateau() > 1.5 * copying.chance(), "guessing what the context has beats guessing"
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


def counted(model: str, seed: int, on_test: float | None, val: float = 0.5, rate: float = 0.1, **about) -> dict:
    """A run of a recall task with a result; no test result where it is None."""
    result = {"val": val} | ({} if on_test is None else {"test": on_test})
    made = row(model, seed, rate, val, 1.0, result=result, study=about.pop("study", {}))
    made["about"] |= about
    return made


def certificate(of: dict, passed: bool, version: int) -> dict:
    identity = {"kind": "certificate", "checkpoint": of["identity"]["checkpoint"], "version": version}
    return {"schema": 3, "identity": identity, "about": of["about"], "values": {"passed": passed}}


def test_a_model_that_is_not_causal_is_not_ranked():
    """Whatever it reached; only the newest version of a certificate decides."""
    good, leaking = counted("good", 1, 0.6), counted("leaking", 1, None, val=1.0)
    again = [certificate(leaking, False, 5), certificate(good, True, 5), certificate(good, False, 4)]
    for rows in ([good, leaking, *again], [*again[::-1], leaking, good]):
        first, second = frame(runs(rows)).to_dict("records")
        assert (first["model"], first["accuracy"], first["note"]) == ("good", "0.600", "")
        assert (second["model"], second["accuracy"]) == ("leaking", "-")
        assert second["note"] == "certificate failed: 1 of 1 seeds"
        assert differences(rows).empty
    old = [row("old", 1, 0.1, 0.9, 1.0), row("leaking", 1, 0.1, 1.0, 1.0)]
    shown = frame(runs([*old, certificate(old[1], False, 5)])).set_index("model")["accuracy"]
    assert shown.to_dict() == {"old": "0.900", "leaking": "-"}, "rows without results have certificates, too"


def test_results_on_the_two_splits_are_not_averaged():
    """A run without a test result, and a row of an earlier version."""
    rows = [counted("m", 1, 0.5, val=0.9), counted("m", 2, None, val=0.9), row("m", 3, 0.1, 0.9, 1.0)]
    (shown,) = frame(runs(rows)).to_dict("records")
    assert (shown["accuracy"], shown["least to largest"], shown["seeds"]) == ("0.500", "0.500 to 0.500", "1")
    assert shown["note"] == "no test result: 2 of 3 seeds"
    (pair,) = differences([*rows, counted("n", 1, 0.4), counted("n", 2, 0.4)]).to_dict("records")
    assert (pair["pairs"], pair["difference to m"]) == ("1", "-0.1000")


def test_seeds_that_diverged_are_named():
    rows = [counted("m", 1, 0.5), counted("m", 2, 0.5, rate=0.2)]
    for one in (counted("m", 2, None), counted("n", 1, None)):
        one["values"] = {"metrics": {}}
        one["about"]["run"] |= {"status": "diverged: the loss is nan at step 1"}
        rows.append(one)
    shown = {(one["model"], one["learning rate"]): one for one in frame(runs(rows)).to_dict("records")}
    assert shown["m", "0.1"]["note"] == "diverged: 1 of 2 seeds"
    assert (shown["m", "0.1"]["seeds"], shown["m", "0.2"]["note"]) == ("1", "validation chooses rate 0.1")
    assert (shown["n", "0.1"]["accuracy"], shown["n", "0.1"]["note"]) == ("-", "diverged: 1 of 1 seeds")


def test_two_runs_of_a_seed_are_one_seed():
    """They count as their mean, in the table and in the differences, and are named."""
    rows = [counted("m", 1, 0.8), counted("m", 1, 0.6), counted("m", 2, 0.4), counted("n", 1, 0.1)]
    rows[1]["identity"]["checkpoint"] = "again"
    shown = frame(runs(rows)).set_index("model").loc["m"]
    assert (shown["accuracy"], shown["seeds"], shown["note"]) == ("0.550", "2", "seed 1 has 2 runs")
    (pair,) = differences(rows).to_dict("records")
    assert pair["difference to m"] == "-0.6000"


def test_only_runs_of_one_setting_are_seeds():
    """A changed base.yaml, default or text; an argument that older rows do not have is None."""
    config = {"model.dropout": 0.0, "data.batch_size": 4, "trainer.weight_averaging": None}
    older = {name: value for name, value in config.items() if name != "trainer.weight_averaging"}
    rows = [counted("m", 1, 0.5, config=config), counted("m", 2, 0.6, config=older)]
    assert frame(runs(rows)).to_dict("list")["seeds"] == ["2"]
    for name, value in (("model.dropout", 0.1), ("data.batch_size", 8)):
        other = counted("m", 3, 0.9, config=config | {name: value})
        best, mean = frame(runs([*rows, other])).to_dict("records")
        assert (best["accuracy"], best["note"]) == ("0.900", f"{name}={value}")
        assert (mean["accuracy"], mean["note"]) == ("0.550", f"{name}={config[name]}")
        compared = differences([*rows, other, counted("n", 1, 0.1, config=config)])
        assert compared.empty == (name == "data.batch_size"), "models may differ in their own arguments alone"
    bits = {"val/bits_per_byte": {"step": [8], "value": [1.0]}}
    for number, one in enumerate(rows):
        one["values"]["metrics"] = bits
        one["about"]["data"] = {"class": "TextData", "fingerprint": f"text {number}"}
    assert frame(runs(rows)).to_dict("list")["note"] == ["text=text 0", "text=text 1"]


def test_the_validation_split_chooses_among_rates():
    """Of runs at an earlier best rate, or at single rates, and never the test split."""
    rows = [counted("m", 1, 0.7, val=0.6, rate=0.1), counted("m", 1, 0.9, val=0.5, rate=0.2), counted("n", 1, 0.4)]
    shown = frame(runs(rows)).set_index(["model", "learning rate"])["note"].to_dict()
    assert shown == {("m", "0.1"): "", ("m", "0.2"): "validation chooses rate 0.1", ("n", "0.1"): ""}
    (pair,) = differences(rows).to_dict("records")
    assert pair["difference to m"] == "-0.3000"


def test_a_seed_that_chose_the_rate_is_named():
    rates = {"study": {"rates": [0.05, 0.1, 0.2]}}
    rows = [counted("m", 0, 0.5, **rates), counted("m", 1, 0.5, **rates), counted("n", 0, 0.4)]
    assert frame(runs(rows)).to_dict("list")["note"] == ["seed 0 has chosen the rate", ""]


@pytest.mark.parametrize("rates", [[0.1], [0.1, 0.2]])
def test_a_folder_with_another_run_gives_no_row(study, tmp_path, monkeypatch, rates):
    """Whatever the folder holds: a run that the launcher reports as missing is not written."""
    written = []
    monkeypatch.setattr(study["run"], "keep", lambda runs, **more: written.extend(runs) or {})
    launched = study["run"].Study(tmp_path, [], launch=lambda trainings, _: {one.name: "another" for one in trainings})
    missing = launched.run("mqar", {"linear": {}}, [1], study["run"].Grid(rates, [None], 8, 2), 8)
    assert "another" in missing.values()
    assert written == []

"""Comparisons: figures of certified models, accuracy of trained weights only, an analysis that finds the truth."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
from lightning import Trainer
from torch import nn

from bsbr_pl.attention import ARCHITECTURES, StandardAttention
from bsbr_pl.data import InductionData, MQARData
from bsbr_pl.evals import analyze_results, compare_models, comparison, evaluation, scaling_analysis, training
from bsbr_pl.evals.accuracy import recall_accuracy, text_accuracy
from bsbr_pl.evals.training import default_task
from bsbr_pl.models import model_class
from bsbr_pl.module import LanguageModule
from bsbr_pl.spec import AttentionSpec

SMALL = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "device": "cpu", "rounds": 2}
OPTIONS = {"BSBR": {"chunk_size": 4}, "Linear": {"chunk_size": 4}}
OPTIONS_OF_BSBR = {"BSBR": {"chunk_size": 2}}
TASK = {"vocab_size": 8, "context_length": 16, "test_lengths": (16,), "num_train": 64, "num_test": 40, "batch_size": 8}


class Leaky(StandardAttention):
    """Looks at everything, whenever it is trained."""

    def prefill(self, x, state=None):
        q, k, v, _ = self.project(x)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.emit(mixed, x), super().prefill(x, state)[1]


@pytest.fixture
def trainings(monkeypatch):
    """The trainings that take place."""
    found, fit = [], Trainer.fit

    def counted(self, module, *args, **kwargs):
        found.append(module)
        return fit(self, module, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", counted)
    return found


def made_up(**cost):
    """Results of two rounds whose times are `cost[name](T)`, give or take a hundredth."""
    lengths = [64, 128, 256, 512]
    results = {
        "seq_lengths": lengths,
        "models": list(cost),
        "metrics": ["inference_time"],
        "units": {"inference_time": "s"},
        "disqualified": {},
    }
    for name, of in cost.items():
        samples = [[of(t) * 0.99, of(t), of(t) * 1.01] for t in lengths]
        results[name] = {
            "inference_time": [float(np.median(s)) for s in samples],
            "samples": {"inference_time": samples},
            "intervals": {"inference_time": [[s[0], s[-1]] for s in samples]},
        }
    return results


class Scales(nn.Module):
    by = 1.0

    def forward(self, x):
        return x * self.by


def scaled(times: float) -> type[nn.Module]:
    """Classes of one source, whose closure decides what they compute."""

    class Scaled(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.weight, self.scales = nn.Parameter(torch.ones(dim)), Scales()

        def forward(self, x):
            return self.scales(x * self.weight * times)

    return Scaled


def test_weights_are_kept_for_one_behaviour(monkeypatch):
    """Also of a class that has no code and no argument of its own that differ: its closure, and parts of its parts."""

    def key(times: float) -> str:
        arguments = {"attention": AttentionSpec.of(scaled(times)).plain(), "vocab_size": 8, "hidden_dim": 4}
        arguments |= {"num_layers": 1, "num_heads": 1, "learning_rate": 0.1}
        return training._key(arguments, default_task(), 3, 0, torch.device("cpu"))

    first = key(1.0)
    assert key(1.0) == first != key(2.0)
    monkeypatch.setattr(Scales, "by", 2.0)
    assert key(1.0) != first


# -- analysis


def test_exponents_are_the_powers():
    analysis = analyze_results(made_up(Standard=lambda t: 1e-6 * t**2, Linear=lambda t: 1e-4 * t))
    for name, power in (("Standard", 2), ("Linear", 1)):
        found = analysis.exponents["inference_time"][name]
        assert found["exponent"] == pytest.approx(power, abs=1e-9)
        assert power - 0.03 < found["interval"][0] < power < found["interval"][1] < power + 0.03
        assert found["lengths"] == [64, 512]
    bent = analyze_results(made_up(Standard=lambda t: max(1e-2, 1e-6 * t**2)), shortest=128)
    assert bent.exponents["inference_time"]["Standard"]["exponent"] == pytest.approx(2)


def test_crossovers_are_where_the_curves_cross():
    analysis = analyze_results(made_up(Standard=lambda t: 1e-6 * t**2, Linear=lambda t: 2e-4 * t))
    crossovers = analysis.crossovers["inference_time"]
    assert crossovers["Linear"]["Standard"]["length"] == 200
    low, high = crossovers["Linear"]["Standard"]["interval"]
    assert 190 < low < 200 < high < 210
    assert crossovers["Standard"]["Linear"]["length"] is None, "it is above at the longest"
    assert "Linear" not in crossovers["Linear"]


def test_rankings_tie_what_the_intervals_do_not_part():
    times = {"a": lambda t: 2.0 * t, "b": lambda t: 1.0 * t, "c": lambda t: 2.01 * t, "d": lambda t: 9.0 * t}
    ranking = analyze_results(made_up(**times)).rankings["inference_time"]
    assert [row["model"] for row in ranking] == ["b", "a", "c", "d"]
    assert [row["rank"] for row in ranking] == [[1, 1], [2, 3], [2, 3], [4, 4]]
    assert {row["length"] for row in ranking} == {512}


def test_more_accuracy_is_better_and_ranks_where_all_have_one():
    results = {"seq_lengths": [8, 16], "models": ["a", "b"], "metrics": ["accuracy"], "units": {"accuracy": "share"}}
    results |= {"disqualified": {}, "accuracy_task": None}
    for name, first, second in (("a", 0.5, None), ("b", 0.9, 0.1)):
        results[name] = {
            "accuracy": [first, second],
            "samples": {"accuracy": [None, None]},
            "intervals": {"accuracy": [[first - 0.1, first + 0.1], second and [second, second]]},
        }
    analysis = analyze_results(results)
    assert [(row["model"], row["rank"], row["length"]) for row in analysis.rankings["accuracy"]] == [
        ("b", [1, 1], 8),
        ("a", [2, 2], 8),
    ]
    assert "accuracy" not in analysis.exponents
    assert str(analysis).splitlines()[1].split() == ["a", "0.5", "-", "2"]


def test_the_table_is_aligned_and_says_it_all():
    results = made_up(Standard=lambda t: 1e-6 * t**2, SlidingWindow=lambda t: 2e-4 * t)
    results["disqualified"] = {"Old": ["suffix_0"]}
    analysis = analyze_results(results)
    table, note = str(analysis).split("\n\n")
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[0].split()) == "inference_time (s) 64 128 256 512 exponent below Standard from rank at 512"
    assert lines[1].startswith("Standard ")
    assert lines[1].endswith(" 2")
    assert "1.00 [" in lines[2]
    assert " 200 [" in lines[2]
    assert note == "Old is disqualified: it fails suffix_0"
    assert analysis["rankings"] is analysis.rankings


# -- costs


def test_results_are_lists_along_the_lengths_in_the_order_asked_for():
    models = ("Linear", "BSBR", "sliding_window", "Standard")
    metrics = [*comparison.COSTS]
    results = compare_models((8, 13), models, metrics, model_options=OPTIONS, **SMALL)
    assert results["seq_lengths"] == [8, 13]
    assert tuple(results["models"]) == models
    assert [key for key in results if key in models] == list(models)
    assert results["units"] == {metric: cost.unit for metric, cost in comparison.COSTS.items()}
    for name in models:
        for metric in metrics:
            values, samples = results[name][metric], results[name]["samples"][metric]
            assert len(values) == 2
            assert all(value > 0 for value in values)
            assert [len(s) for s in samples] == [2 if metric.endswith("_time") else 1] * 2
            assert values == [float(np.median(s)) for s in samples]
            for value, (low, high) in zip(values, results[name]["intervals"][metric], strict=True):
                assert low <= value <= high
    model = model_class("BSBR")(16, 16, 1, 2, chunk_size=4)
    assert results["settings"]["models"]["BSBR"]["attention"]["init_args"] == {"chunk_size": 4}
    assert results["settings"]["models"]["sliding_window"]["attention"]["init_args"] == {"window_size": 16}, "reach"
    assert results["BSBR"]["flops"] == [model.flops(t) - 2 * t * 16 * 16 for t in (8, 13)]
    assert results["BSBR"]["state_size"] == [model.state_size(t) * 4 / 1e6 for t in (8, 13)]


def test_results_go_through_json_unchanged():
    results = compare_models((8, 16), ("BSBR", "Linear"), ("inference_time", "flops"), model_options=OPTIONS, **SMALL)
    again = json.loads(json.dumps(results, allow_nan=False))
    assert again == results
    assert str(analyze_results(again)) == str(analyze_results(results))


def test_scaling_analysis_counts_seconds_gigabytes_and_operations():
    results = scaling_analysis((8, 16), ("Linear", "Standard"), model_options={"Linear": {"chunk_size": 4}}, **SMALL)
    in_mb = compare_models((8, 16), ("Standard",), ("memory_usage", "flops"), **SMALL)["Standard"]
    assert results["units"] == {"time": "s", "memory": "GB", "flops": "operations"}
    assert results["Standard"]["memory"] == pytest.approx([value / 1e3 for value in in_mb["memory_usage"]])
    assert results["Standard"]["flops"] == in_mb["flops"]
    assert all(0 < seconds < 1 for name in ("Linear", "Standard") for seconds in results[name]["time"])
    assert "time (s)" in str(analyze_results(results))


def test_all_models_are_measured_together_at_each_length(monkeypatch):
    calls, measure = [], evaluation.measure_costs

    def spy(models, length, *args):
        calls.append((list(models), length))
        return measure(models, length, *args)

    monkeypatch.setattr(evaluation, "measure_costs", spy)
    scaling_analysis((8, 16), ("Standard", "BSBR"), ("time",), **SMALL)
    assert calls == [(["Standard", "BSBR"], 8), (["Standard", "BSBR"], 16)]


def test_a_length_without_memory_for_it_has_no_figures_and_the_others_go_on(monkeypatch):
    measure = evaluation.measure_costs

    def scarce(models, length, *args):
        if length == 16:
            raise RuntimeError("out of memory")
        return measure(models, length, *args)

    monkeypatch.setattr(evaluation, "measure_costs", scarce)
    with pytest.warns(UserWarning, match="no costs at 16 tokens: out of memory"):
        results = scaling_analysis((8, 16, 32), ("Standard",), ("time", "flops"), **SMALL)
    for metric in ("time", "flops"):
        assert [value is None for value in results["Standard"][metric]] == [False, True, False]
    analysis = analyze_results(results)
    assert analysis.exponents["flops"]["Standard"]["lengths"] == [8, 32]
    assert "-" in str(analysis)


# -- who may take part


def test_a_model_that_sees_the_future_is_left_out(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "leaky", Leaky)
    with pytest.warns(UserWarning, match="leaky is excluded from the comparison: it fails suffix_0"):
        results = scaling_analysis((8,), ("leaky", "Standard"), ("flops",), **SMALL)
    assert results["models"] == ["Standard"]
    assert "leaky" not in results
    assert "suffix_1" in results["disqualified"]["leaky"]
    assert "leaky is disqualified" in str(analyze_results(results))
    with pytest.warns(UserWarning, match="leaky is excluded"), pytest.raises(ValueError, match="models: all fail"):
        scaling_analysis((8,), ("leaky",), ("flops",), **SMALL)


class Keeps(nn.Module):
    """Adds a little of its last output, which it keeps with its gradient."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map, self.last = nn.Linear(dim, dim), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, self.last = self.last, self.map(x)
        return self.last if before is None or before.shape != x.shape else self.last + 0.1 * before


class Fails(nn.Module):
    """Cannot be computed."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("it never works")


class Grows(nn.Module):
    """Its weights are not finite."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(dim, dim)
        nn.init.constant_(self.map.weight, torch.inf)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)


def test_why_a_model_is_left_out_is_said():
    models = {"keeps": Keeps, "grows": Grows, "fails": Fails, "Standard": "standard"}
    with pytest.warns(UserWarning, match="is excluded") as warned:
        results = compare_models((8,), models, ("flops",), **SMALL)
    said = [str(one.message) for one in warned]
    left_out = "is excluded from the comparison: "
    fails, grows, keeps = sorted(one for one in said if left_out in one)
    assert fails.startswith(f"fails {left_out}it cannot be certified, because ")
    assert fails.endswith("it never works")
    assert grows.startswith(f"grows {left_out}its weights are not finite, so it fails suffix_0, ")
    assert keeps.startswith(f"keeps {left_out}it fails ")
    assert "repeat" in results["disqualified"]["keeps"]
    assert not [one for one in said if one.startswith("no ")], "costs have no problem"


def test_what_is_unknown_is_named_beside_what_is_known():
    with pytest.raises(ValueError, match="no model is called 'Mamba': did you mean mamba2\\?"):
        compare_models((8,), ("BSBR", "Mamba"), **SMALL)
    with pytest.raises(ValueError, match=r"metrics: 'speed' is unknown; there are inference_time.*accuracy"):
        compare_models((8,), ("BSBR",), ("speed",), **SMALL)
    with pytest.raises(ValueError, match="metrics: 'accuracy' is unknown; there are time, memory, flops"):
        scaling_analysis((8,), ("BSBR",), ("accuracy",), **SMALL)
    with pytest.raises(TypeError, match=r"no argument 'window'; it has .*chunk_size"):
        compare_models((8,), ("BSBR",), model_options={"BSBR": {"window": 3}}, **SMALL)
    with pytest.raises(ValueError, match="model_options: 'Linear' is unknown; there are BSBR"):
        compare_models((8,), ("BSBR",), model_options={"Linear": {}}, **SMALL)
    with pytest.raises(ValueError, match="checkpoints: 'Linear' is unknown"):
        compare_models((8,), ("BSBR",), checkpoints={"Linear": "x.ckpt"}, **SMALL)


def test_arguments_out_of_range_are_named():
    for arguments, message in (
        (((8, 8), ("BSBR",)), "seq_lengths must hold at least one, and each once"),
        (((8,), ()), "models must hold at least one"),
        (((0,), ("BSBR",)), "seq_lengths must be positive integers, got 0"),
        (((8,), ("BSBR",), ()), "metrics must hold at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_models(*arguments, **SMALL)
    for function in (compare_models, scaling_analysis):
        with pytest.raises(ValueError, match="seq_lengths must be a list of lengths, got 64"):
            function(64)


def test_sizes_that_do_not_match_are_said():
    """A window of one token keeps less than DeltaNet's matrix, and the finest step of the window is one token."""
    with pytest.warns(UserWarning, match=r"state_bytes of sliding_window differs from that of the reference by [+-]\d"):
        found = compare_models((64,), ("delta_net", "sliding_window"), ("flops",), match="state_bytes", hidden_dim=16)
    (words,) = found["differences"]
    mismatch = found["matched"]["sliding_window"]["mismatch_percent"]
    assert abs(mismatch) > 5
    assert words == f"state_bytes of sliding_window differs from that of the reference by {mismatch:+.1f} %"


def test_two_classes_of_one_name_are_refused():
    def mixer(depth: int) -> type[nn.Module]:
        class Mixer(nn.Module):
            def __init__(self, dim: int) -> None:
                super().__init__()
                self.maps = nn.Sequential(*(nn.Linear(dim, dim) for _ in range(depth)))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.maps(x)

        return Mixer

    one, two = mixer(1), mixer(2)
    with pytest.raises(ValueError, match=r"^models: two classes are called .*mixer.<locals>.Mixer, so one would be"):
        scaling_analysis((8,), {"one": one, "two": two}, **SMALL)
    found = scaling_analysis((8,), {"one": one, "again": one, "Standard": "standard"}, **SMALL)
    assert found["parameters"]["one"] == found["parameters"]["again"] != found["parameters"]["Standard"]


# -- accuracy


def compare_accuracy(cache, models=("BSBR", "Standard"), lengths=(16, 32), **arguments):
    task = InductionData(**TASK)
    chosen = {"task": task, "train_steps": 3, "cache_dir": cache, **SMALL, **arguments}
    return compare_models(lengths, models, ("accuracy",), **chosen)


def test_accuracy_is_that_of_the_trained_weights_and_training_happens_once(tmp_path, trainings):
    first = compare_accuracy(tmp_path)
    assert len(trainings) == 2
    assert first["accuracy_task"]["steps"] == 3
    assert first["accuracy_task"]["chance"] == 1 / 7
    assert "InductionData(vocab_size=8, context_length=16" in first["accuracy_task"]["task"]
    assert "guessing gives 0.143" in str(analyze_results(first))
    again = compare_accuracy(tmp_path)
    assert len(trainings) == 2, "the second call trains nothing"
    for name, trained in zip(("BSBR", "Standard"), trainings, strict=True):
        assert first[name] == again[name]
        expected = [
            recall_accuracy(trained.model.eval(), InductionData(**TASK | {"test_lengths": (t,)}))["accuracy"]
            for t in (16, 32)
        ]
        assert first[name]["accuracy"] == expected
        assert first[name]["accuracy_as_trained"] == expected[0]
        assert all(
            low <= a <= high for a, (low, high) in zip(expected, first[name]["intervals"]["accuracy"], strict=True)
        )
    assert [path.suffix for path in (tmp_path / "comparison").iterdir()] == [".ckpt"] * 2


def test_another_configuration_is_another_training(tmp_path, trainings):
    changes = [{}, {"seed": 1}, {"hidden_dim": 8}, {"learning_rate": 1e-4}, {"model_options": OPTIONS_OF_BSBR}]
    for number, change in enumerate(changes):
        compare_accuracy(tmp_path, ("BSBR",), **change)
        assert len(trainings) == number + 1, change


def test_a_damaged_cache_is_trained_again(tmp_path, trainings):
    first = compare_accuracy(tmp_path, ("BSBR",))
    (file,) = (tmp_path / "comparison").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert compare_accuracy(tmp_path, ("BSBR",))["BSBR"] == first["BSBR"]
    assert len(trainings) == 2


def test_a_file_of_another_training_in_the_cache_is_not_used(tmp_path, trainings):
    first = compare_accuracy(tmp_path, ("BSBR",))
    (own,) = (tmp_path / "comparison").iterdir()
    compare_accuracy(tmp_path, ("Standard",))
    (other,) = set((tmp_path / "comparison").iterdir()) - {own}
    own.write_bytes(other.read_bytes())
    assert compare_accuracy(tmp_path, ("BSBR",))["BSBR"] == first["BSBR"]
    assert len(trainings) == 3


def test_a_training_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def broken(self, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Trainer, "save_checkpoint", broken)
    with pytest.raises(OSError, match="no space left"):
        compare_accuracy(tmp_path, ("BSBR",))
    assert list((tmp_path / "comparison").iterdir()) == []


def test_training_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compare_accuracy(tmp_path, ("BSBR",))
    assert torch.equal(torch.rand(3), expected)


def test_a_trained_model_that_leaks_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "leaky", Leaky)
    with pytest.warns(UserWarning, match="leaky is excluded from the comparison: it fails suffix_0"):
        results = compare_accuracy(tmp_path, ("leaky", "BSBR"))
    assert results["models"] == ["BSBR"]


@pytest.fixture
def mqar_checkpoint(tmp_path, make_trainer):
    data = MQARData(64, train_segments=((16, 2, 64),), test_segments=((16, 2, 30),), batch_size=8)
    trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(LanguageModule(StandardAttention, 64, hidden_dim=8, num_layers=1, num_heads=1), datamodule=data)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    return tmp_path / "mine.ckpt"


def test_a_checkpoint_is_measured_as_it_is_on_its_own_data(mqar_checkpoint, tmp_path, trainings):
    lengths = (4, 16, 32, 64)
    checkpoints = {"mine": mqar_checkpoint}
    metrics = ("accuracy", "flops")
    results = compare_models(lengths, ("mine",), metrics, checkpoints=checkpoints, cache_dir=tmp_path, **SMALL)
    assert trainings == []
    module = LanguageModule.load(mqar_checkpoint)
    data = MQARData(64, train_segments=((16, 2, 64),), test_segments=((32, 2, 30),))
    assert results["mine"]["accuracy"][2] == recall_accuracy(module.model, data)["accuracy"]
    possible = [value is not None for value in results["mine"]["accuracy"]]
    assert possible == [False, True, True, False], "4 tokens do not hold 2 pairs; 64 need more than 64 ids"
    assert results["mine"]["flops"][1] == module.model.flops(16) - 2 * 16 * 64 * 8
    assert results["accuracy_task"] is None
    json.dumps(results, allow_nan=False)


def test_a_checkpoint_of_text_is_tested_on_its_text(tmp_path, make_trainer, make_data, make_module, trainings):
    trainer, module = make_trainer(max_steps=2, limit_val_batches=0), make_module("standard")
    trainer.fit(module, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "text.ckpt")
    trainings.clear()
    chosen = {"checkpoints": {"text": tmp_path / "text.ckpt"}, **SMALL}
    with pytest.raises(ValueError, match=r"source='.*' is named by the checkpoint alone.* --trust_data"):
        compare_models((16, 64), ("text",), ("accuracy",), **chosen)
    results = compare_models((16, 64), ("text",), ("accuracy",), trust_data=True, **chosen)
    assert trainings == []
    model = LanguageModule.load(tmp_path / "text.ckpt").model
    lengths = (16, 64, 32)
    expected = [text_accuracy(model, make_data(eval_context_length=t), "test")["accuracy"] for t in lengths]
    assert [*results["text"]["accuracy"], results["text"]["accuracy_as_trained"]] == expected


def test_checkpoints_and_names_side_by_side(mqar_checkpoint, tmp_path, trainings):
    with pytest.warns(UserWarning, match="Runs with different data or tokenizers are ranked separately"):
        results = compare_accuracy(tmp_path, ("BSBR", "mine"), (16,), checkpoints={"mine": mqar_checkpoint})
    assert len(trainings) == 1
    assert results["models"] == ["BSBR", "mine"]
    assert all(0 <= results[name]["accuracy"][0] <= 1 for name in ("BSBR", "mine"))


def test_unequal_budgets_are_said(tmp_path, trainings):
    compare_accuracy(tmp_path, ("BSBR",), train_steps=2)
    (longer,) = (tmp_path / "comparison").iterdir()
    with pytest.warns(UserWarning, match=r"unequal budgets.*: standard 3 steps, bsbr.* 2 steps"):
        results = compare_accuracy(tmp_path, ("mine", "Standard"), (16,), checkpoints={"mine": longer})
    (said,) = results["differences"]
    shown = str(analyze_results(results))
    assert said in shown
    assert f"parameters: mine {sum(p.numel() for p in trainings[0].parameters()):,}, Standard " in shown


def test_what_is_trained_is_said_before_and_only_then(tmp_path, capsys, monkeypatch):
    asked = []

    def step_times(models, *rest):
        asked.append((list(models), *rest[:2]))
        return dict.fromkeys(models, 50.0)

    monkeypatch.setattr("bsbr_pl.evals.training.step_times", step_times)
    compare_accuracy(tmp_path)
    said = capsys.readouterr().err
    assert said.startswith(
        "training BSBR, Standard: 3 steps each, of 8 samples of 16 tokens of InductionData, on cpu; "
    )
    assert asked == [(["BSBR", "Standard"], 16, 8)]
    assert f"about 5 min. The weights are kept in {tmp_path}/comparison" in said
    compare_accuracy(tmp_path, ("BSBR", "Linear"))
    assert "training Linear: 3 steps each" in capsys.readouterr().err
    compare_accuracy(tmp_path, ("BSBR", "Linear"))
    assert "steps each" not in capsys.readouterr().err


def test_by_default_one_length_is_that_of_the_training():
    defaults = inspect.signature(compare_models).parameters
    assert default_task().context_length in defaults["seq_lengths"].default


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "x.ckpt").write_text("nothing")
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        compare_models((8,), ("mine",), ("flops",), checkpoints={"mine": tmp_path / "x.ckpt"}, **SMALL)


def test_a_short_training_learns_its_task(tmp_path):
    """The default training in small: far above guessing, which random weights are not."""
    task = MQARData(64, train_segments=((16, 2, 20_000),), test_segments=((16, 2, 500),), batch_size=64)
    arguments = {"hidden_dim": 32, "num_layers": 2, "task": task, "cache_dir": tmp_path, "train_steps": 300}
    results = compare_models((16,), ("DeltaNet",), ("accuracy",), **SMALL | arguments, learning_rate=1e-2)
    assert results["accuracy_task"]["chance"] == 1 / 32
    assert results["DeltaNet"]["accuracy"][0] > 0.5
    assert math.isfinite(results["DeltaNet"]["accuracy"][0])


@pytest.mark.parametrize("first", [0.5, None])
def test_accuracies_as_trained_are_listed_if_any_was_measured(first):
    results = made_up(Standard=lambda t: 1e-6 * t**2, Linear=lambda t: 1e-4 * t)
    for model, value in zip(results["models"], (first, None), strict=True):
        results[model]["accuracy_as_trained"] = value
    assert ("accuracy as trained: Standard 0.5, Linear -" in str(analyze_results(results))) == (first is not None)

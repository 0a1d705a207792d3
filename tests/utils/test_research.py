"""ExperimentRunner: every cell once, resumed, timed, and none of them in the way of another."""

import json
import random
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import environment
from faults.kill_and_resume import start
from torch import nn

from bsbr_pl import BSBRModel, SlidingWindowTransformer, StandardTransformer
from bsbr_pl.utils.research import ExperimentRunner

SMALL = {"vocab_size": 11, "hidden_dim": 8, "num_layers": 1, "num_heads": 2}


class Experiment(ExperimentRunner):
    """Counts its calls; may be told to fail at a cell."""

    calls: list
    ignored = ("calls", "fails", "error", "setup")
    fails: tuple = ()
    error: type[BaseException] = RuntimeError

    def setup(self):
        self.calls = []
        self.models = {"bsbr": BSBRModel(**SMALL, chunk_size=4), "standard": StandardTransformer(**SMALL)}
        self.seq_lengths = self.config.get("seq_lengths", [4, 9])
        self.metrics = ["accuracy"]

    def run_experiment(self, model, seq_length):
        assert not model.training
        name = type(model).__name__
        self.calls.append((name, seq_length))
        if (name, seq_length) in self.fails:
            raise self.error("no luck")
        outputs = model(torch.randint(0, 11, (1, seq_length)))
        return {"accuracy": self.calculate_accuracy(outputs), "shape": list(outputs.shape), "drawn": torch.rand(())}

    def calculate_accuracy(self, outputs):
        return float((outputs.argmax(-1) == 0).float().mean())


CELLS = [("BSBRModel", 4), ("BSBRModel", 9), ("StandardTransformer", 4), ("StandardTransformer", 9)]


def test_records_are_flat_timed_and_in_order(tmp_path):
    experiment = Experiment(tmp_path, rounds=3)
    records = experiment.run()
    assert [(r["model"], r["seq_length"]) for r in records] == [(m, t) for m in ("bsbr", "standard") for t in (4, 9)]
    assert experiment.calls == [cell for cell in CELLS for _ in range(1 + 3)], "once to warm up, then three times"
    for record in records:
        assert 0 < record["seconds_low"] <= record["seconds"] <= record["seconds_high"]
        assert record["shape"] == [1, record["seq_length"], 11]
        assert isinstance(record["drawn"], float)
    assert json.loads(json.dumps(records)) == records
    assert experiment.analyze_results(records) is records


def test_a_cell_that_is_done_is_not_run_again(tmp_path):
    first = Experiment(tmp_path).run()
    again = Experiment(tmp_path)
    assert again.run() == first
    assert again.calls == []


def test_ctrl_c_keeps_what_is_done_and_the_rest_is_as_if_uninterrupted(tmp_path):
    whole = Experiment(tmp_path / "whole", rounds=0).run()
    experiment = Experiment(tmp_path / "stopped", rounds=0)
    experiment.fails, experiment.error = (CELLS[2],), KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        experiment.run()
    assert experiment.calls == CELLS[:3]
    experiment.fails = ()
    assert experiment.run() == whole
    assert experiment.calls == CELLS[2:]


def test_a_cell_that_fails_is_recorded_and_tried_again(tmp_path):
    experiment = Experiment(tmp_path, rounds=0)
    experiment.fails = (CELLS[1],)
    records = experiment.run()
    assert [record.get("error") for record in records] == [None, "RuntimeError: no luck", None, None]
    assert len(experiment.calls) == 4
    experiment.fails = ()
    assert all("error" not in record for record in experiment.run())
    assert experiment.calls == [CELLS[1]]


def test_an_experiment_may_measure_what_it_calls_error(tmp_path):
    class Errors(Experiment):
        def run_experiment(self, model, seq_length):
            self.calls.append(seq_length)
            return {"accuracy": 1.0, "error": 0.0}

    Errors(tmp_path, rounds=0).run()
    again = Errors(tmp_path, rounds=0)
    assert [record["error"] for record in again.run()] == [0.0] * 4
    assert again.calls == []


@pytest.mark.parametrize("change", [{"config": {"note": "another"}}, {"seed": 1}, {"rounds": 1}])
def test_what_a_cell_depends_on_decides_whether_it_is_done(tmp_path, change):
    Experiment(tmp_path, rounds=0).run()
    other = Experiment(tmp_path, **{"rounds": 0} | change)
    other.run()
    assert set(other.calls) == set(CELLS)


def test_other_weights_or_other_code_are_another_cell(tmp_path):
    class Other(Experiment):
        def setup(self):
            super().setup()
            with torch.no_grad():
                self.models["bsbr"].embedding.weight.mul_(2)

    class Same(Experiment):
        pass

    Other(tmp_path, rounds=0).run()
    same = Same(tmp_path, rounds=0)
    same.run()
    assert set(same.calls) == set(CELLS), "its code is another"


def test_more_lengths_run_only_what_is_new(tmp_path):
    Experiment(tmp_path, rounds=0).run()
    experiment = Experiment(tmp_path, rounds=0)
    experiment.setup = lambda: (Experiment.setup(experiment), setattr(experiment, "seq_lengths", [4, 9, 5]))
    assert len(experiment.run()) == 6
    assert experiment.calls == [("BSBRModel", 5), ("StandardTransformer", 5)]


def test_a_metric_that_is_promised_must_be_there(tmp_path):
    class Forgetful(Experiment):
        def run_experiment(self, model, seq_length):
            return {"loss": 1.0}

    record = Forgetful(tmp_path, rounds=0).run()[0]
    assert record["error"] == "ValueError: run_experiment must return accuracy (metrics), got only loss"


def test_an_array_is_named(tmp_path):
    class Vectors(Experiment):
        def run_experiment(self, model, seq_length):
            return {"accuracy": torch.tensor(0.5), "losses": torch.zeros(3)}

    record = Vectors(tmp_path, rounds=0).run()[0]
    words = "run_experiment must return plain values, got an array as 'losses': use .tolist()"
    assert record["error"] == f"ValueError: {words}"


def test_cells_do_not_train_each_others_models(tmp_path):
    class Training(Experiment):
        def run_experiment(self, model, seq_length):
            with torch.no_grad():
                before = float(model.embedding.weight.abs().sum())
                model.embedding.weight.zero_()
            return {"accuracy": before}

    assert all(record["accuracy"] > 0 for record in Training(tmp_path, rounds=0).run())


def test_the_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Experiment(tmp_path, rounds=1).run()
    assert torch.equal(torch.rand(3), expected)


def test_models_by_name_are_built_from_the_config(tmp_path):
    class Named(Experiment):
        def setup(self):
            self.models, self.seq_lengths, self.calls = ["BSBR", "gau"], [4], []

    experiment = Named(tmp_path, config=SMALL, rounds=0)
    assert [record["model"] for record in experiment.run()] == ["BSBR", "gau"]
    assert experiment.calls == [("BSBRModel", 4), ("GAUTransformer", 4)]

    class Unknown(Experiment):
        def setup(self):
            self.models, self.seq_lengths = ["Mamba"], [4]

    with pytest.raises(ValueError, match="'Mamba': did you mean mamba2"):
        Unknown(tmp_path).run()


def test_what_must_be_defined_says_so(tmp_path):
    with pytest.raises(NotImplementedError, match="must define setup"):
        ExperimentRunner(tmp_path).run()
    with pytest.raises(NotImplementedError, match="calculate_accuracy"):
        ExperimentRunner(tmp_path).calculate_accuracy(None)
    with pytest.raises(ValueError, match="rounds must be 0"):
        ExperimentRunner(tmp_path, rounds=-1)


def test_damaged_lines_are_said_and_kept(tmp_path):
    (tmp_path / "results.jsonl").write_text("{")
    with pytest.warns(UserWarning, match=r"results\.jsonl: 1 lines .* are left out; they stay in the file"):
        first = Experiment(tmp_path, rounds=0).run()
    first_line, *rows = (tmp_path / "results.jsonl").read_text().splitlines()
    assert (first_line, len(rows)) == ("{", 4)
    again = Experiment(tmp_path, rounds=0)
    with pytest.warns(UserWarning, match="1 lines"):
        second = again.run()
    assert (second, again.calls) == (first, [])


class Slow(ExperimentRunner):
    def setup(self):
        self.models, self.seq_lengths = {"a": 1, "b": 2}, [1, 2, 3]

    def run_experiment(self, model, seq_length):
        with open("log", "a") as log:
            log.write(f"{model} {seq_length}\n")
        time.sleep(0.3)
        return {"sum": model + seq_length}


def collect(results: str) -> None:
    """What each of two processes does."""
    records = Slow(results, rounds=0).run()
    Path("records.json").write_text(json.dumps([(r["model"], r["seq_length"], r["sum"]) for r in records]))


def test_two_runners_divide_the_cells(tmp_path):
    folders = [tmp_path / "1", tmp_path / "2"]
    for folder in folders:
        (folder / "temporary").mkdir(parents=True)
    environment.preload("faults.environment")
    both = [start(folder, collect, str(tmp_path / "results")) for folder in folders]
    for process, folder in zip(both, folders, strict=True):
        process.join(120)
        assert process.exitcode == 0, (folder / "output.txt").read_text()
    expected = [[name, length, first + length] for name, first in (("a", 1), ("b", 2)) for length in (1, 2, 3)]
    for folder in folders:
        assert json.loads((folder / "records.json").read_text()) == expected, "each has all records"
    logs = [folder / "log" for folder in folders]
    cells = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
    assert sorted(cells) == sorted(f"{first} {length}" for first in (1, 2) for length in (1, 2, 3))


class Windows(Experiment):
    """Models that differ in a plain attribute alone."""

    def setup(self):
        super().setup()
        self.models = {"window": SlidingWindowTransformer(**SMALL, window_size=self.window)}
        self.seq_lengths = np.array([4])


def test_a_plain_attribute_is_part_of_the_model(tmp_path):
    for window, called in ((2, 1), (2, 0), (3, 1)):
        Windows.window = window
        experiment = Windows(tmp_path, rounds=0)
        (record,) = experiment.run()
        assert (len(experiment.calls), record["seq_length"], "error" in record) == (called, 4, False)


def adds_one() -> nn.Module:
    class Own(nn.Module):
        def forward(self, x):
            return x + 1

    return Own()


def adds_two() -> nn.Module:
    class Own(nn.Module):
        def forward(self, x):
            return x + 2

    return Own()


def test_the_code_of_the_model_is_part_of_it(tmp_path):
    """Two models with the same name, structure and attributes, and no weights."""

    class Sums(ExperimentRunner):
        def setup(self):
            self.models, self.seq_lengths = {"own": self.model}, [4]

        def run_experiment(self, model, seq_length):
            return {"sum": float(model(torch.zeros(seq_length)).sum())}

    for make, total in ((adds_one, 4.0), (adds_two, 8.0)):
        Sums.model = make()
        (record,) = Sums(tmp_path, rounds=0).run()
        assert record["sum"] == total


@pytest.mark.parametrize("name", ["model", "seq_length", "seconds"])
def test_names_of_the_record_are_not_returned(tmp_path, monkeypatch, name):
    monkeypatch.setattr(Experiment, "run_experiment", lambda *_: {"accuracy": 1.0, name: 7})
    (record, *_) = Experiment(tmp_path).run()
    assert record["error"] == f"ValueError: run_experiment must not return {name}: the record has a value of this name"


class Scaled(nn.Module):
    """What decides its output stands in no weight and in no structure."""

    def __init__(self, scales, act=torch.relu, shift=0.0, table=None):
        super().__init__()
        self.scales, self.act, self.table = scales, act, table or {}
        self.register_buffer("shift", torch.full((3,), shift), persistent=False)

    def forward(self, x):
        return self.act(x * self.scales[0]) + self.shift


class Times:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


def times(factor, more=0):
    return lambda x, more=more: x * factor + more


KINDS_OF_MODELS = {
    "list": lambda: (Scaled([1]), Scaled([2])),
    "tuple": lambda: (Scaled(({"a": 1},)), Scaled(({"a": 2},))),
    "dict": lambda: (Scaled([1], table={"a": [1]}), Scaled([1], table={"a": [2]})),
    "built-in function": lambda: (Scaled([1], torch.relu), Scaled([1], torch.tanh)),
    "function of Python": lambda: (Scaled([1], nn.functional.relu), Scaled([1], nn.functional.softsign)),
    "buffer": lambda: (Scaled([1]), Scaled([1], shift=5.0)),
    "code": lambda: (lambda x: x * 2, lambda x: x * 3),
    "closure": lambda: (times(2), times(3)),
    "default": lambda: (times(2), times(2, 1)),
    "partial": lambda: (partial(torch.add, other=1), partial(torch.add, other=2)),
    "object": lambda: (Times(2), Times(3)),
    "object within": lambda: (Times(Times(np.arange(3)).factor), Times(Times(np.arange(1, 4)).factor)),
    "method": lambda: (Times(2).__call__, Times(3).__call__),
    "state in C": lambda: (Times(random.Random(1)), Times(random.Random(2))),
    "generator": lambda: (Times(np.random.default_rng(1)), Times(np.random.default_rng(2))),
    "weak references": lambda: (nn.LSTM(2, 2, bias=False), nn.LSTM(2, 2)),
}


@pytest.mark.parametrize("kind", KINDS_OF_MODELS)
def test_whatever_decides_a_model_is_part_of_it(tmp_path, kind):
    """The same model, built again, is measured once; another one is measured."""

    class Counting(ExperimentRunner):
        called, ignored = 0, ("called",)

        def setup(self):
            self.models, self.seq_lengths = {"model": type(self).model}, [3]

        def run_experiment(self, model, seq_length):
            Counting.called += 1
            return {}

    (before, after), (again, _) = (torch.manual_seed(0) and KINDS_OF_MODELS[kind]() for _ in range(2))
    for Counting.model, called in ((before, 1), (again, 1), (after, 2), (before, 2)):
        Counting(tmp_path, rounds=0).run()
        assert Counting.called == called


SCALE, TABLE = 2.0, torch.arange(3.0)


def helper(x):
    return x * SCALE + TABLE.sum()


class Piece:
    offset = 1

    @property
    def doubled(self):
        return self.offset * 2


class Named(nn.Module):
    """Its output depends on a function, a class and constants of this file, which are in no attribute."""

    factor = 1

    def forward(self, x):
        return helper(x) * self.factor + next(Piece().doubled for _ in range(1))


def test_whatever_code_names_is_part_of_it(tmp_path, monkeypatch):
    """Constants, helper functions, other classes, attributes of the classes and of the runner."""

    class Sums(ExperimentRunner):
        shift = 0

        def __init__(self, folder, power):
            super().__init__(folder, rounds=0)
            self.power = power

        def setup(self):
            self.models, self.seq_lengths = {"own": Named()}, [4]

        def run_experiment(self, model, seq_length):
            return {"sum": float(model(torch.ones(seq_length)).sum()) ** self.power + self.shift}

    def measured(power: int = 1) -> float:
        (record,) = Sums(tmp_path, power).run()
        return record["sum"]

    assert measured() == 4 * (2 + 3 + 2)
    names = globals()
    for owner, name, value, expected in (
        (names, "SCALE", 3.0, 4 * (3 + 3 + 2)),
        (names, "TABLE", torch.ones(3), 4 * (3 + 3 + 2)),
        (names, "helper", lambda x: x * 5, 4 * (5 + 2)),
        (Piece, "offset", 2, 4 * (5 + 4)),
        (Named, "factor", 2, 4 * (10 + 4)),
        (Sums, "shift", 7, 4 * (10 + 4) + 7),
    ):
        if isinstance(owner, dict):
            monkeypatch.setitem(owner, name, value)
        else:
            monkeypatch.setattr(owner, name, value)
        assert measured() == expected
    assert measured(2) == (4 * (10 + 4)) ** 2 + 7
    rows = (tmp_path / "results.jsonl").read_text().splitlines()
    measured(2)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows) == 8


def test_every_random_state_is_that_of_the_seed(tmp_path):
    class Draws(ExperimentRunner):
        def setup(self):
            self.models, self.seq_lengths = {"a": random.random(), "b": np.random.rand()}, [1]

        def run_experiment(self, model, seq_length):
            return {"model's": model, "random": random.random(), "numpy": np.random.rand(), "torch": torch.rand(())}

    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = Draws(tmp_path / "1", rounds=0).run()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.random()
    np.random.rand()
    assert Draws(tmp_path / "2", rounds=0).run() == first
    assert first[0]["random"] == first[1]["random"] == random.Random(0).random()
    assert first[0]["numpy"] == np.random.RandomState(0).rand()
    assert Draws(tmp_path / "3", rounds=0, seed=1).run() != first


def test_what_cannot_be_told_is_measured_again(tmp_path):
    runner, model = ExperimentRunner(tmp_path), Times(threading.Lock())
    assert runner._digest("model", model) != runner._digest("model", model)

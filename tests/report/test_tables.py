"""Tables from rows that are written down here: what is averaged, compared, ranked, and how it is written."""

import csv
import io
import math
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.evals.checkpoints import Checkpoint
from bsbr_pl.evals.evaluation import VERSION, Evaluation, body
from bsbr_pl.evals.report import costs, quality
from bsbr_pl.evals.report import verdict as verdicts
from bsbr_pl.evals.report.findings import Findings
from bsbr_pl.evals.report.numbers import difference, front
from bsbr_pl.evals.report.table import Column, Measured, Table, markdown
from bsbr_pl.module import LanguageModule
from bsbr_pl.results import Results

CPU = {"cpu": "a processor", "threads": 2, "device": "cpu", "torch": "2.13", "dtype": "float32"}
CPU |= {"commit": {"commit": "0123456789abcdef", "changed": False}}
GPU = CPU | {"device": "cuda:0", "gpu": "a GPU", "dtype": "bfloat16"}
LOWEST, SIZE = 100, 10  # documents, bytes of each


def module(name: str = "standard", seed: int = 0, **options: Any) -> LanguageModule:
    torch.manual_seed(seed)
    if name in ("bsbr", "linear", "delta_net", "gated_delta_net", "gau"):
        options = {"chunk_size": 8} | options
    return LanguageModule(partial(ARCHITECTURES[name], **options), 257, hidden_dim=16, num_layers=2, num_heads=2)


def checkpoint(name: str = "standard", seed: int = 0, path: str | None = None, **arguments: Any) -> Checkpoint:
    arguments = {"source": "texts", "context_length": 256, "batch_size": 8} | arguments
    path = path or f"runs/{name}_{seed}/last.ckpt"
    metrics = {"val/loss": {"step": [99, 199], "seconds": [5.0, 10.0 + seed], "value": [2.0, 1.5]}}
    metrics["flops/step_flops"] = {"step": [9], "seconds": [1.0], "value": [1e9]}
    record = {"metrics": metrics, "seed": seed, "seconds": 10.0, "data": {"class": "TextData"} | arguments}
    record["environment"] = {"device": "cpu", "cpu": "a processor", "threads": 2, "processes": 1}
    record["training"] = {"max_steps": 200, "accumulate_grad_batches": 1, "precision": "32-true"}
    return Checkpoint(path, f"{name}-{seed}", module(name, seed), 200, record, "TextData", arguments, "f" * 32)


def text(bits: float, documents: int = LOWEST, noise: float = 0.0, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Values of `text_accuracy` whose documents have `bits` a byte, more or less."""
    nats = (bits + noise * np.random.default_rng(seed).normal(size=documents)) * SIZE * math.log(2)
    bits = float(nats.sum() / documents / SIZE / math.log(2))
    interval = {"loss": [bits - 0.1, bits + 0.1], "accuracy": [0.4, 0.6], "bits_per_byte": [bits - 0.01, bits + 0.01]}
    slices = ("rest", "hits", "1 to 7 back", "8 or more back")
    return {
        "loss": bits,
        "perplexity": math.exp(bits),
        "accuracy": 0.5,
        "bits_per_byte": bits,
        "tokens": SIZE * documents,
        "bytes": SIZE * documents,
        "documents": documents,
        "interval": interval,
        "blocks": {"nats": nats.tolist(), "bytes": [SIZE] * documents},
        "by_position": [{"start": n, "stop": 2 * n or 1, "loss": bits + 1 / (1 + n)} for n in (0, 1, 2, 4, 8, 16, 32)],
        "recall": [{"slice": s, "tokens": 9, "loss": bits / i, "accuracy": i / 5} for i, s in enumerate(slices, 1)],
    } | more


def cost(length: int, power: float = 1.0, scale: float = 1e-6, rounds: int = 5) -> dict[str, Any]:
    """Values of `measure_costs` that grow as length^power."""
    at = scale * length**power

    def timing(seconds: float) -> dict[str, Any]:
        values = [seconds * (1 + 0.02 * i) for i in range(rounds)]
        return {"seconds": values[rounds // 2], "interval": [values[0], values[-1]], "samples": values}

    times = {"forward": timing(at), "training": timing(3 * at), "decode": timing(at / length)}
    return times | {"forward_bytes": 1000 * length, "training_bytes": 4000 * length, "forward_flops": 10**9 * at,
                    "state_bytes": 64 * length}  # fmt: skip


def certificate(passed: bool = True) -> dict[str, Any]:
    checks = [{"name": "suffix_0", "measured": 0.0 if passed else 0.25, "limit": 1e-8, "passed": passed}]
    checks.append({"name": "random_tokens", "measured": -0.5, "limit": 4.0, "passed": True})
    return {"passed": passed, "length": 19, "checks": checks}


class Bench:
    """An Evaluation whose rows are written down rather than measured."""

    def __init__(self, folder: Path, checkpoints: list[Checkpoint], **problems: str) -> None:
        self.results = Results(folder / "results.jsonl")
        self.evaluation = Evaluation(checkpoints, self.results, problems=problems)

    def add(self, one: Checkpoint, kind: str, values: dict[str, Any], environment: Any = CPU, **more: Any) -> None:
        digest = body(one) if kind == "cost" else one.digest
        if kind in ("text", "recall"):
            more = {"split": "val", "data": one.data_fingerprint} | more
        identity = {"kind": kind, "checkpoint": digest, **more, "environment": environment, "version": VERSION}
        self.results.add(identity, values, {"command": "evaluate.py runs", "checkpoint": one.name, "seed": one.seed})

    def measured(self, one: Checkpoint, bits: float, environment: Any = CPU, passed: bool = True, **more: Any) -> None:
        self.add(one, "certificate", certificate(passed), environment)
        if passed:
            self.add(one, "text", text(bits, **more), environment, length=256)

    @property
    def findings(self) -> Findings:
        return Findings(self.evaluation)


def columns(table: Table | None) -> dict[str, list[Any]]:
    assert table is not None
    return {column.name: [row[i] for row in table.rows] for i, column in enumerate(table.columns)}


def verdict(bench: Bench) -> Table:
    (study,) = bench.findings.studies
    found = verdicts.ranking(study, bench.findings)
    assert found is not None
    return found


def test_seeds_are_averaged_and_their_spread_is_shown(tmp_path):
    seeds = [checkpoint("standard", seed) for seed in (0, 1, 2)]
    bench = Bench(tmp_path, seeds)
    for one, bits in zip(seeds, (1.5, 1.7, 1.9), strict=True):
        bench.measured(one, bits)
    found = columns(verdict(bench))
    assert found["architecture"] == ["standard"]
    assert found["seeds"] == [Measured(3)]
    (bits,) = found["bits per byte"]
    assert (bits.value, bits.low, bits.high) == pytest.approx((1.7, 1.5, 1.9))


def test_runs_of_one_seed_are_not_called_seeds(tmp_path):
    ones = [checkpoint("standard", seed) for seed in (0, 1)]
    ones[1].record["seed"] = 0
    bench = Bench(tmp_path, ones)
    for one in ones:
        bench.measured(one, 1.5)
    assert columns(verdict(bench))["seeds"] == [Measured(1, note="2 runs")]


def test_an_accuracy_on_other_data_than_that_of_the_training_is_not_shown(tmp_path):
    ones = [checkpoint("standard", seed) for seed in (0, 1)]
    ones[1].data_fingerprint = "e" * 32
    bench = Bench(tmp_path, ones)
    for one in ones:
        bench.add(one, "certificate", certificate())
        bench.add(one, "text", text(1.5), length=256, data="f" * 32)
    findings = bench.findings
    shown = {study.title: columns(verdicts.ranking(study, findings)) for study in findings.studies}
    assert [table["architecture"] for table in shown.values()] == [["standard"], ["standard"]]
    assert [table["certificate"] for table in shown.values()] == [["passed"], ["passed"]]
    own = next(table for title, table in shown.items() if " D2," in title)
    other = next(table for title, table in shown.items() if " D1," in title)
    assert own["bits per byte"][0].value == pytest.approx(1.5)
    assert "bits per byte" not in other


def test_an_accuracy_on_data_that_changed_since_is_not_shown(tmp_path):
    ones = [checkpoint("standard"), checkpoint("linear")]
    bench = Bench(tmp_path, ones)
    for one in ones:
        bench.measured(one, 1.5)
    bench.evaluation.changed.add(ones[0].digest)
    found = columns(verdict(bench))
    assert found["architecture"] == ["linear(chunk_size=8)", "standard"]
    assert found["bits per byte"][1] is None


def test_a_run_that_does_not_say_what_it_was_trained_on_is_marked(tmp_path):
    ones = [checkpoint("standard"), checkpoint("standard", 1)]
    ones[1].data_fingerprint = None
    bench = Bench(tmp_path, ones)
    for one in ones:
        bench.add(one, "certificate", certificate())
        bench.add(one, "text", text(1.5), length=256, data="f" * 32)
    assert columns(verdict(bench))["architecture"] == ["standard", "standard [not known what it was trained on]"]


def test_costs_of_other_rounds_are_named(tmp_path):
    ones = [checkpoint("linear"), checkpoint("gau")]
    bench = Bench(tmp_path, ones)
    for one in ones:
        bench.add(one, "cost", cost(256), length=256, rounds=5)
    assert "same rounds" not in bench.findings.cost_source("E1")
    bench.results.rows[1]["about"]["timed_with"] = ["another"]
    assert "Not all of a length were timed in the same rounds." in bench.findings.cost_source("E1")


def test_a_single_run_has_its_interval_over_documents(tmp_path):
    bench = Bench(tmp_path, [one := checkpoint()])
    bench.measured(one, 1.5)
    (bits,) = columns(verdict(bench))["bits per byte"]
    assert (bits.low, bits.high) == pytest.approx((1.49, 1.51))


@pytest.mark.parametrize(
    ("second", "studies"),
    [({"environment": GPU}, 2), ({"split": "test"}, 2), ({"data": "e" * 32}, 2), ({"length": 256}, 1)],
)
def test_environments_splits_and_data_are_never_averaged(tmp_path, second, studies):
    first, other = checkpoint("standard", 0), checkpoint("standard", 1)
    bench = Bench(tmp_path, [first, other])
    bench.add(first, "text", text(1.5), length=256)
    environment = second.pop("environment", CPU)
    other.data_fingerprint = second.get("data", other.data_fingerprint)
    bench.add(other, "text", text(1.9), environment, **{"length": 256} | second)
    findings = bench.findings
    assert len(findings.studies) == studies
    found = [columns(verdicts.ranking(study, findings)) for study in findings.studies]
    values = sorted(cell.value for table in found for cell in table["bits per byte"])
    assert values == pytest.approx([1.5, 1.9] if studies == 2 else [1.7])
    assert len({study.title for study in findings.studies}) == studies


def test_the_difference_to_the_best_is_paired_by_document(tmp_path):
    better, worse = checkpoint("standard"), checkpoint("linear")
    bench = Bench(tmp_path, [better, worse])
    hard = {"noise": 0.5, "seed": 3}  # the same hard documents for both: the difference does not vary
    bench.measured(better, 1.5, **hard)
    bench.measured(worse, 1.6, **hard)
    table = verdict(bench)
    best, other = columns(table)["bits per byte above the best"]
    assert (best.value, best.note) == (0.0, "best")
    assert (other.value, other.low, other.high) == pytest.approx((0.1, 0.1, 0.1))
    assert other.note == ""
    assert "none is tied" in verdicts.summary(bench.findings.studies[0])


def test_a_difference_by_hand(tmp_path):
    rows = [{"values": {"blocks": {"nats": nats, "bytes": [1, 3]}}} for nats in ([2.0, 6.0], [4.0, 10.0])]
    other = [{"values": {"blocks": {"nats": [1.0, 3.0], "bytes": [1, 3]}}}]
    found = difference(rows, other)  # means (3, 8) less (1, 3) are (2, 5): 7 nats in 4 bytes
    assert found.value == pytest.approx(7 / 4 / math.log(2))
    assert (found.low, found.high) == pytest.approx((5 / 3 / math.log(2), 2 / math.log(2)))
    assert difference(rows, [{"values": {"blocks": {"nats": [1.0], "bytes": [4]}}}]) is None


def test_a_tie_is_called_a_tie(tmp_path):
    better, worse = checkpoint("standard"), checkpoint("linear")
    bench = Bench(tmp_path, [better, worse])
    bench.measured(better, 1.5, noise=0.5, seed=1)
    bench.measured(worse, 1.5, noise=0.5, seed=2)
    assert [cell.note for cell in columns(verdict(bench))["bits per byte above the best"]] == ["best", "tied"]
    assert "tied with" in verdicts.summary(bench.findings.studies[0])


def test_seeds_that_overlap_are_a_tie_whatever_the_documents_say(tmp_path):
    def noted(apart: float) -> str:
        runs = [checkpoint(name, seed) for name in ("standard", "linear") for seed in (0, 1)]
        bench = Bench(tmp_path / str(apart), runs)
        for one, bits in zip(runs, (1.5, 1.7, 1.5 + apart, 1.7 + apart), strict=True):
            bench.measured(one, bits)
        return columns(verdict(bench))["bits per byte above the best"][1].note

    assert noted(0.1) == "tied"
    assert noted(0.3) == ""


def test_the_disqualified_are_last_named_and_not_ranked(tmp_path):
    leaky, honest, other = checkpoint("bsbr"), checkpoint("standard"), checkpoint("linear")
    bench = Bench(tmp_path, [leaky, honest, other])
    bench.measured(leaky, 0.1, passed=False)
    bench.add(leaky, "text", text(0.1), length=256)  # measured by an earlier version, say: still not ranked
    bench.measured(honest, 1.5)
    bench.measured(other, 1.6)
    table = verdict(bench)
    assert [str(name).split("(")[0] for name in columns(table)["architecture"]] == ["standard", "linear", "bsbr"]
    assert table.ranked == 2
    assert columns(table)["certificate"][-1] == "disqualified: suffix_0 0.2500 above 1.00e-08"
    place = [column.name for column in table.columns].index("bits per byte")
    assert [table.best(i, place) for i in range(3)] == [True, False, False]
    assert verdicts.summary(bench.findings.studies[0]).startswith("Best: standard, 1.500 bits per byte")
    assert "Disqualified: bsbr" in verdicts.summary(bench.findings.studies[0])
    assert "front" not in columns(table).get("Pareto front", [""])[-1]


def test_one_disqualified_seed_does_not_enter_the_mean(tmp_path):
    first, second = checkpoint("standard", 0), checkpoint("standard", 1)
    bench = Bench(tmp_path, [first, second])
    bench.measured(first, 1.5)
    bench.measured(second, 0.1, passed=False)
    found = columns(verdict(bench))
    assert found["seeds"] == [Measured(1), Measured(1)]
    assert found["bits per byte"][0].value == pytest.approx(1.5)
    assert found["bits per byte"][1] is None


def test_only_rows_of_the_given_checkpoints_are_read(tmp_path):
    mine, other = checkpoint("standard"), checkpoint("linear")
    bench = Bench(tmp_path, [mine])
    bench.measured(mine, 1.5)
    bench.measured(other, 1.0)
    bench.add(other, "cost", cost(256), length=256, rounds=5)
    bench.results.add({"kind": "text", "checkpoint": mine.digest, "version": VERSION - 1}, text(0.5), {})
    bench.results.add({"kind": "something", "checkpoint": "else"}, {}, {})
    assert columns(verdict(bench))["architecture"] == ["standard"]
    assert bench.findings.costs == {}
    assert len(bench.findings.rows) == 2


def test_what_was_not_measured_stays_absent(tmp_path):
    first, second = checkpoint("standard"), checkpoint("linear")
    bench = Bench(tmp_path, [first, second])
    bench.measured(first, 1.5)
    bench.measured(second, 1.6, bits_per_byte=None, blocks={"nats": [None] * LOWEST, "bytes": [SIZE] * LOWEST})
    bench.add(first, "cost", cost(256), length=256, rounds=5)
    found = columns(verdict(bench))
    assert found["bits per byte"][1] is None
    assert found["bits per byte above the best"] == [None, None] if "bits per byte above the best" in found else True
    assert [cell and round(cell.value, 6) for cell in found["training pass at 256"]] == [0.000799, None]
    assert "| linear" in verdict(bench).to_markdown()


def test_costs_exponents_and_crossovers(tmp_path):
    square, straight = checkpoint("standard"), checkpoint("linear")
    bench = Bench(tmp_path, [square, straight])
    for one, power, scale in ((square, 2.0, 1e-9), (straight, 1.0, 3e-6)):
        for length in (1024, 2048, 4096, 8192):
            bench.add(one, "cost", cost(length, power, scale), length=length, rounds=5)
    findings = bench.findings
    assert list(findings.costs) == ["E1"]
    found = columns(costs.exponents(findings, "E1"))
    assert [cell.value for cell in found["training pass"]] == pytest.approx([1.0, 2.0])
    assert found["training pass in words"] == ["sub-quadratic: grows as T^1.00", "grows as T^2.00"]
    assert "from 2,048" in costs.exponents(findings, "E1").caption
    crossed = columns(costs.crossovers(findings, "E1"))
    assert crossed["against"] == ["standard"] * 4
    assert crossed["from"][:3] == pytest.approx([3000] * 3, rel=0.01)
    assert crossed["from"][3] is None
    assert crossed["in words"][0].startswith("linear(chunk_size=8) passes standard in its forward pass at T = 3,0")
    assert crossed["in words"][3].endswith("training memory: not reached by 8,192")
    times = costs.by_length(findings, "E1", costs.COSTS[0])
    assert [column.header for column in times.columns][1] == "1,024 tokens (ms)"
    assert columns(times)["1,024 tokens"][0].value == pytest.approx(3e-6 * 1024 * 1.04)


def test_short_lengths_are_fitted_where_there_are_no_long_ones(tmp_path):
    bench = Bench(tmp_path, [one := checkpoint("linear")])
    for length in (256, 512, 2048):
        bench.add(one, "cost", cost(length), length=length, rounds=5)
    table = costs.exponents(bench.findings, "E1")
    assert "over all lengths, as fewer than two reach 2,048 tokens" in table.caption
    assert columns(table)["training pass"][0].value == pytest.approx(1.0)
    assert costs.crossovers(bench.findings, "E1") is None


def test_every_pair_crosses_where_there_is_no_standard(tmp_path):
    ones = [checkpoint("linear"), checkpoint("gau")]
    bench = Bench(tmp_path, ones)
    for one, scale in zip(ones, (1e-6, 2e-6), strict=True):
        for length in (256, 512):
            bench.add(one, "cost", cost(length, scale=scale), length=length, rounds=5)
    words = columns(costs.crossovers(bench.findings, "E1"))["in words"]
    assert any("linear(chunk_size=8) is below gau(chunk_size=8)" in text and "(256) on" in text for text in words)
    assert any("gau(chunk_size=8) does not pass linear(chunk_size=8)" in text for text in words)


@pytest.mark.parametrize(
    ("recorded", "changes", "environment", "expected"),
    [
        (1.5, {}, CPU, ""),
        (1.5 + 3e-6, {}, CPU, "does not agree"),
        (1.5, {}, GPU, None),
        (1.5, {"precision": "bf16-mixed"}, CPU, None),
    ],
)
def test_an_evaluation_is_held_against_the_run_itself(tmp_path, recorded, changes, environment, expected):
    one = checkpoint()
    one.record["metrics"]["val/loss"]["value"][-1] = recorded
    one.record["training"] |= changes
    bench = Bench(tmp_path, [one])
    bench.measured(one, 1.5, environment)
    found = columns(quality.by_checkpoint(bench.findings.studies[0], bench.findings))
    assert found["run's own val/loss"] == [recorded]
    cells = found.get("difference to it", [None])
    assert [cell and cell.note for cell in cells] == [expected]


def test_a_loss_of_another_step_is_not_the_run_s_own(tmp_path):
    one = checkpoint()
    one.record["metrics"]["val/loss"]["step"][-1] = 150
    assert quality.own_loss(one) is None


def test_the_pareto_front():
    points = {"a": (1.0, 2.0), "b": (2.0, 1.0), "c": (2.0, 2.0), "d": (3.0, 1.0), "e": (1.0, 2.0)}
    assert front(points) == ["a", "e", "b"]


def test_recall_tasks_have_a_verdict_of_their_own(tmp_path):
    ones = [checkpoint("standard", source="mqar"), checkpoint("linear", source="mqar")]
    for one in ones:
        one.data_class = "MQARData"
    bench = Bench(tmp_path, ones)
    for one, right in zip(ones, (0.9, 0.4), strict=True):
        slices = [
            {"slice": f"T{n}_N4", "length": n, "accuracy": right - n / 1000, "interval": [0.0, 1.0]} for n in (64, 128)
        ]
        values = {
            "loss": 1.0,
            "accuracy": right,
            "samples": 10,
            "interval": {"accuracy": [0.3, 0.95]},
            "slices": slices,
        }
        bench.add(one, "certificate", certificate())
        bench.add(one, "recall", values)
    table = verdict(bench)
    assert columns(table)["architecture"] == ["standard", "linear(chunk_size=8)"]
    assert columns(table)["accuracy, T128_N4"][0] == Measured(0.9 - 0.128, 0.0, 1.0)
    assert "bits per byte" not in columns(table)
    assert len(quality.recall(bench.findings.studies[0], bench.findings).rows) == 4
    assert verdicts.summary(bench.findings.studies[0]).startswith("Best: standard, 90.00 % right")


TABLE = Table(
    "one",
    "One",
    "A table.",
    [Column("name"), Column("time", "ms", "low"), Column("difference", signed=True), Column("count")],
    [
        ["a|b <i>", Measured(0.00123456, 0.001, 0.002), Measured(0.25, note="tied"), 12345],
        ["c", Measured(0.1, 0.1, 0.1), Measured(-1e-7), 0],
        ["d", None, None, None],
    ],
    ranked=2,
)


def test_csv_is_read_back_with_every_digit():
    header, *rows = csv.reader(io.StringIO(TABLE.to_csv()))
    assert header == [
        "name",
        "time (ms)",
        "time (ms), low",
        "time (ms), high",
        "difference",
        "difference, note",
        "count",
    ]
    assert rows[0][0] == "a|b <i>"
    assert [float(value) for value in rows[0][1:4]] == pytest.approx([1.23456, 1, 2], rel=1e-12)
    assert rows[0][4:] == ["0.25", "tied", "12345"]
    assert rows[2] == ["d", "", "", "", "", "", ""]


def test_numbers_are_shown_in_four_digits():
    shown = [[" ".join(filter(None, column.parts(cell))) for column, cell in zip(TABLE.columns, row, strict=True)]
             for row in TABLE.rows]  # fmt: skip
    assert shown[0] == ["a|b <i>", "1.235 [1.000, 2.000]", "+0.2500 tied", "12,345"]
    assert shown[1] == ["c", "100.0", "-1.00e-07", "0"]
    assert shown[2] == ["d", "", "", ""]


def test_markdown_marks_the_best_and_cannot_be_broken_by_a_name():
    lines = TABLE.to_markdown().splitlines()
    assert lines[2] == "| a\\|b \\<i\\> | **1.235** \\[1.000, 2.000\\] | +0.2500 tied | 12,345 |"
    assert markdown("![x](y)\n# z") == "\\!\\[x\\](y) \\# z"


def test_html_is_escaped_and_sorts_by_numbers():
    class Reader(HTMLParser):
        keys: list[str | None] = []  # noqa: RUF012
        tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)
            if "data-sort" in dict(attrs):
                self.keys.append(dict(attrs)["data-sort"])

    reader = Reader()
    reader.feed(TABLE.to_html())
    assert reader.keys[:8] == ["a|b <i>", "0.00123456", "0.25", "12345.0", "c", "0.1", "-1e-07", "0.0"]
    assert "i" not in reader.tags
    assert reader.tags.count("strong") == 1
    assert reader.tags.count("tbody") == 2

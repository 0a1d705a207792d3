"""Tables from rows that are written down here: what is averaged, compared, ranked, and how it is written."""

import csv
import io
import math
from typing import Any

import pandas as pd
import pytest
from written_rows import CPU, GPU, LOWEST, SIZE, VERSION, Bench, about, certificate, cost, recall, text, training

from bsbr_pl.report import costs, quality, sources
from bsbr_pl.report import verdict as verdicts
from bsbr_pl.report.figures import difference, front
from bsbr_pl.report.rows import listed
from bsbr_pl.report.studies import Findings
from bsbr_pl.report.tables import Column, Measured, Table, markdown


def columns(table: Table | None) -> dict[str, list[Any]]:
    assert table is not None
    return {column.name: list(table.frame[column.header]) for column in table.columns}


def placed(bench: Bench) -> tuple[Findings, pd.DataFrame]:
    """What is found, and the costs of its one environment."""
    findings = Findings(bench.rows)
    assert list(findings.environments) == ["E1"]
    return findings, findings.costs


def verdict(bench: Bench) -> Table:
    (study,) = Findings(bench.rows).studies
    found = verdicts.ranking(study)
    assert found is not None
    return found


def test_seeds_are_averaged_and_their_spread_is_shown():
    bench = Bench()
    for seed, bits in enumerate((1.5, 1.7, 1.9)):
        bench.measured(about("standard", seed), bits)
    found = columns(verdict(bench))
    assert found["architecture"] == ["standard"]
    assert found["seeds"] == [Measured(3)]
    (bits,) = found["bits per byte"]
    assert (bits.value, bits.low, bits.high) == pytest.approx((1.7, 1.5, 1.9))


def test_runs_of_one_seed_are_not_called_seeds():
    bench = Bench()
    for path in ("a.ckpt", "b/a.ckpt"):
        bench.measured(about("standard", 0, path), 1.5)
    assert columns(verdict(bench))["seeds"] == [Measured(1, note="2 runs")]


def test_seeds_that_are_not_recorded_are_not_counted():
    bench = Bench()
    for path in ("a.ckpt", "b/a.ckpt"):
        bench.measured(about("standard", None, path), 1.5)
    assert columns(verdict(bench))["seeds"] == ["unknown, 2 runs"]


def test_an_accuracy_on_other_data_than_that_of_the_training_is_not_shown():
    bench = Bench()
    for one in (about("standard", 0), about("standard", 1, data__fingerprint="e" * 32)):
        bench.add(one, "certificate", certificate())
        bench.add(one, "text", text(1.5), length=256, data="f" * 32)
    shown = {study.title: columns(verdicts.ranking(study)) for study in Findings(bench.rows).studies}
    assert [table["architecture"] for table in shown.values()] == [["standard"], ["standard"]]
    assert [table["certificate"] for table in shown.values()] == [["passed"], ["passed"]]
    own = next(table for title, table in shown.items() if " D2," in title)
    other = next(table for title, table in shown.items() if " D1," in title)
    assert own["bits per byte"][0].value == pytest.approx(1.5)
    assert "bits per byte" not in other


def test_a_run_that_does_not_say_what_it_was_trained_on_is_marked():
    bench = Bench()
    for one in (about("standard"), about("standard", 1, data__fingerprint=None)):
        bench.add(one, "certificate", certificate())
        bench.add(one, "text", text(1.5), length=256, data="f" * 32)
    assert columns(verdict(bench))["architecture"] == ["standard", "standard [not known what it was trained on]"]


def test_costs_of_other_rounds_are_named():
    bench = Bench()
    for one in (about("linear"), about("gau")):
        bench.add(one, "cost", cost(256), length=256, rounds=5)
    assert costs.source(*placed(bench)) == "Environment E1; command C1."
    bench.rows[1]["about"] = bench.rows[1]["about"] | {"timed_with": ["another"]}
    assert costs.source(*placed(bench)).startswith("Not all of a length were timed in the same rounds. ")


def test_of_two_costs_the_one_of_most_rounds_counts():
    bench = Bench()
    for rounds, scale in ((9, 2e-6), (5, 1e-6)):
        bench.add(about("linear"), "cost", cost(256, scale=scale, rounds=rounds), length=256, rounds=rounds)
    _, found = placed(bench)
    (seconds,) = found[found["cost"] == "forward"]["figure"]
    assert seconds.value == pytest.approx(256 * 2e-6 * 1.08)  # the fifth of nine samples


def test_a_single_run_has_its_interval_over_documents():
    bench = Bench()
    bench.measured(about(), 1.5)
    (bits,) = columns(verdict(bench))["bits per byte"]
    assert (bits.low, bits.high) == pytest.approx((1.49, 1.51))


def test_rows_of_several_commits_share_a_ranking_and_each_measurement_counts_once():
    """A checkout that moved on between two evaluations does not split the report."""
    later = CPU | {"commit": {"commit": "fedcba9876543210", "changed": True}}
    bench, again = Bench(), about("linear", 1)
    bench.measured(about("standard"), 1.5)
    bench.measured(about("linear"), 1.6, later)
    for environment in (CPU, later):
        bench.measured(again, 1.7, environment)
    findings = Findings(bench.rows)
    (one,) = findings.studies
    assert [len(group.members) for group in one.ranked] == [1, 2]
    assert len(findings.of("text")) == len(findings.by_kind["text"]) == 3
    shown = columns(sources.environments(findings))
    assert shown["commits"] == ["0123456789, fedcba9876 with changes"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ""),
        (["E1"], "E1"),
        (["C10", "C2", "C1", "C2"], "C1, C2, C10"),
        ([f"C{i}" for i in (1, 2, 3, 7, 9, 10, 11, 12)], "C1 to C3, C7, C9 to C12"),
        (["aten.addmm", "aten.bmm"], "aten.bmm, aten.addmm"),
    ],
)
def test_names_that_follow_each_other_are_listed_as_a_range(names, words):
    assert listed(names) == words


@pytest.mark.parametrize(
    ("second", "studies"),
    [({"environment": GPU}, 2), ({"split": "test"}, 2), ({"data": "e" * 32}, 2), ({"length": 256}, 1)],
)
def test_environments_splits_and_data_are_never_averaged(second, studies):
    bench = Bench()
    bench.add(about("standard", 0), "text", text(1.5), length=256)
    other = about("standard", 1, data__fingerprint=second.get("data", "f" * 32))
    bench.add(other, "text", text(1.9), **{"environment": CPU, "length": 256} | second)
    findings = Findings(bench.rows)
    assert len(findings.studies) == studies
    found = [columns(verdicts.ranking(study)) for study in findings.studies]
    assert all(table["certificate"] == ["not measured"] for table in found)
    values = []
    for study in findings.studies:
        (bits,) = study.wide("name", length=0, part="")["bits_per_byte"]
        values.append(bits.value)
    assert sorted(values) == pytest.approx([1.5, 1.9] if studies == 2 else [1.7])
    assert len({study.title for study in findings.studies}) == studies


def test_the_difference_to_the_best_is_paired_by_document():
    bench = Bench()
    hard = {"noise": 0.5}  # the same hard documents for both: the difference does not vary
    for seed in (0, 1):
        bench.measured(about("standard", seed), 1.5, **hard)
        bench.measured(about("linear", seed), 1.6, **hard)
    best, other = columns(verdict(bench))["bits per byte above the best"]
    assert (best.value, best.note) == (0.0, "best")
    assert (other.value, other.low, other.high) == pytest.approx((0.1, 0.1, 0.1))
    assert other.note == ""
    assert "; none is tied with it." in verdicts.summary(Findings(bench.rows).studies[0])


@pytest.mark.parametrize(
    ("best", "others", "words"),
    [
        ((0,), (0, 1), "1.500 bits per byte; one seed cannot tell whether another is tied with it."),
        (
            (0, 1),
            (0,),
            "1.500 bits per byte; one seed cannot tell whether these are tied with it: linear(chunk_size=8).",
        ),
        ((0, 1), (0, 1), "1.500 bits per byte; none is tied with it."),
        ((0,), (), "The only one: standard, 1.500 bits per byte."),
    ],
)
def test_one_seed_is_never_said_to_have_no_tie(best, others, words):
    bench = Bench()
    for name, seeds, bits in (("standard", best, 1.5), ("linear", others, 1.6)):
        for seed in seeds:
            bench.measured(about(name, seed), bits)
    assert words in verdicts.summary(Findings(bench.rows).studies[0])


def test_a_difference_by_hand():
    rows = [{"values": {"blocks": {"nats": nats, "bytes": [1, 3]}}} for nats in ([2.0, 6.0], [4.0, 10.0])]
    other = [{"values": {"blocks": {"nats": [1.0, 3.0], "bytes": [1, 3]}}}]
    found = difference(rows, other)  # means (3, 8) less (1, 3) are (2, 5): 7 nats in 4 bytes
    assert found.value == pytest.approx(7 / 4 / math.log(2))
    assert (found.low, found.high) == pytest.approx((5 / 3 / math.log(2), 2 / math.log(2)))
    assert difference(rows, [{"values": {"blocks": {"nats": [1.0], "bytes": [4]}}}]) is None
    assert difference([], other) is None


def test_a_tie_is_called_a_tie():
    bench = Bench()
    bench.measured(about("standard"), 1.5, noise=0.5, seed=1)
    bench.measured(about("linear"), 1.5, noise=0.5, seed=2)
    assert [cell.note for cell in columns(verdict(bench))["bits per byte above the best"]] == ["best", "tied"]
    assert "tied with" in verdicts.summary(Findings(bench.rows).studies[0])


def test_seeds_that_overlap_are_a_tie_whatever_the_documents_say():
    def noted(apart: float) -> str:
        bench = Bench()
        runs = [about(name, seed) for name in ("standard", "linear") for seed in (0, 1)]
        for one, bits in zip(runs, (1.5, 1.7, 1.5 + apart, 1.7 + apart), strict=True):
            bench.measured(one, bits)
        return columns(verdict(bench))["bits per byte above the best"][1].note

    assert noted(0.1) == "tied"
    assert noted(0.3) == ""


def test_the_disqualified_are_last_named_and_not_ranked():
    bench = Bench()
    leaky = about("bsbr")
    bench.measured(leaky, 0.1, passed=False)
    bench.add(leaky, "text", text(0.1), length=256)  # measured by an earlier version, say: still not ranked
    bench.measured(about("standard"), 1.5)
    bench.measured(about("linear"), 1.6)
    table = verdict(bench)
    assert [name.split("(")[0] for name in columns(table)["architecture"]] == ["standard", "linear", "bsbr"]
    assert table.ranked == 2
    assert columns(table)["certificate"][-1] == "disqualified: suffix_0 0.2500 above 1.00e-08"
    place = [column.name for column in table.columns].index("bits per byte")
    assert [row[place].best for row in table.grid] == [True, False, False]
    assert verdicts.summary(Findings(bench.rows).studies[0]).startswith("Best: standard, 1.500 bits per byte")
    assert "Disqualified: bsbr" in verdicts.summary(Findings(bench.rows).studies[0])
    assert "front" not in columns(table).get("Pareto front", [""])[-1]


def test_one_disqualified_seed_does_not_enter_the_mean():
    bench = Bench()
    bench.measured(about("standard", 0), 1.5)
    bench.measured(about("standard", 1), 0.1, passed=False)
    found = columns(verdict(bench))
    assert found["seeds"] == [Measured(1), Measured(1)]
    assert found["bits per byte"][0].value == pytest.approx(1.5)
    assert found["bits per byte"][1] is None


def test_certificates_that_passed_share_a_row_and_those_that_failed_do_not():
    bench = Bench()
    for name, seed, leak in (("standard", 0, 1e-9), ("bsbr", 0, 0.0), ("standard", 1, 3e-9), ("standard", 2, 2e-9)):
        passed = certificate()
        passed["checks"][0]["measured"] = leak
        bench.add(about(name, seed), "certificate", passed)
    for seed in (3, 4):
        bench.add(about("standard", seed), "certificate", certificate(False))
    found = columns(sources.certificates(Findings(bench.rows), "E1"))
    rows = list(zip(*(found[name] for name in ("checkpoint", "outcome", "suffix (at most 1e-08)")), strict=True))
    assert sorted(rows) == [
        ("3 checkpoints", "passed", 3e-9),
        ("bsbr_0", "passed", 0.0),
        ("standard_3", "failed: suffix_0 0.2500 above 1.00e-08", 0.25),
        ("standard_4", "failed: suffix_0 0.2500 above 1.00e-08", 0.25),
    ]
    assert set(found["random_tokens (at most 4)"]) == {-0.5}
    rounding = certificate()
    rounding["checks"][0]["limit"] = 1e-5
    bench.add(about("linear"), "certificate", rounding)
    assert "suffix (at most 1e-08 or 1e-05)" in columns(sources.certificates(Findings(bench.rows), "E1"))


def test_rows_of_an_older_measurement_and_of_unknown_kinds_are_left_out():
    bench = Bench()
    mine = about("standard")
    bench.measured(mine, 1.5)
    bench.add(mine, "text", text(0.5), length=256, version=VERSION - 1)
    bench.add(mine, "text", text(0.5), length=512, version=VERSION - 1)
    bench.add(about("linear"), "something", {})
    table = verdict(bench)
    assert columns(table)["architecture"] == ["standard"]
    assert columns(table)["bits per byte"][0].value == pytest.approx(1.5)
    findings, found = placed(bench)
    assert found.empty
    assert len(findings.measured) == 2
    words = f"left out: of version {VERSION - 1}, and the newest here is {VERSION}; evaluate these checkpoints again"
    assert sources.problems(findings).frame.to_numpy().tolist() == [["2 rows of kind text", words]]


@pytest.mark.parametrize("later", [True, False])
def test_of_several_descriptions_of_a_run_the_one_that_knows_its_end_counts(later):
    bench = Bench()
    bench.add(about(run__finished=None, run__status="at 100 steps", run__steps=100), "certificate", certificate())
    bench.add(about(), "text", text(1.5), length=256)
    bench.rows = bench.rows if later else bench.rows[::-1]
    assert columns(verdict(bench))["run"] == ["finished"]


def test_of_equal_identities_the_later_row_counts():
    bench = Bench()
    for bits in (1.7, 1.5):
        bench.measured(about(), bits)
    assert columns(verdict(bench))["bits per byte"][0].value == pytest.approx(1.5)


def test_what_was_not_measured_stays_absent():
    bench = Bench()
    first = about("standard")
    bench.measured(first, 1.5)
    blocks = {"nats": [None] * LOWEST, "bytes": [SIZE] * LOWEST}
    bench.measured(about("linear"), 1.6, bits_per_byte=None, blocks=blocks)
    bench.add(first, "cost", cost(256), length=256, rounds=5)
    found = columns(verdict(bench))
    assert found["bits per byte"][1] is None
    assert "bits per byte above the best" not in found
    assert [cell and round(cell.value, 6) for cell in found["training pass at 256"]] == [0.000799, None]
    assert "| linear" in verdict(bench).to_markdown()


def test_costs_exponents_and_crossovers():
    bench = Bench()
    for name, power, scale in (("standard", 2.0, 1e-9), ("linear", 1.0, 3e-6)):
        for length in (1024, 2048, 4096, 8192):
            bench.add(about(name), "cost", cost(length, power, scale), length=length, rounds=5)
    findings, of = placed(bench)
    table = costs.exponents(findings, of, "E1")
    found = columns(table)
    assert [cell.value for cell in found["training pass"]] == pytest.approx([1.0, 2.0])
    assert found["training pass in words"] == ["sub-quadratic: grows as T^1.00", "grows as T^2.00"]
    assert "from 2,048" in table.caption
    words, table = costs.crossovers(findings, of, "E1")
    crossed = columns(table)
    assert crossed["against"] == ["standard"] * 4
    assert crossed["from"][:3] == pytest.approx([3000] * 3, rel=0.01)
    assert crossed["from"][3] is None
    assert crossed["in words"][0].startswith("linear(chunk_size=8) passes standard in its forward pass at T = 3,0")
    assert crossed["in words"][3].endswith("training memory: not reached by 8,192")
    assert words.startswith("linear(chunk_size=8) passes standard in its training pass at T = 3,0")
    tables = costs.by_length(findings, of, "E1")
    times = next(table for table in tables if table.name == "cost_forward_E1")
    assert [column.header for column in times.columns][1] == "1,024 tokens (ms)"
    assert columns(times)["1,024 tokens"][0].value == pytest.approx(3e-6 * 1024 * 1.04)


def test_costs_are_said_in_words_in_their_units():
    bench = Bench()
    for name, states in (("standard", 64), ("linear", 2)):
        one = about(name)
        bench.measured(one, 1.5)
        bench.add(one, "cost", cost(4096) | {"state_bytes": states * 10**6}, length=4096, rounds=5)
    words = verdicts.background(Findings(bench.rows).studies[0])
    assert "Smallest decode state at 4,096 tokens: linear(chunk_size=8), 2.000\u00a0MB." in words
    assert "Cheapest" not in words, "both are as quick"


def test_bodies_of_other_sizes_have_names_of_their_own():
    bench = Bench()
    for width in (16, 32):
        one = about("linear", sizes__hidden_dim=width, checkpoint__body=f"body {width}", checkpoint__digest=f"d{width}")
        bench.add(one, "cost", cost(256), length=256, rounds=5)
    _, found = placed(bench)
    assert sorted(set(found["body"])) == [
        "linear(chunk_size=8) [hidden_dim=16]",
        "linear(chunk_size=8) [hidden_dim=32]",
    ]


def test_short_lengths_are_fitted_if_there_are_no_long_ones():
    bench = Bench()
    for length in (256, 512, 2048):
        bench.add(about("linear"), "cost", cost(length), length=length, rounds=5)
    findings, of = placed(bench)
    table = costs.exponents(findings, of, "E1")
    assert "over all lengths, as fewer than two reach 2,048 tokens" in table.caption
    assert columns(table)["training pass"][0].value == pytest.approx(1.0)
    assert costs.crossovers(findings, of, "E1") == [None, None]


def test_every_pair_crosses_if_there_is_no_standard():
    bench = Bench()
    for name, scale in (("linear", 1e-6), ("gau", 2e-6)):
        for length in (256, 512):
            bench.add(about(name), "cost", cost(length, scale=scale), length=length, rounds=5)
    _, table = costs.crossovers(*placed(bench), "E1")
    words = columns(table)["in words"]
    assert any("linear(chunk_size=8) is below gau(chunk_size=8)" in text and "(256) on" in text for text in words)
    assert any("gau(chunk_size=8) does not pass linear(chunk_size=8)" in text for text in words)


@pytest.mark.parametrize(
    ("recorded", "changes", "environment", "expected"),
    [
        (1.5, {}, CPU, ""),
        (1.5 + 3e-6, {}, CPU, "does not agree"),
        (1.5 + 3e-6, {"about": {"trainer.limit_val_batches": 20}}, CPU, None),
        (1.5 + 3e-6, {"about": {"trainer.overfit_batches": 2}}, CPU, None),
        (1.5, {}, GPU, None),
        (1.5, {"precision": "bf16-mixed"}, CPU, None),
        (1.5, {"environment": {"device": "cuda:1"}}, CPU, None),
    ],
)
def test_an_evaluation_is_held_against_the_run_itself(recorded, changes, environment, expected):
    changes = dict(changes)
    bench, one = Bench(), about(config=changes.pop("about", {}))
    bench.add(one, "training", training(last=recorded, **changes))
    bench.measured(one, 1.5, environment)
    findings = Findings(bench.rows)
    found = columns(quality.by_checkpoint(findings.studies[0], findings))
    assert found["run's own val/loss"] == [recorded]
    cells = found.get("difference to it", [None])
    assert [cell and cell.note for cell in cells] == [expected]


def test_a_loss_of_another_step_or_split_is_not_the_run_s_own():
    for one, split in ((about(step=150), "val"), (about(), "test")):
        bench = Bench()
        bench.add(one, "training", training())
        bench.add(one, "text", text(1.5), length=256, split=split)
        findings = Findings(bench.rows)
        assert "run's own val/loss" not in columns(quality.by_checkpoint(findings.studies[0], findings))


def test_the_pareto_front():
    points = {"a": (1.0, 2.0), "b": (2.0, 1.0), "c": (2.0, 2.0), "d": (3.0, 1.0), "e": (1.0, 2.0)}
    assert front(points) == ["a", "e", "b"]


def test_recall_tasks_have_a_verdict_of_their_own():
    bench = Bench()
    for name, right in (("standard", 0.9), ("linear", 0.4)):
        one = about(name, data__kind="recall", data__class="MQARData", data__validation_length=None)
        bench.add(one, "certificate", certificate())
        bench.add(one, "recall", recall(right))
    table = verdict(bench)
    assert columns(table)["architecture"] == ["standard", "linear(chunk_size=8)"]
    assert columns(table)["accuracy, T128_N4"][0] == Measured(0.9 - 0.128, 0.9 - 0.128 - 0.03, 0.9 - 0.128 + 0.03)
    assert "bits per byte" not in columns(table)
    (study,) = Findings(bench.rows).studies
    plot, table, _ = quality.recall(study)
    assert columns(table)["length"] == [64, 128, 64, 128]
    assert [cell.value for cell in columns(table)["accuracy"]] == pytest.approx([0.836, 0.772, 0.336, 0.272])
    assert plot.title == "Recall by length"
    assert verdicts.summary(study).startswith("Best: standard, 90.00 % right; one seed cannot tell whether another")


def test_the_router_s_misses_are_told_from_what_was_lost_behind_it():
    heads = [{"hit": 0.25, "rank": 3.0}, {"hit": 0.75, "rank": 1.5}]
    layer = {"layer": 0, "chunk_size": 16, "questions": 40, "chance": 0.125, "best_head": 1, "heads": heads}
    routed = {"hit": {"accuracy": 0.5}, "missed": {"accuracy": 0.0625}}
    found = {"layers": [layer, layer | {"layer": 1, "best_head": None}], "routed": routed}
    found["reach"] = {"near": {"accuracy": 0.875}}
    bench, one = Bench(), about("bsbr", data__kind="recall", data__validation_length=None)
    bench.add(one, "recall", recall(0.5, retrieval=found))
    table = columns(quality.routing(Findings(bench.rows).studies[0]))
    assert (table["BSBR layer"], table["hit@1"], table["mean rank"]) == ([0, 1], [0.75, None], [1.5, None])
    assert table["accuracy where hit"] == [None, 0.5], "of the last layer"
    assert (table["where missed"], table["where near"]) == ([None, 0.0625], [None, 0.875])


COLUMNS = [Column("name"), Column("time", "ms", "low"), Column("difference", signed=True), Column("count")]
CELLS = [
    ["a|b <i>", Measured(0.00123456, 0.001, 0.002), Measured(0.25, note="tied"), 12345],
    ["c", Measured(0.1, 0.1, 0.1), Measured(-1e-7), 0],
    ["d", None, None, None],
]
FRAME = pd.DataFrame(CELLS, columns=[column.header for column in COLUMNS], dtype=object)
TABLE = Table("one", "One", "A table.", COLUMNS, FRAME, ranked=2)


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
    shown = [[f"{cell.value} {cell.interval} {cell.note}".split() for cell in row] for row in TABLE.grid]
    assert shown[0] == [["a|b", "<i>"], ["1.235", "[1.000,", "2.000]"], ["+0.2500", "tied"], ["12,345"]]
    assert shown[1] == [["c"], ["100.0"], ["-1.00e-07"], ["0"]]
    assert shown[2] == [["d"], [], [], []]


def test_markdown_marks_the_best_and_cannot_be_broken_by_a_name():
    lines = TABLE.to_markdown().splitlines()
    assert lines[2] == "| a\\|b \\<i\\> | **1.235** \\[1.000, 2.000\\] | +0.2500 tied | 12,345 |"
    assert markdown("![x](y)\n# z") == "\\!\\[x\\](y) \\# z"


def test_rows_are_sorted_by_numbers_and_only_ranked_ones_are_marked():
    assert [[cell.key for cell in row] for row in TABLE.grid][:2] == [
        ["", "1.23456", "0.25", ""],  # in ms
        ["", "100", "-1e-07", ""],
    ]
    assert [cell.key for cell in TABLE.grid[2]] == ["", "", "", ""]
    assert [[cell.best for cell in row] for row in TABLE.grid] == [
        [False, True, False, False],
        [False] * 4,
        [False] * 4,
    ]
    alone = Table("one", "One", "", COLUMNS, FRAME, ranked=1)
    assert not any(cell.best for row in alone.grid for cell in row), "one row is not marked"

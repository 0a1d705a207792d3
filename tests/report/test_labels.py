"""What is compared under which name and in which colour; what a reader is warned of."""

from typing import Any

import pytest
from written_rows import Bench, about, certificate, cost, text

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.report import verdict, warnings
from bsbr_pl.report.budgets import sentence
from bsbr_pl.report.labels import kind, look, styles
from bsbr_pl.report.rows import Checkpoint
from bsbr_pl.report.sources import marks
from bsbr_pl.report.studies import Findings

AVERAGING = "trainer.weight_averaging"


def measured(*ones: dict[str, Any]) -> Bench:
    bench = Bench()
    for i, one in enumerate(ones):
        bench.add(one, "certificate", certificate())
        bench.add(one, "text", text(1.5 + i / 10), length=256)
    return bench


def names(*ones: dict[str, Any]) -> list[str]:
    found = Findings(measured(*ones).rows)
    return [found.labels[one["checkpoint"]["digest"]] for one in ones]


def test_seeds_share_a_name():
    """Also if older rows lack what newer ones say."""
    ones = [about("bsbr", 0), about("bsbr", 1), about("bsbr", 2, **{f"config__{AVERAGING}": None})]
    assert names(*ones) == ["bsbr(chunk_size=8)"] * 3


@pytest.mark.parametrize(
    ("one", "another", "words"),
    [
        ({"config__data.batch_size": 8}, {"config__data.batch_size": 4}, ("batch_size=8", "batch_size=4")),
        ({"config__trainer.precision": "32"}, {"config__trainer.precision": "16"}, ("precision=32", "precision=16")),
        ({"config__initial_weights": None}, {"config__initial_weights": "gpt2"}, ("initial_weights=None",
                                                                                   "initial_weights=gpt2")),
        ({}, {f"config__{AVERAGING}": "EMA"}, ("weight_averaging=None", "weight_averaging=EMA")),
        ({"path": "a/best.ckpt"}, {"path": "a/last.ckpt"}, ("checkpoint=best", "checkpoint=last")),
        ({"run__steps": 200}, {"run__steps": 100}, ("200 steps", "100 steps")),
    ],
)  # fmt: skip
def test_what_differs_is_in_the_names_of_all_on_the_same_data(one, another, words):
    found = names(about("linear", 0, **one), about("linear", 1, **another), about("standard", 2, **one))
    expected = [f"linear(chunk_size=8) [{words[0]}]", f"linear(chunk_size=8) [{words[1]}]", f"standard [{words[0]}]"]
    assert found == expected


def test_arguments_of_the_model_are_named_within_an_architecture_alone():
    rate = "config__model.learning_rate"
    found = names(about("linear", 0), about("linear", 1, **{rate: 0.02}), about("standard", 2, **{rate: 0.03}))
    assert found == [
        "linear(chunk_size=8) [learning_rate=0.01]",
        "linear(chunk_size=8) [learning_rate=0.02]",
        "standard",
    ]


def test_hybrids_and_classes_of_one_name_are_not_seeds_of_each_other():
    layers = "config__model.attention"
    ones = [about("linear", seed, **{layers: names}) for seed, names in enumerate((["a.Mixer"], ["b.Mixer"]))]
    assert names(*ones) == [f"linear(chunk_size=8) [attention=['{package}.Mixer']]" for package in "ab"]


def test_other_data_is_no_reason_for_a_longer_name():
    other = about("linear", 1, **{"config__data.batch_size": 4, "data__fingerprint": "e" * 32})
    assert names(about("linear", 0), other) == ["linear(chunk_size=8)"] * 2


def test_unfinished_runs_are_no_seeds_of_any_other():
    stopped = {"run__finished": False, "run__steps": 50}
    ones = [about("linear", 0), about("linear", 1, **stopped), about("linear", 2, **stopped)]
    ones.append(about("linear", 2, "copy/last.ckpt", **stopped))
    words = "linear(chunk_size=8) [stopped at 50 of 200 steps, seed="
    assert names(*ones) == ["linear(chunk_size=8) [200 steps]", f"{words}1]", f"{words}2] (2)", f"{words}2]"]
    bench = measured(*ones)
    unequal, unfinished = warnings(bench.rows)
    given = "linear(chunk_size=8) 200 steps, linear(chunk_size=8) stopped at 50 of 200 steps."
    assert unequal == f"These have unequal budgets, so the ranking does not compare architectures: {given}"
    assert unfinished.startswith("These runs did not finish, and are not averaged with others: ")
    assert "runs/linear_1 (stopped at 50 of 200 steps)" in unfinished
    assert len(marks(Findings(bench.rows))) == 3
    groups = [group for study in Findings(bench.rows).studies for group in study.groups]
    assert [len(group.members) for group in groups] == [1, 1, 1, 1]


def test_runs_of_other_budgets_are_never_ranked_together():
    findings = Findings(measured(about("linear", 0), about("standard", 1, run__steps=100)).rows)
    assert [study.name for study in findings.studies] == ["E1_D1_val_B1", "E1_D1_val_B2"]
    assert [len(study.ranked) for study in findings.studies] == [1, 1]
    words = [verdict.summary(study) for study in findings.studies]
    given = "linear(chunk_size=8) 200 steps, standard 100 steps. The only one with this budget: "
    assert all(given in said and "tied" not in said for said in words)
    shown = verdict.ranking(findings.studies[1])
    assert shown.caption.startswith("These runs have equal budgets and contexts. Other runs are in other tables. ")


def test_texts_that_were_read_in_other_contexts_are_never_ranked_together():
    """Each at the only length that was measured: four times the training length of one."""
    bench = Bench()
    for name, length, bits in (("linear", 1024, 1.4), ("standard", 256, 1.5), ("gau", 256, 1.6)):
        one = about(name)
        bench.add(one, "certificate", certificate())
        bench.add(one, "text", text(bits), length=length)
    bench.add(about("hopfield"), "certificate", certificate(False))
    findings = Findings(bench.rows)
    ranked = [[group.label.partition("(")[0] for group in study.ranked] for study in findings.studies]
    assert sorted(ranked) == [["linear"], ["standard", "gau"]]
    assert {study.title.rpartition(", ")[2] for study in findings.studies} == {
        "read in contexts of 1,024 tokens",
        "read in contexts of 256 tokens",
    }
    (warned,) = warnings(bench.rows)
    assert warned.startswith("These were read in contexts of unequal length, so the ranking does not compare")
    assert "linear(chunk_size=8) 200 steps read in contexts of 1024" in warned


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run__batch": 4}, "linear(chunk_size=8) 200 steps of 8 windows, standard 200 steps of 4 windows."),
        ({"run__batch": None}, "200 steps of 8 windows, standard 200 steps of batches not recorded."),
        ({"run__tokens": 1024}, "200 steps of 409,600 tokens, standard 200 steps of 1,024 tokens."),
        ({"run__initial_weights": "gpt2"}, "200 steps from its own start, standard 200 steps from gpt2."),
    ],
)
def test_whatever_makes_budgets_unequal_is_said(change, words):
    unequal = warnings(measured(about("linear", 0), about("standard", 1, **change)).rows)[0]
    assert unequal.endswith(words)


def test_other_data_is_ranked_apart_and_said():
    (apart,) = warnings(measured(about("linear", 0), about("linear", 1, data__fingerprint="e" * 32)).rows)
    assert apart == (
        "Runs with different data or tokenizers are ranked separately: "
        "data TextData texts D1, tokenizer bytes; data TextData texts D2, tokenizer bytes."
    )


def test_a_changed_run_is_named_and_no_more_than_five_are_listed():
    ones = [about("linear", seed, run__changes=["rate changed"], run__marks=["rate changed"]) for seed in range(7)]
    (changed,) = warnings(measured(*ones).rows)
    assert changed.startswith("Arguments were changed during these runs: linear_0 (rate changed), ")
    assert changed.endswith("linear_4 (rate changed), and 2 more: see Problems.")


def test_a_budget_in_words():
    study, *_ = Findings(measured(about("linear", 0, run__flops=2e9), about("standard", 1)).rows).studies
    assert sentence(study) == (
        "Equal budgets: 200 optimiser steps of 8 windows; 409,600 training tokens; 1.00e9 (standard) to 2.00e9 "
        "(linear(chunk_size=8)) training FLOPs, counted as 3 forward passes; "
        "data TextData texts D1, tokenizer bytes."
    )
    early = about("linear", 0, run__ended_by="EarlyStopping", run__flops=None)
    (study,) = Findings(measured(early).rows).studies
    assert "training FLOPs not counted; linear(chunk_size=8) ended by EarlyStopping; data" in sentence(study)


def test_architectures_drawn_together_look_different_and_any_key_gets_a_look():
    drawn = styles(ARCHITECTURES)
    assert len({(look["color"], look["linestyle"]) for look in drawn.values()}) == len(ARCHITECTURES)
    assert look("mine") == look("mine(width=3) [seed=1]")
    assert kind("delta_net + sliding_window(window_size=64)") == "delta_net"
    assert kind("3x delta_net(conv_size=1) + standard [400 steps]") == "delta_net"


def test_a_label_looks_the_same_whatever_stands_beside_it_unless_colours_meet():
    alone, beside = styles(["bsbr(chunk_size=8)"]), styles(["bsbr(chunk_size=8)", "standard"])
    assert alone["bsbr(chunk_size=8)"] == beside["bsbr(chunk_size=8)"]
    many = styles([f"bsbr(chunk_size={n})" for n in range(9)])
    assert len({(look["color"], look["linestyle"]) for look in many.values()}) == 9
    assert len({(look["color"], look["fillstyle"]) for look in many.values()}) == 9, "points have no lines"


def test_costs_alone_make_a_report_without_a_verdict():
    bench = Bench()
    bench.add(about("linear"), "cost", cost(256), length=256, rounds=5)
    assert Findings(bench.rows).studies == []
    assert warnings(bench.rows) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "8 windows"),  # 200 steps of 8 windows of 256 tokens
        ({"run__tokens": 409599}, "at most 8 windows"),  # an epoch ended with a short step
        ({"run__tokens": 1000, "data__train_lengths": {"128": 1, "256": 1}}, "8 windows"),  # of several lengths
        ({"run__tokens": None}, "8 windows"),
        ({"run__batch": None}, None),
    ],
)
def test_windows_of_a_step_are_those_that_were_taken(changes, words):
    assert Checkpoint("0", about(**changes)).windows == words

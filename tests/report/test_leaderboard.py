"""The leaderboard, against means by hand; and the maps of needles by depth and length."""

import io
import itertools
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from PIL import Image
from written_rows import Bench, about, certificate, recall, training

from bsbr_pl.report import contents, leaderboard, study, verdict, write_report
from bsbr_pl.report.studies import Findings
from bsbr_pl.results import check

RESULTS = Path(__file__).parents[2] / "results"
LATE = {"val": 0.2, "test": 0.25, "learned": False}


def published(*tasks: str) -> list[dict[str, Any]]:
    paths = [RESULTS / task / "results.jsonl" for task in tasks]
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def study_run(bench: Bench, task: str, model: str, seed: int, right: float, rate: float = 0.01, **more: Any) -> None:
    study = {"task": task, "model": model, "phase": "final", "rate": rate}
    data = {"class": "MQARData", "kind": "recall", "fingerprint": f"{seed}" * 32, "arguments": {"seed": seed}}
    changes = {"data": data, "study": study, "config": {}} | more.pop("about", {})
    one = about(model, seed, more.pop("path", f"{task}/{model}/{rate}_{seed}"), **changes)
    accuracies = {"val/accuracy_T64": {"step": [199], "value": [right]}}
    bench.add(one, "training", training() | {"metrics": accuracies} | more)


def board(rows: list[dict[str, Any]]) -> Any:
    """The cells of the leaderboard by model and header."""
    matrix, listed = leaderboard.tables(Findings(rows))
    assert matrix
    assert listed
    return matrix.frame.set_index("model")


def test_cells_are_means_over_the_seeds_of_published_runs():
    rows = published("longer", "induction", "mqar_state")
    cells = board(rows)
    assert list(cells) == ["induction (%)", "longer, val (bits per byte)", "mqar_state, val (%)"]
    for header, metric in {"longer, val (bits per byte)": "val/bits_per_byte", "induction (%)": None}.items():
        task = header.split(" ")[0].removesuffix(",")
        by_hand: dict[str, list[float]] = {}
        for row in rows:
            run = row["about"]["study"]
            if row["identity"]["kind"] == "training" and (run["task"], run["phase"]) == (task, "final"):
                metrics, result = row["values"]["metrics"], row["values"].get("result", {})
                names = [metric] if metric else [name for name in metrics if name.startswith("val/accuracy_")]
                validation = fmean(metrics[name]["value"][-1] for name in names)
                by_hand.setdefault(run["model"], []).append(result.get("test", validation))
        assert set(cells[header].dropna().index) == set(by_hand)
        for model, values in by_hand.items():
            cell = cells[header][model]
            assert cell.value == pytest.approx(fmean(values), abs=1e-12)
            assert [cell.low, cell.high] == [min(values), max(values)]
            assert len(cell.runs) == len(values)
    assert cells["mqar_state, val (%)"]["standard"].note == "1 seed"
    assert cells["mqar_state, val (%)"]["gated_delta_net"] is None


@pytest.mark.parametrize(("task", "split"), [("induction", "test"), ("mqar_state", "validation")])
def test_the_table_of_a_study_says_of_which_split_it_is(task, split):
    """By an independent count: accuracies of `standard`, and of its segments, which only the validation measures."""
    rows = published(task)
    (made,) = study.tables(rows)
    words = {
        "test": "of the test split; validation, and each segment at the end, of the last validation",
        "validation": "of the last validation",
    }
    assert made.caption.startswith(f"The runs that count: means over seeds, {words[split]}. tokens/s: the median.")
    own = [row["values"] for row in rows if row["about"].get("study", {}).get("model") == "standard"]
    own = [values for values in own if values.get("result") or split == "validation"]
    shown = made.frame.set_index("model").loc["standard"]
    segments = {name: of for name, of in own[0]["metrics"].items() if name.startswith("val/accuracy_")}
    by_split = {
        "test": fmean(values.get("result", {}).get("test", 0) for values in own),
        "validation": fmean(of["value"][-1] for of in segments.values()),
    }
    assert shown["accuracy"] == f"{by_split[split]:.3f}"
    for name in segments:
        mean = fmean(values["metrics"][name]["value"][-1] for values in own)
        assert shown[name.removeprefix("val/accuracy_").replace("_N", ", N")] == f"{mean:.2f}"


def test_a_run_that_does_not_count_is_in_no_mean_of_its_line():
    """Neither its accuracy nor its validation; and the row of its certificate is no run."""
    bench = Bench()
    for seed, passed in enumerate((False, True, True)):
        result = {"val": 0.8 * passed, "test": 0.9 * passed, "flops_per_token": 7.0}
        study_run(bench, "copy", "bsbr", seed, 0.8 * passed, result=result)
        bench.add(bench.rows[-1]["about"], "certificate", certificate(passed))
    (made,) = study.tables(bench.rows)
    (shown,) = made.frame.to_dict("records")
    assert {name: shown[name] for name in ("accuracy", "validation", "FLOPs/token", "note")} == {
        "accuracy": "0.900",
        "validation": "0.800",
        "FLOPs/token": "7",
        "note": "certificate failed: 1 of 3 seeds",
    }


def test_one_task_has_no_leaderboard():
    assert leaderboard.tables(Findings(published("induction"))) == []
    assert "Leaderboard" not in contents(Findings(published("induction")))


def test_rates_are_chosen_on_validation_and_leaking_models_left_out():
    """Never on the test split, which the cells show."""
    bench = Bench()
    for rate, val, test in ((0.01, 0.6, 0.7), (0.02, 0.5, 0.9)):
        for task in ("copy", "other"):
            study_run(bench, task, "bsbr", 1, val, rate=rate, result={"val": val, "test": test})
    for name, result in (("gau", {"val": 0.4, "test": 0.4}), ("linear", {"val": 1.0})):
        study_run(bench, "copy", name, 1, result["val"], result=result)
        bench.add(bench.rows[-1]["about"], "certificate", certificate(name == "gau"))
    cells = board(bench.rows)
    assert {name: cell.value for name, cell in cells["copy (%)"].items()} == {"bsbr": 0.7, "gau": 0.4}


def test_the_best_learning_rate_counts_and_budgets_have_columns_of_their_own():
    bench = Bench()
    for seed, (low, high) in enumerate([(0.5, 0.9), (0.7, 0.3)]):
        study_run(bench, "copy", "bsbr", seed, low, rate=0.01)  # the better mean
        study_run(bench, "copy", "bsbr", seed, high - 0.1, rate=0.02)
    study_run(bench, "copy", "gau", 0, 1.0, rate=0.01)
    study_run(bench, "copy", "gau", 0, 1.0, rate=0.02)  # tied: the smaller rate is shown
    longer = {"run__steps": 400, "run__planned_steps": 400}
    study_run(bench, "copy", "bsbr", 2, 0.95, about=longer)
    study_run(bench, "copy", "linear", 2, 0.2, about=longer)
    cells = board(bench.rows)
    assert list(cells) == ["copy, val, 200 steps (%)", "copy, val, 400 steps (%)"]
    assert cells["copy, val, 200 steps (%)"]["bsbr"].value == pytest.approx(0.6)
    assert cells["copy, val, 200 steps (%)"]["bsbr"].runs == (
        "seed 0: 50.0, rate 0.01, 200 steps",
        "seed 1: 70.0, rate 0.01, 200 steps",
    )
    assert cells["copy, val, 400 steps (%)"]["bsbr"].value == 0.95
    assert cells["copy, val, 200 steps (%)"]["gau"].runs == ("seed 0: 100.0, rate 0.01, 200 steps",)
    assert list(cells.index) == ["gau", "bsbr", "linear"]


def test_other_lengths_and_batches_have_columns_of_their_own_and_other_seeds_do_not():
    bench = Bench()
    for seed, (length, batch) in enumerate([(64, 8), (64, 8), (128, 8), (64, 16)]):
        data = {"class": "MQARData", "kind": "recall", "fingerprint": f"{seed}" * 32}
        data |= {"arguments": {"seed": seed, "context_length": length, "num_workers": seed}}
        study_run(bench, "recall", "bsbr", seed, 0.5, about={"data": data, "run__batch": batch})
    cells = board(bench.rows)
    number = {header: len(cells[header]["bsbr"].runs) for header in cells}
    assert number == {"recall, val (%)": 2, "recall, val (2) (%)": 1, "recall, val (3) (%)": 1}


def test_the_test_split_counts_and_says_what_is_not_learned(tmp_path):
    bench = Bench()
    for task in ("copy", "recall"):
        for seed in (0, 1):
            study_run(bench, task, "bsbr", seed, 0.9, result={"val": 0.9, "test": 0.8 + seed / 10, "learned": True})
            study_run(bench, task, "linear", seed, 0.2, result=LATE)
        study_run(bench, task, "standard", 0, 0.3, result=LATE)
        study_run(bench, task, "standard", 1, 0.3, result=LATE | {"learned": True})
    cells = board(bench.rows)
    assert cells["copy (%)"]["bsbr"].value == pytest.approx(0.85)
    notes = {model: cells["copy (%)"][model].note for model in cells.index}
    assert notes == {"bsbr": "", "linear": "not learned yet", "standard": "1 of 2 not learned yet"}
    page = write_report(bench.rows, tmp_path).read_text()
    assert page.count('class="unlearned"') == 2
    runs = "<small>seed 0: 80.0, rate 0.01, 200 steps</small>"
    assert f'<details class="runs"><summary><strong>85.0</strong></summary>{runs}' in page
    assert '<details class="part" open><summary><h2>Leaderboard</h2>' in page
    listed = (tmp_path / "tables" / "runs.csv").read_text().splitlines()
    assert len(listed) == 1 + 2 * 6
    assert "copy,linear,1,test,200 steps,0.01,25.0,not learned yet,copy/linear/0.01_1" in listed


def test_the_verdict_says_who_has_not_learned_the_task():
    """No run of `linear`; one of two of `standard`; no row says it of `gau`."""
    bench = Bench()
    for name, known in {"bsbr": (True, True), "linear": (False, False), "standard": (False, True), "gau": ()}.items():
        for seed in (0, 1):
            study_run(bench, "copy", name, seed, 0.5, result={"val": 0.5, "test": 0.5})
            if known:
                bench.rows[-1]["values"]["result"]["learned"] = known[seed]
            one = bench.rows[-1]["about"]
            bench.add(one, "certificate", certificate())
            bench.add(one, "recall", recall(0.5))
    findings = Findings(bench.rows)
    (found,) = findings.studies
    words = "Not learned yet, no better than the plateau of the task: linear(chunk_size=8)."
    assert verdict.unlearned(found, findings) == words
    texts = [part.text for part in contents(findings)["Verdict"] if getattr(part, "kind", "") == "verdict"]
    assert [text.endswith(words) for text in texts] == [True]


def test_models_of_other_sizes_have_rows_of_their_own():
    """Each with its own best rate; neither is averaged with the other nor takes the place of its seeds."""
    bench = Bench()
    for task in ("copy", "other"):
        for width, seeds, right in ((16, (1, 2), 0.5), (32, (2, 3), 0.9)):
            for rate, seed in itertools.product((0.01, 0.02), seeds):
                config = {"model.hidden_dim": width, "model.learning_rate": rate}
                path = f"{task}/{width}/{rate}_{seed}"
                study_run(bench, task, "bsbr", seed, right - rate, rate=rate, path=path, about={"config": config})
        study_run(bench, task, "gau", 1, 0.7, about={"config": {"model.hidden_dim": 16}})
    cells = board(bench.rows)["copy, val (%)"]
    found = {model: (round(cell.value, 3), len(cell.runs)) for model, cell in cells.items()}
    assert found == {"bsbr [hidden_dim=32]": (0.89, 2), "gau": (0.7, 1), "bsbr [hidden_dim=16]": (0.49, 2)}


def test_models_whose_seeds_overlap_with_the_best_are_marked_with_it():
    bench = Bench()
    for task in ("copy", "recall"):
        for model, values in {"bsbr": (0.7, 0.9), "linear": (0.6, 0.75), "gau": (0.5, 0.69)}.items():
            for seed, right in enumerate(values):
                study_run(bench, task, model, seed, right)
    matrix, _ = leaderboard.tables(Findings(bench.rows))
    assert {row[0].value: row[1].best for row in matrix.grid} == {"bsbr": True, "linear": True, "gau": False}


def test_evaluated_runs_outside_of_a_study_stand_in_it_too_seeds_in_one_cell():
    bench = Bench()
    for seed in (0, 1):
        task = {"class": "InductionData", "kind": "recall", "fingerprint": f"{seed}" * 32, "arguments": {"seed": seed}}
        one = about("linear", seed, data=task)
        bench.add(one, "certificate", certificate())
        bench.add(one, "recall", recall(0.6 + seed / 5))
        bench.measured(about("linear", seed, f"runs/text_{seed}/last.ckpt"), 1.5 + seed / 10)
        bench.measured(about("gau", seed, f"runs/text_gau_{seed}/last.ckpt"), 2.5 + seed / 10)
    matrix, listed = leaderboard.tables(Findings(bench.rows))
    assert {row[0].value: row[2].best for row in matrix.grid} == {
        "linear(chunk_size=8)": True,
        "gau(chunk_size=8)": False,
    }
    text_runs = listed.frame["task"] == "TextData texts, val"
    assert text_runs.tolist() == listed.frame["bits per byte"].notna().tolist()
    assert text_runs.tolist() == listed.frame["accuracy (%)"].isna().tolist()
    cells = matrix.frame.set_index("model")
    assert list(cells) == ["InductionData, val (%)", "TextData texts, val (bits per byte)"]
    induction, text = cells.loc["linear(chunk_size=8)"]
    assert (induction.value, len(induction.runs)) == (pytest.approx(0.7), 2)
    assert (text.value, len(text.runs)) == (pytest.approx(1.55), 2)


def needles(name: str, seed: int, accuracies: dict[str, float]) -> tuple[dict[str, Any], dict[str, Any]]:
    task = {"class": "NeedleData", "kind": "recall", "fingerprint": f"{seed}" * 32, "arguments": {"seed": seed}}
    slices = [{"slice": one, "length": int(one.split("_")[0][1:]), "accuracy": right, "interval": [right, right]}
              for one, right in accuracies.items()]  # fmt: skip
    return about(name, seed, data=task), recall(0.5) | {"slices": slices}


def test_maps_of_needles_have_a_cell_for_each_depth_and_length(tmp_path):
    bench = Bench()
    given = {"T256_N1_d0": 0.9, "T256_N1_d0.5": 0.8, "T1024_N1_d0": 0.4, "T256_N8_d1": 0.5, "T256_N8": 0.6}
    for name in ("bsbr", "linear"):
        for seed in (0, 1):
            one, values = needles(name, seed, {at: right * (1 - 0.1 * seed) for at, right in given.items()})
            bench.add(one, "certificate", certificate())
            bench.add(one, "recall", values, split="test")
    for row in bench.rows:
        check(row)
    single, eight = leaderboard.needle_maps(Findings(bench.rows))
    assert "needles in a context: 1" in single.title
    assert "needles in a context: 8" in eight.title
    assert single.figure
    first, second, hidden = single.figure.axes
    assert (first.get_title(), second.get_title()) == ("bsbr(chunk_size=8)", "linear(chunk_size=8)")
    assert not hidden.get_visible()
    shown = first.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(shown, [[0.855, 0.38], [0.76, np.nan]])
    assert first.images[0].get_clim() == (0, 1), "the same colours in all maps"
    assert [text.get_text() for text in first.texts] == ["86", "38", "76", ""]
    assert [label.get_text() for label in first.get_xticklabels()] == ["256", "1k"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0", "0.5"]
    write_report(bench.rows, tmp_path)
    with Image.open(io.BytesIO((tmp_path / "plots" / "needle_1.png").read_bytes())) as seen:
        assert seen.width == 806
    assert f'src="{single.other}"' in (tmp_path / "report.html").read_text()


def test_a_task_that_was_not_run_counts_as_the_middle():
    bench = Bench()
    for model, right in {"gau": 0.9, "bsbr": 0.8, "linear": 0.2, "standard": 0.1}.items():
        study_run(bench, "copy", model, 0, right)
    for i, model in enumerate(["bsbr", "linear", "standard", *(f"other{i}" for i in range(5))]):
        study_run(bench, "recall", model, 0, 0.9 - i / 10)
    order = list(board(bench.rows).index)
    # bsbr: (1.5/4 + 0.5/8) / 2 = 0.22; gau: (0.5/4 + 1/2) / 2 = 0.31, and 0.125 if the other task did not count.
    assert order[:2] == ["bsbr", "gau"]


def test_a_model_alone_in_a_column_is_in_its_middle():
    """Nobody is better there, so `standard` is not behind `linear`, which was not run."""
    bench = Bench()
    for model, right in {"bsbr": 1.0, "standard": 0.12, "linear": 0.03}.items():
        study_run(bench, "copy", model, 0, right)
    study_run(bench, "recall", "standard", 0, 1.0)
    assert list(board(bench.rows).index) == ["bsbr", "standard", "linear"]


def test_unfinished_runs_are_left_out_and_another_text_has_a_column_of_its_own():
    bench = Bench()
    for seed, text in enumerate("aab"):
        bench.measured(about("linear", seed, f"runs/{seed}/last.ckpt", data__fingerprint=32 * text), 1.5 + seed / 10)
    bench.measured(about("linear", 3, "runs/3/last.ckpt", run__finished=False, run__steps=50), 1.2)
    cells = board(bench.rows)
    assert {header: len(cells[header].iloc[0].runs) for header in cells} == {
        "TextData texts, val (bits per byte)": 2,
        "TextData texts, val (2) (bits per byte)": 1,
    }
    assert list(cells.index) == ["linear(chunk_size=8)"]

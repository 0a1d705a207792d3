"""Numbers and sentences of the report against values that are computed by hand here."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from written_rows import CPU, Bench, about, certificate, cost, picture, recall, text, training

from bsbr_pl.__main__ import main
from bsbr_pl.report import clocks, latex, sources, verdict, write_latex, write_report
from bsbr_pl.report.rows import shared_ends
from bsbr_pl.report.studies import Findings, Study
from bsbr_pl.report.tables import Measured


def study(bench: Bench) -> Study:
    (found,) = Findings(bench.rows).studies
    return found


def of(*ones: tuple[dict[str, Any], float], **more: Any) -> Bench:
    bench = Bench()
    for one, bits in ones:
        bench.measured(one, bits, **more)
    return bench


def asked(name: str, right: float, seed: int = 0, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    one = about(name, seed, data__kind="recall", data__class="MQARData", data__validation_length=None, **changes)
    return one, recall(right)


def test_only_certified_groups_are_ranked():
    bench = of((about("standard"), 1.5))
    bench.add(about("linear"), "text", text(0.5), length=256)  # no certificate
    found = study(bench)
    assert [group.label for group in found.ranked] == ["standard"]
    assert verdict.summary(found) == "The only one: standard, 1.500 bits per byte."


def test_a_mean_needs_a_value_of_every_seed():
    bench = of((about("standard", 0), 1.5), (about("linear", 0), 1.2))
    bench.measured(about("linear", 1), 1.4, bits_per_byte=None)
    found = study(bench)
    assert [group.label for group in found.ranked] == ["standard"]
    assert found.groups[1].quality("bits_per_byte") is None
    assert found.groups[1].quality("accuracy") == Measured(0.5, 0.5, 0.5)


def test_units_of_memory_and_time_are_decimal(tmp_path):
    bench = of((about("standard"), 1.5))
    bench.add(about("standard"), "cost", cost(1024) | {"state_bytes": 3 * 10**6}, length=1024, rounds=5)
    write_report(bench.rows, tmp_path)
    (row,) = csv.DictReader((tmp_path / "tables" / "first_E1_D1_val.csv").read_text().splitlines())
    assert float(row["decode state at 1,024 (MB)"]) == 3.0
    (row,) = csv.DictReader((tmp_path / "tables" / "cost_decode_E1.csv").read_text().splitlines())
    assert float(row["1,024 tokens (ms)"]) == pytest.approx(1e-6 * 1.04 * 1000)  # the third of five samples


def test_the_four_clocks_of_a_run_of_two_processes():
    """200 steps of 2 processes, 8 windows of 256 tokens each: 4,096 tokens a step; 1e9 FLOPs a step."""
    bench, one = Bench(), about("standard", run__tokens=2 * 8 * 256 * 200)
    bench.add(one, "training", training())
    (checkpoint,) = Findings(bench.rows).checkpoints.values()
    found = clocks.clock_values(checkpoint, bench.rows[0])
    assert list(found["steps"]) == [100, 200]  # Lightning logs 99 and 199
    assert list(found["tokens"]) == [409_600, 819_200]
    assert list(found["training FLOPs"]) == [1e11, 2e11]
    assert list(found["measured seconds"]) == [5.0, 10.0]


@pytest.mark.parametrize(("is_recall", "front"), [(True, ["a", "b"]), (False, ["b", "c"])])
def test_the_front_prefers_high_accuracy_and_low_bits(is_recall, front):
    bench = Bench()
    for name, quality, seconds in (("a", 0.9, 2.0), ("b", 0.4, 1.0), ("c", 0.3, 3.0)):
        one, values = asked(name, quality) if is_recall else (about(name), text(quality))
        bench.add(one, "certificate", certificate())
        bench.add(one, *(("recall", values) if is_recall else ("text", values)), **{} if is_recall else {"length": 256})
        training = {"seconds": seconds, "interval": [0.9 * seconds, seconds], "samples": [seconds]}
        times = cost(256) | {"training": training}
        bench.add(one, "cost", times, length=256, rounds=5)
    found = study(bench)
    assert sorted(verdict._on_front(found)) == front
    drawn = verdict.picture(found)
    assert drawn is not None
    assert drawn.title == f"{'Accuracy' if is_recall else 'Bits per byte'} and training time"
    dashed, upright, level, *_ = drawn.figure.axes[0].lines
    milliseconds = {"a": 2000.0, "b": 1000.0, "c": 3000.0}
    assert sorted(dashed.get_xdata()) == sorted(milliseconds[name] for name in front)
    best = milliseconds["a" if is_recall else "c"]  # drawn first, with the intervals of its quality and its time
    assert list(upright.get_xdata()) == [best, best]
    assert list(level.get_xdata()) == pytest.approx([0.9 * best, best])
    words = verdict.background(found)
    assert "Quickest training pass at 256 tokens: b, 1.000\u00a0s." in words


def test_all_that_are_equally_good_are_called_best():
    bench = Bench()
    for name, right in (("a", 1.0), ("b", 1.0), ("c", 0.5)):
        one, values = asked(name, right)
        bench.add(one, "certificate", certificate())
        bench.add(one, "recall", values)
    words = verdict.summary(study(bench))
    assert words.startswith("Best: a, b, each 100.0 % right; one seed cannot tell whether another is tied with them.")


def test_the_seeds_of_a_recall_task_are_averaged_though_their_samples_differ():
    """Not if the same seed gave two sets of samples: then the task itself has changed."""
    bench = Bench()
    for name, base in (("a", 0.9), ("b", 0.5)):
        for seed in range(3):
            samples = {"data__fingerprint": f"{seed}" * 32, "data__arguments": {"num_pairs": 8, "seed": seed}}
            one, values = asked(name, base + 0.01 * seed, seed, **samples)
            bench.add(one, "certificate", certificate())
            bench.add(one, "recall", values)
    findings = Findings(bench.rows)
    (one,) = findings.studies
    assert [(group.label, len(group.members)) for group in one.ranked] == [("a", 3), ("b", 3)]
    assert verdict.summary(one).startswith("Best: a, 91.00 % right; none is tied with it.")
    (shown,) = sources.data_sets(findings).frame["fingerprint"]
    assert shown == f"{'0' * 32} and of 2 other seeds"
    other = {"data__fingerprint": "e" * 32, "data__arguments": {"num_pairs": 8, "seed": 0}}
    one, values = asked("a", 0.7, 7, **other)
    bench.add(one, "recall", values)
    assert len(Findings(bench.rows).studies) == 4


def test_a_circle_is_where_its_number_belongs():
    """Two points, so that the axes are known: the better one is lower, the costlier one is on the right."""
    bench = of((about("standard", run__flops=2e9), 1.5), (about("linear", run__flops=1e9), 1.7))
    drawn = verdict.picture(study(bench))
    assert drawn is not None
    assert drawn.name == "pareto_flops_E1_D1_val"
    found = re.findall(r'points="([\d.]+),([\d.]+) [^"]*"[^>]*data-hover="([^"]*)"', drawn.content.decode())
    places = {words.split(":")[0]: (float(x), float(y)) for x, y, words in found}
    assert places["2"][0] > places["1"][0]
    assert places["2"][1] > places["1"][1], "y grows downwards"
    assert sorted(words for *_, words in found) == ["1: 1.700 [1.690, 1.710]", "2: 1.500 [1.490, 1.510]"]


def first_rows(bench: Bench, tmp_path: Path) -> list[dict[str, str]]:
    write_report(bench.rows, tmp_path)
    return list(csv.DictReader((tmp_path / "tables" / "first_E1_D1_val.csv").read_text().splitlines()))


def test_compressors_stand_between_the_models_and_a_worse_model_is_named(tmp_path):
    both = {"xz -9": 1.55, "gzip -9": 1.9}
    bench = of((about("standard"), 1.5), (about("linear"), 1.6), (about("gau"), 2.0), compressed=both)
    names = [row["architecture"] for row in first_rows(bench, tmp_path)]
    assert [name.split("(")[0].strip() for name in names] == ["standard", "xz -9", "linear", "gzip -9", "gau"]
    words = verdict.summary(study(bench))
    assert "Worse than xz -9 (1.550): linear(chunk_size=8), gau(chunk_size=8)." in words
    assert "Worse than gzip -9 (1.900): gau(chunk_size=8)." in words
    worse = of((about("standard"), 1.6), (about("linear"), 1.7), compressed=both)
    assert "Worse than xz -9 (1.550): every model." in verdict.summary(study(worse))
    better = of((about("standard"), 1.5), compressed=both)
    assert verdict.summary(study(better)).endswith("No model is worse than xz -9 (1.550) or gzip -9 (1.900).")


def test_unequal_parameters_and_convolutions_are_said():
    ones = [about("standard", parameters=1000, conv_size=[1, 1]), about("linear", parameters=1011, conv_size=[4, 4])]
    words = verdict.summary(study(of((ones[0], 1.5), (ones[1], 1.6))))
    assert "Unequal parameters: from 1,000 (standard) to 1,011 (linear(chunk_size=8))." in words
    assert "Unequal convolutions: standard without a short convolution, linear(chunk_size=8) with one." in words
    alike = [about("standard", parameters=1000), about("linear", parameters=1010, conv_size=[4, 4])]
    assert "Unequal" not in verdict.summary(study(of((alike[0], 1.5), (alike[1], 1.6))))


def test_unequal_convolutions_of_many_models_are_said_in_a_line():
    having = [about(name, conv_size=[4]) for name in ("bsbr", "gau", "linear", "mamba2")]
    lacking = [about(name, conv_size=[1]) for name in ("standard", "fox")]
    words = verdict.summary(study(of(*((one, 1.5) for one in having + lacking))))
    assert "Unequal convolutions: fox, standard without a short convolution, 4 others with one." in words
    words = verdict.summary(study(of((having[3], 1.5), *((one | {"conv_size": [1]}, 1.6) for one in having[:3]))))
    assert "Unequal convolutions: mamba2 with a short convolution, 3 others without." in words


def test_a_column_has_one_kind_of_interval(tmp_path):
    seeds = of((about("standard", 0), 1.5), (about("standard", 1), 1.6), (about("linear", 0), 1.9))
    rows = first_rows(seeds, tmp_path / "several")
    assert [row["bits per byte, low"] for row in rows] == [str(text(1.5)["bits_per_byte"]), ""]
    assert "[least to largest seed]" in (tmp_path / "several" / "report.html").read_text()
    single = first_rows(of((about("standard", 0), 1.5), (about("linear", 0), 1.9)), tmp_path / "single")
    assert [float(row["bits per byte, low"]) for row in single] == pytest.approx([1.49, 1.89])
    assert "[95 % over documents]" in (tmp_path / "single" / "report.html").read_text()
    bench = Bench()
    for name, bits in (("standard", 1.5), ("linear", 1.9)):
        bench.measured(about(name), bits, documents=4)
    write_report(bench.rows, tmp_path / "few")
    shown = (tmp_path / "few" / "report.html").read_text()
    assert "[95 % over parts of the text]" in shown
    assert "paired by part of the text" in shown
    assert "over documents" not in shown


@pytest.mark.parametrize(
    ("best", "other", "words"),
    [
        ((0.9, 0.8), (0.7, 0.6), "none is tied with it"),
        ((0.9, 0.6), (0.7, 0.65), "tied with: linear(chunk_size=8)"),
        ((0.9,), (0.1, 0.1), "one seed cannot tell whether another is tied with it"),
        ((0.9, 0.8), (0.1,), "one seed cannot tell whether these are tied with it: linear(chunk_size=8)"),
    ],
)
def test_ties_on_a_recall_task_are_overlapping_seeds(best, other, words):
    bench = Bench()
    for name, shares in (("standard", best), ("linear", other)):
        for seed, right in enumerate(shares):
            one, values = asked(name, right, seed)
            bench.add(one, "certificate", certificate())
            bench.add(one, "recall", values)
    mean = sum(best) / len(best) * 100
    assert verdict.summary(study(bench)) == f"Best: standard, {mean:.2f} % right; {words}."


@pytest.mark.parametrize(
    ("paths", "ends"),
    [
        ([], ("", "")),
        (["last.ckpt"], ("", "")),
        (["runs/a/last.ckpt"], ("runs/a/", "")),
        (["runs/a/checkpoints/last.ckpt", "runs/ab/checkpoints/last.ckpt"], ("runs/", "/checkpoints/last.ckpt")),
        (["/runs/a/best.ckpt", "/runs/a/last.ckpt"], ("/runs/a/", "")),
        (["a/b.ckpt", "b.ckpt"], ("", "")),
        (["a/a/b.ckpt", "a/b.ckpt"], ("a/", "")),
    ],
)
def test_paths_lose_what_they_share(paths, ends):
    assert shared_ends(paths) == ends
    left = [path.removeprefix(ends[0]).removesuffix(ends[1]) for path in paths]
    assert len(set(left)) == len(set(paths))
    assert all(left)


def test_a_line_of_one_point_is_not_drawn(tmp_path):
    bench = of((about("standard"), 1.5), (about("linear"), 1.6), by_position=[{"start": 0, "stop": 1, "loss": 1.0}])
    for name in ("standard", "linear"):
        bench.add(about(name), "cost", cost(256), length=256, rounds=5)
    write_report(bench.rows, tmp_path)
    drawn = {path.name.split("_E1")[0] for path in (tmp_path / "plots").iterdir()}
    assert not {name for name in drawn if name.startswith(("cost", "by_length", "by_position"))}


def test_a_page_of_twelve_checkpoints_is_below_200_kilobytes(tmp_path):
    """Six architectures with two seeds: texts at four lengths, costs at seven, courses, maps of the usual size."""
    bench = Bench()
    drawn = Path(__file__).parents[2] / "results" / "longer" / "results.jsonl"
    maps = [
        row["values"] for row in map(json.loads, drawn.read_text().splitlines()) if row["identity"]["kind"] == "map"
    ]
    for i, name in enumerate(("standard", "bsbr", "linear", "gau", "delta_net", "sliding_window")):
        for seed in (0, 1):
            one = about(name, seed)
            bench.add(one, "certificate", certificate())
            bench.add(one, "training", training(seed))
            bench.add(one, "map", maps[i])
            for length in (256, 512, 1024, 2048):
                bench.add(one, "text", text(1.5 + i / 10, 30, 0.2, seed), length=length)
        for length in (256, 512, 1024, 2048, 4096, 8192, 16384):
            bench.add(one, "cost", cost(length, 1 + i / 6), length=length, rounds=5)
    assert write_report(bench.rows, tmp_path).stat().st_size < 200_000


def test_forty_models_with_long_and_foreign_names(tmp_path):
    bench = Bench()
    for i in range(40):
        one = about(f"architecture{i}", architecture=f"\u6ce8\u610f\U0001f600{i}" + "x" * (5 * i))
        bench.measured(one, 1.5 + i / 100)
    page = write_report(bench.rows, tmp_path).read_text()
    assert page.count('<input type="checkbox" checked') == 40
    assert write_latex(bench.rows, tmp_path / "latex").exists()
    for path in (tmp_path / "latex").glob("*.tex"):
        assert path.read_text().isascii()


# LaTeX.

EVIL = r"a_b\c{d}$x$ 5% #1 ~ ^ & <y> é 注"


def balanced(source: str) -> bool:
    """Whether braces and environments are closed in order."""
    open_: list[str] = []
    for brace, begin, end in re.findall(r"(?<!\\)([{}])|\\begin\{(\w+)\}|\\end\{(\w+)\}", re.sub(r"\\\\", "", source)):
        if brace == "{" or begin:
            open_.append(begin or "{")
        elif not open_ or open_.pop() != (end or "{"):
            return False
    return not open_


def test_the_picture_has_one_kind_of_interval():
    """Bars from the least to the largest seed; one seed has no bar, though its interval over documents is known."""
    seeds = [(about("standard", seed), 1.5 + seed / 100) for seed in range(3)]
    found = study(of(*seeds, (about("linear"), 1.5)))
    linear, standard = (verdict._quality(found, group) for group in found.ranked)
    assert standard.value == pytest.approx(1.51)
    assert standard.bounds == pytest.approx((1.5, 1.52))
    assert linear.value == pytest.approx(1.5)
    assert (linear.low, linear.high) == (None, None)


def test_latex_has_the_numbers_of_the_rows_and_embedded_fonts(tmp_path):
    bench = Bench()
    for name, bits in (("standard", 1.5), ("linear", 1.625)):
        one = about(name, architecture=f"{name} {EVIL}")
        bench.measured(one, bits, compressed={"xz -9": 1.55})
        bench.add(one, "text", text(bits + 0.25), length=512)
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in bench.rows))
    assert main(["report", str(path), "--output_dir", str(tmp_path / "page"), "--latex", str(tmp_path / "latex")]) == 0
    written = (tmp_path / "latex" / "first_E1_D1_val.tex").read_text()
    assert balanced(written)
    rows = re.findall(r"^(.*) \\\\$", written, re.MULTILINE)[1:]
    cells = [row.split(" & ") for row in (re.sub(r"\\&", "and", row) for row in rows)]
    assert [re.sub(r"[^\d. ]", "", row[1]).split() for row in cells] == [
        ["1.500", "1.490", "1.510"],
        ["1.550"],
        ["1.625", "1.615", "1.635"],
    ]
    columns = re.search(r"\\begin\{tabular\}\{@\{\}(\w+)@\{\}\}", written)
    assert columns
    assert {len(row) for row in cells} == {len(columns[1])}
    assert [written.count(rule) for rule in ("\\toprule", "\\midrule", "\\bottomrule")] == [1, 1, 1]
    assert r"standard a\_b\textbackslash{}c\{d\}\$x\$ 5\% \#1 \textasciitilde{} \textasciicircum{} \& " in written
    everything = (tmp_path / "latex" / "all.tex").read_text()
    assert balanced(everything)
    for used in re.findall(r"\\input\{([^}]*)\}", everything):
        assert (tmp_path / "latex" / f"{used}.tex").exists()
    figures = re.findall(r"\\includegraphics\[width=\\linewidth\]\{([^}]*)\}", everything)
    assert "by_length_E1_D1_val" in figures
    for name in figures:
        pdf = (tmp_path / "latex" / f"{name}.pdf").read_bytes()
        assert b"/FontFile2" in pdf, "TrueType, embedded"
        assert b"/Type3" not in pdf
        assert b"/CreationDate" not in pdf
        box = re.search(rb"/MediaBox \[\s*0 0 ([\d.]+) ", pdf)
        assert box
        assert float(box[1]) == pytest.approx(3.25 * 72)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_sets_everything_within_its_columns(tmp_path):
    bench = of(*((about(f"{name} {EVIL}", architecture=f"{name} {EVIL}"), 1.5) for name in ("standard", "linear")))
    write_latex(bench.rows, tmp_path)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout
    assert (tmp_path / "all.pdf").exists()


def test_latex_is_the_same_every_time(tmp_path):
    bench = of((about("standard"), 1.5), (about("linear"), 1.6))
    for folder in ("one", "two"):
        write_latex(bench.rows, tmp_path / folder)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize(("text_", "shown"), [("a_b", r"a\_b"), ("-1", "-1"), ("\u4e2d", r"\textbackslash{}u4e2d")])
def test_special_letters_of_latex(text_, shown):
    assert latex.escaped(text_) == shown


# Rows that lack something.

LACKING = {
    "no costs": lambda rows: [row for row in rows if row["identity"]["kind"] != "cost"],
    "no quality": lambda rows: [row for row in rows if row["identity"]["kind"] != "text"],
    "one length": lambda rows: [row for row in rows if row["identity"].get("length") in (None, 256)],
    "one model": lambda rows: [row for row in rows if "standard" in row["about"]["attention"]],
    "costs alone": lambda rows: [row for row in rows if row["identity"]["kind"] == "cost"],
    "maps alone": lambda rows: [row for row in rows if row["identity"]["kind"] == "map"],
}


@pytest.mark.parametrize("lacking", LACKING)
def test_a_report_of_part_of_the_rows(tmp_path, lacking):
    bench = Bench()
    for name, bits in (("standard", 1.5), ("linear", 1.6)):
        bench.measured(about(name), bits, CPU)
        bench.add(about(name), "map", picture())
        bench.add(about(name), "text", text(bits), length=512)
        for length in (256, 512):
            bench.add(about(name), "cost", cost(length), length=length, rounds=5)
    rows = LACKING[lacking](bench.rows)
    assert write_report(rows, tmp_path).read_text().rstrip().endswith("</html>")
    assert balanced(write_latex(rows, tmp_path / "latex").read_text())
    assert (tmp_path / "plots").exists()

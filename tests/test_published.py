"""The published study: its tables say what its rows say, pages show them, and reports are drawn from rows alone."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from bsbr_pl.report import study
from bsbr_pl.report.labels import look

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
VERDICTS = ROOT / "tests" / "report" / "verdicts"  # as they were published before there were rows of schema 3
TASKS = ["longer", "long", "text", "mqar", "mqar_state", "induction", "selective_copy", "needle"]
DRAW = """
import json, sys
from pathlib import Path
sys.modules["torch"] = None  # any import of it fails
from bsbr_pl.report import write_report
for folder in map(Path, sys.argv[2:]):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    write_report(rows, Path(sys.argv[1]) / folder.name)
"""


def rows(task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / task / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Every published report, drawn by a process that cannot import torch."""
    out = tmp_path_factory.mktemp("reports")
    folders = sorted(str(path.parent) for path in RESULTS.glob("*/results.jsonl"))
    subprocess.run([sys.executable, "-c", DRAW, str(out), *folders], check=True, cwd=ROOT)
    return out


def test_every_published_report_is_drawn_from_its_rows_without_torch(drawn):
    published = {path.parent.name for path in RESULTS.glob("*/report.html")}
    assert published == {path.parent.name for path in drawn.glob("*/report.html")} >= {*TASKS, "long_seeds"}
    for name in published:
        assert (drawn / name / "report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize("verdict", [str(path.relative_to(VERDICTS)) for path in sorted(VERDICTS.glob("*/*.csv"))])
def test_the_verdicts_are_those_that_were_published_to_the_last_digit(drawn, verdict):
    expected = list(csv.DictReader((VERDICTS / verdict).read_text().splitlines()))
    path = drawn / Path(verdict).parent / "tables" / Path(verdict).name
    found = list(csv.DictReader(path.read_text().splitlines()))
    shared = [{name: row[name] for name in expected[0]} for row in found]
    assert shared == expected
    assert len(expected[0]) >= 8


@pytest.mark.parametrize("task", TASKS)
def test_tables_are_those_of_the_runs(task):
    found = rows(task)
    assert study.as_markdown(found) in (RESULTS / "README.md").read_text()
    runs = [row for row in found if row["identity"]["kind"] == "training"]
    assert len({row["identity"]["checkpoint"] for row in runs}) == len(runs)
    for row in runs:
        assert row["values"]["environment"]["commit"]["commit"]
        assert row["about"]["data"]["fingerprint"]
        assert row["about"]["study"]["task"] == task


def test_the_readme_shows_the_same():
    table = study.as_markdown(rows("longer"))
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(tuple(study_models()))]
    assert len(shown) >= 5
    assert all(line in table.splitlines() for line in shown)


def study_models() -> list[str]:
    folders = (ROOT / "configs" / "study", ROOT / "study" / "configs")
    return [f"| {path.stem} |" for folder in folders for path in folder.glob("models/*.yaml")]


def test_a_row_of_the_study_is_a_mean_by_hand():
    """BSBR after 20 million tokens: three seeds."""
    bits = []
    for row in rows("longer"):
        run = row["about"]["study"]
        if row["identity"]["kind"] == "training" and (run["model"], run["phase"]) == ("bsbr", "final"):
            bits.append(row["values"]["metrics"]["val/bits_per_byte"]["value"][-1])
    assert len(bits) == 3
    line = f"| bsbr | 4,883 | 0.01 | 3 | {sum(bits) / 3:.4f} | {min(bits):.4f} to {max(bits):.4f} |"
    assert line in study.as_markdown(rows("longer")).splitlines()


def test_the_figure_is_of_the_runs_that_count():
    found = study.runs(rows("longer"))
    assert found.groupby("model").size().to_dict() == dict.fromkeys(found["model"], 3)
    picture = study.figure({"bits": rows("longer"), "accuracy": rows("mqar")})
    assert picture == study.figure({"bits": rows("longer"), "accuracy": rows("mqar")[::-1]}), "in any order"
    with Image.open(io.BytesIO(picture)) as seen:
        colours = {colour for _, colour in seen.convert("RGB").getcolors(1 << 20)}
    for key in ("bsbr", "standard", "delta_net", "gated_delta_net", "sliding_window"):
        assert ImageColor.getrgb(look(key)[0]) in colours, key


def test_the_published_files_are_small():
    files = [*RESULTS.glob("*.*"), *RESULTS.glob("*/results.jsonl"), *RESULTS.glob("*/report.html")]
    assert sum(path.stat().st_size for path in files) < 6_000_000


def bits(model: str, seed: int, length: int | None = None) -> float:
    """Bits per byte of a run of 20 million tokens: its last validation, or what `evaluate.py` measured at a length."""
    for row in rows("longer"):
        study, identity = row["about"]["study"], row["identity"]
        if (study["model"], study["phase"], row["about"]["seed"]) != (model, "final", seed):
            continue
        if length is None and identity["kind"] == "training":
            return row["values"]["metrics"]["val/bits_per_byte"]["value"][-1]
        if identity["kind"] == "text" and identity["length"] == length:
            return row["values"]["bits_per_byte"]
    raise LookupError((model, seed, length))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paired_p(first: str, second: str) -> float:
    """Two-sided p-value of Student's paired t-test with three pairs: 1 - t / sqrt(t^2 + 2)."""
    differences = [bits(second, seed) - bits(first, seed) for seed in range(3)]
    deviations = [difference - mean(differences) for difference in differences]
    error = (sum(deviation**2 for deviation in deviations) / 2 / 3) ** 0.5
    t = abs(mean(differences)) / error
    return 1 - t / (t * t + 2) ** 0.5


def megaflop(model: str) -> float:
    runs = [row["about"]["run"] for row in rows("longer") if row["about"]["study"]["model"] == model]
    return runs[0]["flops"] / runs[0]["tokens"] / 1e6


def test_the_claims_are_computed_from_the_rows():
    """Each number of README's bullets."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    bsbr, standard, window = (
        mean([bits(model, seed) for seed in range(3)]) for model in ("bsbr", "standard_conv", "sliding_window_conv")
    )
    long = {model: mean([bits(model, seed, 4096) for seed in (0, 1)]) for model in ("bsbr", "standard_conv")}
    truncated = mean([bits("standard_conv", seed, 512) for seed in (0, 1)])
    for claim in (
        f"{100 * (1 - standard / bsbr):.1f} % fewer bits per byte than BSBR (three pairs of runs, "
        f"p = {paired_p('standard_conv', 'bsbr'):.3f})",
        f"It has {100 * (window / bsbr - 1):.1f} % more bits per byte",
        f"(p = {paired_p('bsbr', 'sliding_window_conv'):.2f})",
        f"BSBR has {long['bsbr']:.3f} and `standard_conv` {long['standard_conv']:.3f}",
        f"`standard_conv` has {truncated:.3f}, and remains best",
        f"{megaflop('bsbr'):.1f} MFLOP per token for BSBR and {megaflop('standard'):.1f} for Standard",
    ):
        assert claim in readme, claim
    assert all(bits("bsbr", seed) < bits("sliding_window_conv", seed) for seed in range(3)), "fewer with every seed"

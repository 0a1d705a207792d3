"""The published study: its tables say what its rows say, pages show them, and reports are drawn from rows alone."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image, ImageColor

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.report import leaderboard, study
from bsbr_pl.report.labels import look
from bsbr_pl.report.studies import Findings
from bsbr_pl.report.tables import pipes
from bsbr_pl.values import paired_difference

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
VERDICTS = ROOT / "tests" / "report" / "verdicts"  # as they were published before there were rows of schema 3
TASKS = ["text", "longer", "mqar", "mqar_state", "induction"]
DRAW = """
import json, sys
from pathlib import Path
sys.modules["torch"] = None  # any import of it fails
from bsbr_pl.report import write_report
for folder in map(Path, sys.argv[2:]):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    write_report(rows, Path(sys.argv[1]) / folder.name)
"""


WAYS = ("truncated", "overlapping", "as it is", "stretched")  # to read a text longer than the training length

#: Model of the study on text -> how many seeds count.
SEEDS = {
    "standard_pro": 5,
    "moba_pro": 5,
    "fox_pro": 5,
    "bsbr_pro": 5,
    "sliding_window_pro": 5,
    "standard_conv": 5,
    "moba_conv": 3,
    "bsbr": 5,
    "sliding_window_conv": 5,
    "rwkv7": 3,
    "hybrid_3_to_1": 3,
    "hybrid_3_to_1_pro": 3,
    "gated_delta_net_identity": 5,
    "hybrid_3_to_1_identity": 3,
    "standard": 5,
    "kda_identity": 3,
    "mamba2": 5,
    "gla_identity": 3,
    "delta_net_identity": 3,
}
#: The models of README's table: the best form of each architecture, and Standard without further parts.
SHOWN = ["standard_pro", "moba_pro", "fox_pro", "bsbr_pro", "sliding_window_pro", "hybrid_3_to_1"]
SHOWN += ["rwkv7", "gated_delta_net_identity", "standard", "kda_identity", "mamba2", "delta_net_identity"]
MQAR = ["standard", "standard_conv", "standard_pro", "sliding_window_conv", "bsbr", "delta_net"]


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
    assert published == {path.parent.name for path in drawn.glob("*/report.html")} >= {*TASKS}
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
    """Fewer columns and models; no run has a note, such as a rate at an edge."""
    whole = study.frame(study.runs(rows("text")))
    columns = ["model", "bits per byte", "least to largest", "seeds", "learning rate", "FLOPs/token", "state bytes"]
    assert pipes(whole.loc[whole["model"].isin(SHOWN), columns]) in (ROOT / "README.md").read_text()
    assert set(whole["note"]) == {""}


def test_the_differences_are_those_of_the_runs():
    page = (RESULTS / "README.md").read_text()
    assert pipes(study.differences(rows("text"))) in page
    assert pipes(study.differences(rows("text"), against="bsbr_pro")) in page


def test_a_row_of_the_study_is_a_mean_by_hand():
    bits = on_the_test_text("bsbr")
    line = f"| bsbr | 1,400 | 0.005 | 5 | {sum(bits) / 5:.4f} | {min(bits):.4f} to {max(bits):.4f} |"
    assert line in study.as_markdown(rows("text"))


@pytest.mark.parametrize("model", SEEDS)
def test_a_rate_is_inside_its_sweep_and_the_best_of_it(model):
    """On the validation text, after all steps; at least four rates."""
    losses = {}
    for row in of("text", model, phase="sweep"):
        losses[row["about"]["study"]["rate"]] = row["values"]["metrics"]["val/loss"]["value"][-1]
        assert (row["about"]["run"]["planned_steps"], row["about"]["seed"]) == (1400, 0)
    assert len(losses) >= 4
    assert {row["about"]["study"]["rate"] for row in of("text", model)} == {min(losses, key=losses.__getitem__)}
    assert min(losses) < min(losses, key=losses.__getitem__) < max(losses)


#: Model of the study on text -> its architecture and heads.
FORMS = {
    "standard_pro": ("standard(conv_size=4, qk_norm=True, output_gate=True)", 4),
    "moba_pro": ("moba(conv_size=4, qk_norm=True, output_gate=True)", 4),
    "fox_pro": ("fox(qk_norm=True, kv_shift=True, output_gate=True)", 4),
    "bsbr_pro": ("bsbr(chunk_size=64, qk_norm=True, output_gate=True)", 4),
    "sliding_window_pro": ("sliding_window(window_size=64, conv_size=4, qk_norm=True, output_gate=True)", 4),
    "standard_conv": ("standard(conv_size=4)", 4),
    "moba_conv": ("moba(conv_size=4)", 4),
    "bsbr": ("bsbr(chunk_size=64)", 4),
    "sliding_window_conv": ("sliding_window(window_size=64, conv_size=4)", 4),
    "rwkv7": ("rwkv7", 2),
    "hybrid_3_to_1": ("3x gated_delta_net + standard(qk_norm=True)", 4),
    "hybrid_3_to_1_pro": ("3x gated_delta_net + standard(qk_norm=True, output_gate=True)", 4),
    "gated_delta_net_identity": ("gated_delta_net(conv_init=identity)", 1),
    "hybrid_3_to_1_identity": ("gated_delta_net(conv_init=identity) + standard(qk_norm=True)", 4),
    "standard": ("standard(qk_norm=True)", 4),
    "kda_identity": ("kda(conv_init=identity)", 1),
    "mamba2": ("mamba2", 4),
    "gla_identity": ("gla(conv_init=identity)", 4),
    "delta_net_identity": ("delta_net(conv_init=identity)", 1),
}


@pytest.mark.parametrize("model", SEEDS)
def test_a_name_stands_for_one_form(model):
    """What the pages say of the parts, the starts of the taps and the heads of a model."""
    found = {(row["about"]["architecture"], row["about"]["config"]["model.num_heads"]) for row in of("text", model)}
    assert found == {FORMS[model]}


def test_the_figure_is_of_the_runs_that_count():
    found = study.runs(rows("text"))
    assert found.groupby("model").size().to_dict() == SEEDS
    picture = study.figure({"bits": rows("text"), "accuracy": rows("mqar")})
    assert picture == study.figure({"bits": rows("text"), "accuracy": rows("mqar")[::-1]}), "in any order"
    with Image.open(io.BytesIO(picture)) as seen:
        colours = {colour for _, colour in seen.convert("RGB").getcolors(1 << 20)}
    for key in ("bsbr", "standard", "gated_delta_net", "sliding_window", "mamba2"):
        assert ImageColor.getrgb(look(key)[0]) in colours, key


def test_published_rows_name_no_path_of_a_machine():
    for path in RESULTS.rglob("*.json*"):
        assert not re.search(r'["\' =]/\w+', path.read_text()), path


def test_the_published_files_are_small():
    files = [*RESULTS.glob("*.*"), *RESULTS.glob("*/results.jsonl"), *RESULTS.glob("*/report.html")]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert max(path.stat().st_size for path in RESULTS.glob("*/report.html")) < 200_000


def of(task: str, model: str, kind: str = "training", phase: str = "final") -> list[dict[str, Any]]:
    """The rows of a model's runs that count, or of its sweep, in the order of the seeds and rates."""
    found = [row for row in rows(task) if row["identity"]["kind"] == kind and "study" in row["about"]]
    wanted = {"model": model, "phase": phase}.items()
    found = [row for row in found if wanted <= row["about"]["study"].items()]
    return sorted(found, key=lambda row: (row["about"]["seed"], row["about"]["study"]["rate"]))


def on_the_test_text(model: str) -> list[float]:
    """Bits per byte of the test text, of seeds 1, 2, ..."""
    runs = of("text", model)
    assert [row["about"]["seed"] for row in runs] == list(range(1, SEEDS[model] + 1))
    return [row["values"]["result"]["test"] for row in runs]


def recalled_by(model: str, slice_: str) -> list[float]:
    """The loss of a class of tokens of the test text, of every seed."""
    found = [part for row in of("text", model, "text") for part in row["values"]["recall"] if part["slice"] == slice_]
    assert len(found) == SEEDS[model]
    return [part["loss"] for part in found]


def recalled(model: str, slice_: str) -> float:
    """The mean over seeds."""
    return mean(recalled_by(model, slice_))


def older(model: str, seed: int, length: int | None = None) -> float:
    """Bits per byte of a run of 20 million tokens: its last validation, or what `evaluate.py` measured at a length."""
    if length is None:
        (row,) = (row for row in of("longer", model) if row["about"]["seed"] == seed)
        return row["values"]["metrics"]["val/bits_per_byte"]["value"][-1]
    found = [row for row in of("longer", model, "text") if row["about"]["seed"] == seed]
    (row,) = (row for row in found if row["identity"]["length"] == length)
    return row["values"]["bits_per_byte"]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def more(first: list[float], second: list[float]) -> float:
    """By how many percent the mean of the first is above that of the second."""
    return 100 * (mean(first) / mean(second) - 1)


def paired_p(first: list[float], second: list[float]) -> float:
    """Two-sided p-value of Student's paired t-test, in closed form.

    With n pairs and r = sqrt(t^2 + n - 1) it is 1 - t / r for n = 3, and 1 - t (1 + 2 / r^2) / r for n = 5.
    """
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n, deviations = len(differences), [difference - mean(differences) for difference in differences]
    t = abs(mean(differences)) / (sum(deviation**2 for deviation in deviations) / (n - 1) / n) ** 0.5
    r = (t * t + n - 1) ** 0.5
    return 1 - t / r * {3: 1, 5: 1 + 2 / r**2}[n]


def one_line(page: Path) -> str:
    return " ".join(page.read_text().split())


def test_the_claims_about_20_million_tokens_are_computed_from_their_rows():
    """Each number of their bullets in results/README.md."""
    text = one_line(RESULTS / "README.md")
    bsbr, standard, window = (
        [older(model, seed) for seed in range(3)] for model in ("bsbr", "standard_conv", "sliding_window_conv")
    )
    long = {model: mean([older(model, seed, 4096) for seed in (0, 1)]) for model in ("bsbr", "standard_conv")}
    truncated = mean([older("standard_conv", seed, 512) for seed in (0, 1)])
    for claim in (
        f"{-more(standard, bsbr):.1f} % below BSBR (p = {paired_p(standard, bsbr):.3f})",
        f"BSBR is {-more(bsbr, window):.2f} % below `sliding_window_conv`",
        f"p = {paired_p(bsbr, window):.2f})",
        f"BSBR has {long['bsbr']:.3f}",
        f"`standard_conv` {long['standard_conv']:.3f}",
        f"has {truncated:.3f}: whoever uses it",
    ):
        assert claim in text, claim


def read_at_length(model: str, way: str) -> list[float]:
    """Bits per byte of the test text at 4,096 tokens, of every seed; NaN if nothing can be stretched."""
    found = [json.loads(line) for line in (RESULTS / "text" / "lengths.jsonl").read_text().splitlines()]
    seeds = {one["seed"]: one["bits_per_byte"] for one in found if (one["model"], one["way"]) == (model, way)}
    assert set(seeds) == set(range(1, SEEDS[model] + 1))
    return [math.nan if bits is None else bits for bits in seeds.values()]


def lengths(model: str, way: str) -> float:
    """The mean over seeds."""
    return mean(read_at_length(model, way))


def costs(model: str, name: str) -> float:
    return of("text", model)[0]["values"]["result"][name]


PAIRS = {3: "three", 5: "five"}


def as_p(first: list[float], second: list[float]) -> str:
    p = paired_p(first, second)
    return f"p = {p:.2f}" if p >= 0.095 else f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def pairs(model: str, other: str) -> tuple[str, str]:
    """By how many percent the bits per byte of a model are above those of another, and the test of their seeds."""
    count = min(SEEDS[model], SEEDS[other])
    ours, theirs = on_the_test_text(model)[:count], on_the_test_text(other)[:count]
    return f"{more(ours, theirs):.1f} %", f"{PAIRS[count]} pairs of runs, {as_p(ours, theirs)}"


def against(model: str, other: str) -> str:
    """How far the bits per byte of a model are from those of another, with the test of the seeds of both."""
    percent, test = pairs(model, other)
    side = "fewer" if percent.startswith("-") else "more"
    than = " than BSBR" if other == "bsbr_pro" else ""
    return f"{percent.removeprefix('-')} {side} bits per byte{than} ({test})"


def less(name: str, model: str, other: str) -> str:
    return f"{100 * (1 - costs(model, name) / costs(other, name)):.0f} %"


def same_parts() -> str:
    """How far three models are from the best; the test of each has the same number of pairs and the same p-value."""
    names = {"MoBA has": "moba_pro", "BSBR": "bsbr_pro", "a window of 64 tokens": "sliding_window_pro"}
    shares, tests = zip(*(pairs(model, "standard_pro") for model in names.values()), strict=True)
    moba, bsbr, window = (f"{name} {share}" for name, share in zip(names, shares, strict=True))
    (test,) = set(tests)
    return f"With the same parts, {moba} more bits per byte, {bsbr} and {window} (each: {test})"


def without_parts() -> str:
    """What the convolution, QK-norm and the output gate give."""
    standard, of_standard = pairs("standard_conv", "standard_pro")
    moba, of_moba = pairs("moba_conv", "moba_pro")
    bsbr, of_bsbr = pairs("bsbr", "bsbr_pro")
    window, of_window = pairs("sliding_window_conv", "sliding_window_pro")
    assert of_bsbr == of_window
    alone, of_alone = pairs("standard", "standard_pro")
    return (
        f"Without QK-norm and gate, Standard has {standard} more bits per byte ({of_standard}), MoBA {moba} "
        f"({of_moba}), BSBR {bsbr} and the window {window} (each: {of_bsbr}). Standard with QK-norm alone "
        f"(`standard`) has {alone} more ({of_alone})"
    )


def retrieval() -> str:
    """What BSBR gains from its retrieval, and what it costs."""
    flops = 100 * (costs("sliding_window_pro", "flops_per_token") / costs("bsbr_pro", "flops_per_token") - 1)
    assert 3.0 < costs("bsbr_pro", "state_bytes") / costs("sliding_window_pro", "state_bytes") < 3.3
    widths = [of("text", model)[0]["about"]["config"]["model.ff_dim"] for model in ("sliding_window_pro", "bsbr_pro")]
    assert widths == [442, 314]
    return (
        "`sliding_window_pro`, which is BSBR without its retrieval and has wider feed-forward networks in its place, "
        f"has {against('sliding_window_pro', 'bsbr_pro')}, {flops:.0f} % more FLOPs and a third of the state"
    )


def longer() -> str:
    """What README says about texts longer than the training length."""
    side_by_side, overlapping, as_it_is, stretched = (f"{lengths('standard_pro', way):.3f}" for way in WAYS)
    fox, fox_overlapping = (f"{lengths('fox_pro', way):.3f}" for way in ("as it is", "overlapping"))
    gain = as_p(read_at_length("fox_pro", "overlapping"), read_at_length("fox_pro", "as it is"))
    difference = as_p(read_at_length("standard_pro", "overlapping"), read_at_length("fox_pro", "as it is"))
    return (
        f"`standard_pro` has {side_by_side} in windows of 512 tokens side by side, {overlapping} in windows that "
        f"overlap by half, {as_it_is} in windows of 4,096, and {stretched} there with a stretched rotary base. FoX has "
        f"{fox} in windows of 4,096 and {fox_overlapping} in overlapping ones of 512 (five pairs of runs, {gain}). The "
        f"best of both cannot be told apart (five pairs of runs, {difference})"
    )


def claims() -> list[str]:
    """What README says in numbers."""
    copying = {model: f"{recalled(model, 'hits'):.2f}" for model in SEEDS}
    return [
        f"`fox_pro`, whose forget gate takes the place of rotary positions, has {against('fox_pro', 'standard_pro')}",
        same_parts(),
        without_parts(),
        retrieval(),
        f"MoBA, which reads the chunks that it chooses exactly, has {against('moba_pro', 'bsbr_pro')}",
        f"BSBR needs {less('flops_per_token', 'bsbr_pro', 'standard_pro')} fewer FLOPs per token and "
        f"{less('state_bytes', 'bsbr_pro', 'standard_pro')} less state after 512 tokens, the window "
        f"{less('flops_per_token', 'sliding_window_pro', 'standard_pro')} and "
        f"{less('state_bytes', 'sliding_window_pro', 'standard_pro')}",
        f"{copying['standard_pro']} nats with `standard_pro`, {copying['bsbr_pro']} with BSBR, "
        f"{copying['rwkv7']} with RWKV-7, {copying['gated_delta_net_identity']} with Gated DeltaNet and "
        f"{copying['delta_net_identity']} with DeltaNet",
        longer(),
    ]


@pytest.mark.parametrize("claim", range(8))
def test_the_claims_of_the_readme_are_computed_from_the_rows(claim):
    assert claims()[claim] in one_line(ROOT / "README.md")


def test_the_order_of_the_claims_is_that_of_the_rows():
    """What README says without a number."""
    assert min(SEEDS, key=lambda model: mean(on_the_test_text(model))) == "standard_pro"
    rest = {model: recalled(model, "rest") for model in SEEDS}
    order = sorted(rest, key=rest.__getitem__)
    assert (order[0], order[-1], order[-2]) == ("sliding_window_pro", "delta_net_identity", "standard_conv")
    without_gate = against("sliding_window_conv", "bsbr").replace(" bits per byte", "")
    assert f"Without QK-norm and gate it has {without_gate}" in one_line(RESULTS / "README.md")
    rwkv7 = on_the_test_text("rwkv7")
    assert f"{max(rwkv7) - min(rwkv7):.2f}" == "0.13"
    gains = {model for model in SEEDS if lengths(model, "as it is") < lengths(model, "overlapping")}
    assert "fox_pro" in gains
    assert not gains & {"standard_pro", "moba_pro", "bsbr_pro", "sliding_window_pro", "standard", "hybrid_3_to_1"}


def test_the_table_of_longer_contexts_is_that_of_its_lines():
    page = (RESULTS / "README.md").read_text()
    for model in SEEDS:
        cells = [f"{lengths(model, way):.4f}".replace("nan", "-") for way in WAYS]
        assert f"| {model} | {SEEDS[model]} | {' | '.join(cells)} |" in page, model


def test_the_table_of_forms_is_that_of_its_lines():
    page = (RESULTS / "README.md").read_text()
    section = page[page.index("### How the forms were chosen") : page.index("## Text, 20 million tokens")]
    lines = [json.loads(line) for line in (RESULTS / "text" / "forms.jsonl").read_text().splitlines()]
    shown = [line for line in lines if (line["steps"], line["batch_size"]) not in [(800, 4), (1600, 2)]]
    assert len(shown) >= 10
    for line in shown:
        assert f"{line['bits_per_byte']:.3f}" in section, line


@pytest.mark.parametrize("model", SEEDS)
def test_the_table_of_copying_is_that_of_the_rows(model):
    slices = ("8 to 31 back", "32 to 127 back", "128 to 511 back", "hits", "rest")
    cells = [f"{recalled(model, slice_):.2f}" for slice_ in slices]
    assert f"| {model} | {' | '.join(cells)} |" in (RESULTS / "README.md").read_text()


def swept(model: str) -> list[str]:
    """Bits per byte of the validation text in the sweep of a model, from the lowest rate to the highest."""
    values = [row["values"]["metrics"]["val/bits_per_byte"]["value"][-1] for row in of("text", model, phase="sweep")]
    return [f"{bits:.3f}" for bits in values]


def test_the_words_about_sweeps_are_computed_from_their_rows():
    """Taps of the hybrid, and a routing query for each token."""
    page = one_line(RESULTS / "README.md")
    assert f"| {min(swept('hybrid_3_to_1'))}, {min(swept('hybrid_3_to_1_identity'))} |" in page
    by_chunk, by_token = (swept(model)[:3] for model in ("bsbr", "bsbr_route1"))
    assert f"| {by_chunk[0]}, **{by_chunk[1]}**, {by_chunk[2]} |" in page
    assert f"| {', '.join(by_token)} |" in page


def far() -> str:
    """What results/README.md says about BSBR and the tokens beyond its window."""
    slices = ("32 to 127 back", "128 to 511 back", "rest")
    pairs = [(recalled_by("sliding_window_pro", one), recalled_by("bsbr_pro", one)) for one in slices]
    near, distant, rest = (f"{abs(mean(window) - mean(bsbr)):.2f}" for window, bsbr in pairs)
    p_near, p_distant, p_rest = (as_p(window, bsbr) for window, bsbr in pairs)
    loss = {model: f"{recalled(model, '128 to 511 back'):.2f}" for model in SEEDS}
    return (
        f"It is {near} nats better than the window at 32 to 127 back ({p_near}) and {distant} at 128 to 511 back "
        f"({p_distant}). On all other tokens it is {rest} worse ({p_rest}). At 128 to 511 back its loss is "
        f"{loss['bsbr_pro']} nats where `sliding_window_pro` has {loss['sliding_window_pro']}; MoBA, which reads two "
        f"earlier chunks exactly, has {loss['moba_pro']}, and `standard_pro`, which reads all tokens exactly, "
        f"{loss['standard_pro']}"
    )


def test_the_words_about_far_tokens_are_computed_from_the_rows():
    assert far() in one_line(RESULTS / "README.md")
    assert mean(recalled_by("bsbr_pro", "rest")) > mean(recalled_by("sliding_window_pro", "rest"))


def changes() -> str:
    """What results/README.md says about windows of 4,096 tokens in place of overlapping ones of 512."""
    change = {model: lengths(model, "as it is") - lengths(model, "overlapping") for model in SEEDS}
    gain = -change.pop("fox_pro")
    assert gain > 0 < min(change.values())
    gated = [change[model] for model in ("mamba2", "gla_identity", "kda_identity", "rwkv7", "gated_delta_net_identity")]
    near = [bits for model, bits in change.items() if model.startswith(("bsbr", "sliding_window"))]
    mixed = [bits for model, bits in change.items() if model.startswith(("hybrid", "delta_net"))]
    exact = [bits for model, bits in change.items() if model.startswith(("standard", "moba"))]
    assert len(gated + near + mixed + exact) == len(change)
    assert 0.0005 < min(gated) < max(gated) < 0.002
    return (
        "Only FoX has fewer bits per byte in windows of 4,096 tokens than in overlapping ones of 512: "
        f"{gain:.3f} fewer. The gated recurrent models have about {mean(gated):.3f} more, BSBR and the "
        f"window {min(near):.3f} to {max(near):.3f}, the hybrids and DeltaNet {min(mixed):.2f} to {max(mixed):.2f}, "
        f"and Standard and MoBA {min(exact):.2f} to {max(exact):.2f}"
    )


def test_the_words_about_longer_contexts_are_computed_from_their_rows():
    assert changes() in one_line(RESULTS / "README.md")


def test_the_words_about_mqar_are_computed_from_its_rows():
    page = one_line(RESULTS / "README.md")
    accuracy = {model: [row["values"]["result"]["test"] for row in of("mqar", model)] for model in MQAR}
    assert {model: len(found) for model, found in accuracy.items()} == dict.fromkeys(MQAR, 3)
    assert min(accuracy["bsbr"] + accuracy["delta_net"] + accuracy["standard_conv"]) > 0.9995
    assert f"The window alone has {mean(accuracy['sliding_window_conv']):.2f}, and Standard" in page
    assert f"in 640 steps, {mean(accuracy['standard']):.2f}." in page
    for model in ("standard_conv", "bsbr", "delta_net"):
        found = {row["about"]["study"]["rate"]: row["values"]["metrics"] for row in of("mqar", model, phase="sweep")}
        assert min(found[rate]["val/accuracy"]["value"][-1] for rate in (2.5e-3, 5e-3, 1e-2)) > 0.98
    assert len(of("mqar", "standard", phase="sweep")) == 5


def test_the_words_about_induction_are_computed_from_its_rows():
    page = one_line(RESULTS / "README.md")
    accuracy = {}
    for model in ("standard_conv", "standard_pro", "bsbr", "delta_net", "gated_delta_net", "standard"):
        accuracy[model] = [row["values"]["result"]["test"] for row in of("induction", model)]
        assert len(accuracy[model]) == 3
    assert min(min(found) for model, found in accuracy.items() if model != "standard") > 0.99
    swept = {
        row["about"]["study"]["rate"]: row["values"]["metrics"] for row in of("induction", "standard", phase="sweep")
    }
    assert f"at 5e-3 it has {swept[5e-3]['val/accuracy']['value'][-1]:.2f}" in page


def test_the_table_of_memorization_is_that_of_its_lines(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "study")
    import mad_score

    lines = [json.loads(line) for line in (RESULTS / "mad" / "memorization.jsonl").read_text().splitlines()]
    page = (ROOT / "docs" / "mad.md").read_text()
    assert mad_score.against_published(lines).strip() in page
    assert f"{len(lines)} runs" in page
    by_hand = [
        one["accuracy"] for one in lines if (one["study"], one["model"], one["rate"]) == ("2048", "delta_net", 1e-3)
    ]
    assert len(by_hand) == 3
    assert f"| {mean(by_hand):.3f} ({min(by_hand):.2f} to {max(by_hand):.2f}) |" in page


def short_tasks_of_mad() -> str:
    """The table of docs/mad.md: means over seeds with the least and the largest, the best mean rank first."""
    matrix, _ = leaderboard.tables(Findings(rows("mad_short")))
    assert matrix
    shown = []
    for one in matrix.frame.to_dict("records"):
        cells = {"model": one.pop("model")}
        for task, cell in one.items():
            name = task.removeprefix("short_").removesuffix(" (%)").replace("_", " ")
            span = f" ({cell.low:.2f} to {cell.high:.2f})" if cell.high - cell.low >= 0.01 else ""
            late = f", {cell.note}" if "not learned" in cell.note else ""
            cells[name] = f"{cell.value:.3f}{span}{late}"
        shown.append(cells)
    return pipes(pd.DataFrame(shown))


def test_the_short_tasks_of_mad_are_those_of_their_rows():
    page = (ROOT / "docs" / "mad.md").read_text()
    assert short_tasks_of_mad().strip() in page
    quality: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows("mad_short"):
        study = row["about"]["study"]
        quality.setdefault((study["task"], study["model"]), {})[row["about"]["seed"]] = row["values"]["result"]["test"]
        inside = min(study["rates"]) < study["rate"] < max(study["rates"])
        assert inside or (study["task"], study["model"]) == ("short_noisy_recall", "gau")
    assert all(set(seeds) == {1, 2, 3} for seeds in quality.values())
    assert all(value >= 0 for seeds in quality.values() for value in seeds.values())
    models = {model for _, model in quality}
    assert set(ARCHITECTURES) <= models
    assert len(quality) == len(models) * len({task for task, _ in quality}), "every model on every task"

    def against(task: str, one: str, other: str) -> tuple[float, float]:
        found = paired_difference(quality[f"short_{task}", one], quality[f"short_{task}", other])
        return found["mean"], found["p"]

    text = " ".join(page.split())
    for words, (difference, p) in {
        "Standard has {:.2f} more with it (p = {:.2f})": against("fuzzy_recall", "standard_conv", "standard"),
        "MoBA {:.2f} (p = {:.2f})": against("fuzzy_recall", "moba_conv", "moba"),
        "({:.2f} more, p = {:.3f})": against("noisy_recall", "nsa_conv", "nsa"),
        "it has {:.2f} less than Standard with the convolution (p = {:.2f})": against(
            "fuzzy_recall", "standard_conv", "bsbr"
        ),
        "in copying {:.2f} less (p = {:.3f})": against("selective_copying", "standard_conv", "bsbr"),
    }.items():
        assert words.format(difference, p) in text
    tasks = ("fuzzy_recall", "selective_copying", "noisy_recall")
    pairs = (("standard_conv", "delta_net"), ("standard_conv", "kda"), ("delta_net", "kda"))
    least = min(p for task in tasks for pair in pairs if (p := against(task, *pair)[1]) == p)
    assert f"(p = {least:.2f} or more on each task, three pairs of runs)" in text
    _, p = against("selective_copying", "bsbr", "sliding_window_conv")
    assert f"where a window of 16 tokens is (p = {p:.2f})" in text
    parameters = {row["about"]["parameters"] for row in rows("mad_short")}
    assert f"{min(parameters):,} to {max(parameters):,} parameters" in text
    sweeps = (RESULTS / "mad_short" / "sweeps.jsonl").read_text().splitlines()
    assert f"{len(sweeps) + len(rows('mad_short'))} runs" in text

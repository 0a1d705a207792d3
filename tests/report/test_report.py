"""The report as a whole: complete, the same every time, harmless whatever a file is called, and seen in a browser."""

import csv
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_tables import CPU, GPU, Bench, certificate, checkpoint, cost, text

from bsbr_pl.data import TextData
from bsbr_pl.evals.checkpoints import Checkpoint
from bsbr_pl.evals.evaluation import Evaluation
from bsbr_pl.evals.report import write_report
from bsbr_pl.results import Results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
ARCHITECTURES = {"bsbr": 1.50, "standard": 1.52, "sliding_window": 1.70, "linear": 1.66, "gau": 1.58}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SECTIONS = ["Verdict", "Problems", "Certificates", "Accuracy", "Length and position", "Recall hits in text"]
SECTIONS += ["Recall tasks", "Costs", "Four clocks", "Pareto fronts", "Attention maps", "Environments"]
VOID = {"meta", "img", "wbr"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Any]:
    """Arguments of a small text."""
    root = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (root / f"{i}.txt").write_text("".join(f"line {j} of {i}, the same as {j - i}\n" for j in range(25)))
    cache = str(tmp_path_factory.mktemp("cache"))
    return {"source": str(root), "tokenizer": "bytes", "cache_dir": cache, "val_fraction": 0.3, "test_fraction": 0.1}


def trained(name: str, seed: int = 0, **arguments: Any) -> Checkpoint:
    """A checkpoint that was trained on a text that is there."""
    one = checkpoint(name, seed, **arguments)
    one.data_fingerprint = TextData(**one.data_arguments).fingerprint
    return one


def full(folder: Path, data: dict[str, Any], names: dict[str, float] = ARCHITECTURES) -> Bench:
    """Several architectures, seeds, two environments, a leak, a recall task, a file that could not be read."""
    ones = [trained(name, seed, **data) for name in names for seed in ((0, 1) if name == "bsbr" else (0,))]
    leaky, recall = trained("hopfield", **data), [checkpoint(name, 7, **data) for name in ("standard", "linear")]
    for one in recall:
        one.data_class, one.data_fingerprint = "InductionData", "0" * 32
        one.data_arguments = {"vocab_size": 257, "context_length": 256}
        one.record["data"] = {"class": "InductionData", "batch_size": 8}
    unread = Checkpoint("runs/broken.ckpt", problem="not a checkpoint")
    bench = Bench(folder, [*ones, leaky, *recall, unread])
    powers = {"standard": 1.9, "bsbr": 1.04, "gau": 1.4, "linear": 1.0, "sliding_window": 1.01}
    for one in ones:
        name = one.digest.split("-")[0]
        bits = names[name] + 0.004 * one.seed
        bench.add(one, "certificate", certificate())
        for i, length in enumerate((256, 512, 1024, 2048)):
            values = text(bits + i * (0.3 if name == "standard" else -0.02), noise=0.2, seed=one.seed)
            values["by_position"] = [{"start": n, "stop": 2 * n or 1, "loss": bits + 2 / (1 + n) ** 0.5}
                                     for n in (0, *(2**k for k in range((length - 1).bit_length())))]  # fmt: skip
            bench.add(one, "text", values, length=length)
        for length in LENGTHS:
            scale = 3e-9 if name == "standard" else 3e-6 * bits
            bench.add(one, "cost", cost(length, powers[name], scale), length=length, rounds=5)
    bench.add(ones[0], "certificate", certificate(), GPU)
    bench.add(ones[0], "text", text(1.51), GPU, length=256)
    bench.add(leaky, "certificate", certificate(False))
    for one, right in zip(recall, (0.95, 0.6), strict=True):
        found = {n: right - n / 4000 for n in (64, 128, 256, 512)}
        slices = [
            {"slice": f"T{n}", "length": n, "accuracy": a, "interval": [a - 0.03, a + 0.03]} for n, a in found.items()
        ]
        interval = {"accuracy": [right - 0.1, right]}
        bench.add(one, "certificate", certificate())
        bench.add(
            one, "recall", {"loss": 1.0, "accuracy": right, "samples": 40, "interval": interval, "slices": slices}
        )
    return bench


@pytest.fixture(scope="module")
def written(tmp_path_factory, data) -> Path:
    """The folder of a report with everything in it."""
    folder = tmp_path_factory.mktemp("report")
    assert write_report(full(tmp_path_factory.mktemp("rows"), data).evaluation, folder) == folder / "report.html"
    return folder


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what is asked about."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_the_report_holds_every_section_table_and_plot(written):
    found = page(written)
    shown = "".join(found.text)
    for section in SECTIONS:
        assert found.text.count(section) >= 2, f"{section} is in the contents and over its section"
    for words in (
        "Best: bsbr",
        "disqualified: suffix_0 0.2500 above 1.00e-08",
        "runs/broken.ckpt",
        "sub-quadratic: grows as T^1.04",
        "not reached by 16,384",
        "evaluate.py runs",
        "a GPU",
        "0123456789",
    ):
        assert words in shown, words
    names = {path.stem for path in (written / "tables").iterdir()}
    assert {name.split("_E")[0] for name in names} >= {
        *("verdict", "problems", "certificates", "accuracy", "by_length", "hits", "recall", "cost_training"),
        *("exponents", "crossovers", "environments", "data", "commands"),
    }
    drawn = {path.stem for path in (written / "plots").iterdir()}
    assert {name.split("_E")[0] for name in drawn} >= {
        *("by_length", "by_position_256", "by_position_2048", "hits", "recall", "cost_training", "clocks_1_steps"),
        *("pareto_training", "pareto_state", "attention_3"),
    }
    ids = [attributes["id"] for attributes in found.all("figure")]
    assert set(ids) == {f"table-{name}" for name in names} | {f"plot-{name}" for name in drawn}
    assert len(ids) == len(set(ids)), "an id twice"


def test_it_is_one_file_that_loads_nothing(written):
    text = (written / "report.html").read_text()
    assert re.search(r"https?://", text) is None
    found = page(written)
    targets = [value for _, attributes in found.tags for name, value in attributes.items() if name in ("src", "href")]
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    (language,) = found.all("html")
    assert language["lang"] == "en"
    assert {"viewport", "color-scheme"} <= {attributes.get("name") for attributes in found.all("meta")}
    assert all(attributes["alt"] for attributes in found.all("img"))
    anchors = {attributes.get("id") for _, attributes in found.tags}
    assert all(target[1:] in anchors for target in targets if target.startswith("#"))


def test_plots_are_small_and_carry_no_date(written):
    for path in (written / "plots").iterdir():
        content = path.read_bytes()
        assert len(content) < 300_000, path.name
        if path.suffix == ".svg":
            ET.fromstring(content)
            assert b"<dc:date>" not in content
        else:
            with Image.open(path) as picture:
                assert np.asarray(picture).std() > 1
                assert not picture.info.get("Software")
    assert all(path.stat().st_size < 200_000 for path in (written / "plots").glob("attention_*.png"))


def test_tables_are_read_back(written):
    (path,) = (written / "tables").glob("verdict_E1_D2_val.csv")
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert [row["architecture"].split("(")[0] for row in rows][:2] == ["bsbr", "standard"]
    assert rows[0]["seeds"] == "2"
    assert float(rows[0]["bits per byte"]) < float(rows[1]["bits per byte"])
    assert rows[-1]["certificate"].startswith("disqualified")
    assert rows[-1]["bits per byte"] == ""


def test_markdown_names_every_table_and_plot(written):
    text = (written / "report.md").read_text()
    for path in [*(written / "tables").iterdir(), *(written / "plots").glob("*.png")]:
        assert f"({path.parent.name}/{path.name})" in text
    assert text.count("\n## ") == len(SECTIONS)


def test_the_same_rows_give_the_same_bytes(tmp_path, data):
    bench = full(tmp_path / "rows", data, {"bsbr": 1.5, "standard": 1.6})
    write_report(bench.evaluation, tmp_path / "one")
    again = Bench(tmp_path / "other", bench.evaluation.checkpoints[::-1])
    for row in reversed(bench.results.rows):  # in another order
        again.results.add(row["identity"], row["values"], row["about"])
    write_report(again.evaluation, tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file()
    )
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_what_is_really_measured_becomes_a_report(tmp_path, data):
    ones = [trained(name, **data | {"context_length": 32}) for name in ("standard", "linear", "bsbr")]
    ones[2].module.model.attentions[0].register_forward_hook(lambda module, args, output: output + output.mean(1, True))
    for one in ones:
        torch.nn.init.normal_(one.module.model.branches[0].inner.out.weight, std=0.1)
    results = Results(tmp_path / "results.jsonl")
    evaluation = Evaluation(ones, results, multiples=(1, 2), lengths=(16, 32, 64), rounds=2, command="evaluate.py runs")
    evaluation.run()
    assert evaluation.problems == {}
    write_report(evaluation, tmp_path)
    shown = " ".join(page(tmp_path).text)
    assert "Best:" in shown
    assert "Disqualified: bsbr(chunk_size=8)." in shown
    assert len(page(tmp_path).all("section")) == len(SECTIONS) - 1, "all but the recall tasks"
    (path,) = (tmp_path / "tables").glob("verdict_*.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert rows[-1]["certificate"].startswith("disqualified: suffix_0 ")
    assert all(value for row in rows[:2] for name, value in row.items() if ", " not in name and name != "Pareto front")
    header = (tmp_path / "tables" / "by_length_E1_D1_val.csv").read_text().splitlines()[0]
    assert header.startswith('architecture,32 tokens (1x),"32 tokens (1x), low"')


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>| $x$ **b** `c`'


def test_names_and_messages_are_only_text(tmp_path):
    first, second = checkpoint("standard", path=f"runs/{EVIL}.ckpt"), checkpoint("linear", 3, path=EVIL)
    second.data_arguments["source"] = second.data_class = first.data_fingerprint = EVIL
    bench = Bench(tmp_path, [first, second, Checkpoint(f"{EVIL}2", problem=f"cannot\n# read {EVIL}")])
    bench.measured(first, 1.5)
    bench.measured(second, 1.6, {**CPU, "cpu": EVIL})
    bench.results.add(bench.results.rows[0]["identity"], certificate(), {"command": EVIL})
    write_report(bench.evaluation, tmp_path)
    found = page(tmp_path)
    assert len(found.all("script")) == 1
    assert all(set(attributes) <= {"alt", "src"} for attributes in found.all("img"))
    assert EVIL in " ".join(found.text)
    written = (tmp_path / "report.md").read_text()
    assert "<script" not in re.sub(r"\\<", "", written)
    assert "\n# read" not in written
    rows = [line for line in written.splitlines() if line.startswith("| ") and "cannot" in line]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in rows] == [3]
    for path in (tmp_path / "plots").glob("*.svg"):
        ET.fromstring(path.read_bytes())
    assert all(re.fullmatch(r"[\w-]+\.(csv|png|svg)", path.name) for path in tmp_path.glob("*s/*"))


@pytest.mark.parametrize("problems", [{}, {"a.ckpt": "cannot be read"}])
def test_without_results_there_is_still_a_report(tmp_path, problems):
    write_report(Bench(tmp_path, [], **problems).evaluation, tmp_path)
    shown = " ".join(page(tmp_path).text)
    assert "Nothing has been measured." in shown
    assert ("cannot be read" in shown) == bool(problems)
    assert ("None: every checkpoint" in shown) != bool(problems)
    assert "Costs" not in shown


def test_only_disqualified_checkpoints_are_not_ranked(tmp_path):
    bench = Bench(tmp_path, [one := checkpoint("standard")])
    bench.measured(one, 1.0, passed=False)
    write_report(bench.evaluation, tmp_path)
    shown = " ".join(page(tmp_path).text)
    assert "Nothing is ranked" in shown
    assert "Best:" not in shown


def test_architectures_without_a_map_and_data_that_is_gone_are_named(tmp_path, data):
    first, second = trained("standard", **data), checkpoint("linear", source=str(tmp_path / "gone"))
    bench = Bench(tmp_path, [first, second])
    bench.measured(first, 1.5)
    first.module.model.attentions[1].attention_map = lambda x: (_ for _ in ()).throw(ValueError("there is no map"))
    write_report(bench.evaluation, tmp_path)
    shown = " ".join(page(tmp_path).text)
    assert "standard: there is no map" in shown
    assert "its data cannot be had" in shown


@pytest.mark.parametrize(
    "record", [{}, {"metrics": 3}, {"metrics": {"val/loss": {"step": [None], "value": "x"}}}, {"environment": "a"}]
)
def test_a_run_without_a_sound_record_has_no_clocks(tmp_path, record):
    one = checkpoint("standard", context_length="long")
    one.record = record
    bench = Bench(tmp_path, [one])
    bench.measured(one, 1.5)
    bench.add(one, "cost", cost(256), length=256, rounds=5)
    write_report(bench.evaluation, tmp_path)
    assert "any validation by runs/standard_0/last.ckpt" in " ".join(page(tmp_path).text)
    assert not list((tmp_path / "plots").glob("clocks*"))


@pytest.fixture
def browse(tmp_path):
    """Opens a page in a browser and gives the document as it is then; also as a picture, if asked to."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium to look at the report: apt install chromium")

    def run(page: Path, width: int, *flags: str) -> str:
        command = [
            CHROMIUM,
            *QUIET.split(),
            f"--user-data-dir={tmp_path}/profile",
            f"--window-size={width},3000",
            *flags,
        ]
        return subprocess.run([*command, page.as_uri()], check=True, capture_output=True, text=True, timeout=120).stdout

    return run


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_it_is_seen_in_a_browser_and_fits_a_phone(written, browse, width, dark, tmp_path):
    """In a frame, since a window of Chromium is never as narrow as a phone."""
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<body style="margin:0"><iframe src="{(written / "report.html").as_uri()}" width="{width}" height="3000" '
        'style="border:0" onload="document.title = this.contentDocument.documentElement.scrollWidth"></iframe>'
    )
    flags = ["--allow-file-access-from-files", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]
    title = re.search(r"<title>(\d+)</title>", browse(probe, 1280, *flags, "--dump-dom"))
    assert title
    assert int(title[1]) <= width
    picture = Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"report_{width}{'_dark' * dark}.png"
    browse(probe, 1280, *flags, f"--screenshot={picture}")
    with Image.open(picture) as seen:
        pixels = np.asarray(seen.convert("RGB"))[:, :width]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert (pixels.mean() < 128) == dark


@pytest.mark.parametrize(("clicks", "expected"), [(1, ["bsbr", "standard"]), (2, ["sliding_window", "linear"])])
def test_a_click_on_a_header_sorts_the_rows(written, browse, clicks, expected, tmp_path):
    table = "#table-verdict_E1_D2_val"
    header = f"[...document.querySelectorAll('{table} thead th')].find(th => th.innerText.includes('bits per byte'))"
    script = f"{header}.querySelector('button').click();" * clicks
    sorting = tmp_path / "sorting.html"
    sorting.write_text((written / "report.html").read_text().replace("</body>", f"<script>{script}</script></body>"))
    dom = browse(sorting, 1280, "--dump-dom")
    rows = re.findall(r'<th scope="row" data-sort="(\w+)', dom[dom.index(table[1:]) :])[:6]
    assert rows[:2] == expected
    assert rows[5] == "hopfield", "the disqualified stay last"

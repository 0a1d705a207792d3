"""The report as a whole: complete, the same every time, harmless whatever a file is called, and seen in a browser."""

import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written_rows import CPU, GPU, Bench, about, certificate, cost, picture, recall, text, training

from bsbr_pl.report import warnings, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
ARCHITECTURES = {"bsbr": 1.50, "standard": 1.52, "sliding_window": 1.70, "linear": 1.66, "gau": 1.58}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
SECTIONS = [
    "Leaderboard",
    "Verdict",
    "Problems",
    "Certificates",
    "Accuracy",
    "Length and position",
    "Recall hits in text",
]
SECTIONS += ["Recall tasks", "Costs", "Four clocks", "Decode state", "Attention maps", "Study", "Environments"]
VOID = {"meta", "img", "wbr", "input"}


def full(names: dict[str, float] = ARCHITECTURES) -> Bench:
    """Several architectures, seeds, two environments, a leak, a recall task, a file that could not be read."""
    bench = Bench()
    powers = {"standard": 1.9, "bsbr": 1.04, "gau": 1.4, "linear": 1.0, "sliding_window": 1.01}
    for name in names:
        for seed in (0, 1) if name == "bsbr" else (0,):
            one, bits = about(name, seed), names[name] + 0.004 * seed
            bench.add(one, "certificate", certificate())
            bench.add(one, "training", training(seed))
            bench.add(one, "map", picture())
            for i, length in enumerate((256, 512, 1024, 2048)):
                values = text(bits + i * (0.3 if name == "standard" else -0.02), noise=0.2, seed=seed)
                marks = (0, *(2**k for k in range((length - 1).bit_length())))
                values["by_position"] = [
                    {"start": n, "stop": 2 * n or 1, "loss": bits + 2 / (1 + n) ** 0.5} for n in marks
                ]
                bench.add(one, "text", values, length=length)
            for length in LENGTHS if seed == 0 else ():
                scale = 3e-9 if name == "standard" else 3e-6 * bits
                bench.add(one, "cost", cost(length, powers[name], scale), length=length, rounds=5)
    first = about("bsbr")
    bench.add(first, "certificate", certificate(), GPU)
    bench.add(first, "text", text(1.51), GPU, length=256)
    bench.add(about("hopfield"), "certificate", certificate(False))
    for name, right in (("standard", 0.95), ("linear", 0.6)):
        task = {"class": "InductionData", "kind": "recall", "fingerprint": "0" * 32, "arguments": {"vocab_size": 257}}
        one = about(name, 7, data=task, study={"task": "induction", "model": name, "phase": "final", "rate": 0.01})
        bench.add(one, "certificate", certificate())
        bench.add(one, "recall", recall(right, (64, 128, 256, 512)))
        accuracies = {"val/accuracy_T64": {"step": [199], "value": [right]}}
        bench.add(one, "training", training() | {"metrics": accuracies})
    bench.problem("runs/broken.ckpt", "not a checkpoint")
    bench.problem("gau-0-None", "there is no map", about("gau"), kind="map")
    bench.problem("gau-0-None", "", about("gau"), kind="text")
    return bench


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The folder of a report with everything in it."""
    folder = tmp_path_factory.mktemp("report")
    assert write_report(full().rows, folder) == folder / "report.html"
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
        "broken.ckpt",
        "sub-quadratic: grows as T^1.04",
        "not reached by 16,384",
        "evaluate.py runs",
        "a GPU",
        "0123456789",
        "No map of gau_0/last.ckpt: there is no map",
        "any validation by hopfield_0/last.ckpt",
    ):
        assert words in shown, words
    assert "what went wrong" in shown
    names = {path.stem for path in (written / "tables").iterdir()}
    assert {name.split("_E")[0] for name in names} >= {
        *("first", "verdict", "problems", "certificates", "accuracy", "by_length", "hits", "recall", "cost_training"),
        *("exponents", "crossovers", "environments", "data", "commands", "study_induction"),
    }
    drawn = {path.stem for path in (written / "plots").iterdir()}
    assert {name.split("_E")[0] for name in drawn} >= {
        *("by_length", "by_position_256", "by_position_2048", "hits", "recall", "cost_training", "clocks_1_steps"),
        *("pareto_training", "pareto_state", "attention_3"),
    }
    ids = [attributes["id"] for attributes in found.all("figure")]
    assert set(ids) == {f"table-{name}" for name in names} | {f"plot-{name}" for name in drawn}
    assert len(ids) == len(set(ids)), "an id twice"


def test_the_first_table_has_seven_columns_and_the_wide_one_is_folded(written):
    shown = (written / "report.html").read_text()
    tables = re.findall(r'<figure id="table-(first_\w+)".*?</thead>', shown, re.DOTALL)
    assert tables
    for head in re.findall(r'<figure id="table-first_\w+".*?</thead>', shown, re.DOTALL):
        assert 4 <= head.count('<th scope="col"') <= 7
    assert shown.count("<details>") == len(tables) + 1, "and the runs of the leaderboard"
    assert len(re.findall(r'<details><summary>[^<]*</summary>\s*<figure id="table-verdict_', shown)) == len(tables)


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
    for path in [*(written / "tables").iterdir(), *(written / "plots").iterdir()]:
        assert f"({path.parent.name}/{path.name})" in text
    assert text.count("\n## ") == len(SECTIONS)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    bench = full({"bsbr": 1.5, "standard": 1.6})
    write_report(bench.rows, tmp_path / "one")
    write_report(bench.rows[::-1], tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file()
    )
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_nothing_of_torch_is_imported(tmp_path):
    """In a process of its own, which cannot import torch."""
    script = "import sys; sys.modules['torch'] = None; import bsbr_pl.report; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name in ("bsbr_pl.evals", "bsbr_pl.data", "bsbr_pl.model", "lightning"):
        assert f"'{name}'" not in done.stdout


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>| $x$ **b** `c`'


def test_names_and_messages_are_only_text(tmp_path):
    first = about("standard", path=f"runs/{EVIL}.ckpt", command=EVIL)
    second = about("linear", 3, EVIL, data__class=EVIL, data__arguments={"source": EVIL}, data__fingerprint=EVIL,
                   architecture=f"linear{EVIL}", config={EVIL: EVIL})  # fmt: skip
    bench = Bench()
    bench.measured(first, 1.5)
    bench.measured(second, 1.6, {**CPU, "cpu": EVIL, EVIL: EVIL})
    bench.add(first, "map", picture() | {"caption": EVIL})
    bench.problem(f"{EVIL}2", f"cannot\n# read {EVIL}")
    write_report(bench.rows, tmp_path)
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


@pytest.mark.parametrize("problem", ["", "cannot be read"])
def test_without_results_there_is_still_a_report(tmp_path, problem):
    bench = Bench()
    bench.problem("a.ckpt", problem)
    write_report(bench.rows, tmp_path)
    shown = " ".join(page(tmp_path).text)
    assert "No checkpoint was evaluated here." in shown
    assert ("cannot be read" in shown) == bool(problem)
    assert ("None among the checkpoints" in shown) != bool(problem)
    assert "Costs" not in shown


def test_no_rows_at_all_are_a_report_too(tmp_path):
    assert "No checkpoint was evaluated here." in write_report([], tmp_path).read_text()
    assert warnings([]) == []


def test_only_disqualified_checkpoints_are_not_ranked(tmp_path):
    bench = Bench()
    bench.measured(about("standard"), 1.0, passed=False)
    write_report(bench.rows, tmp_path)
    shown = " ".join(page(tmp_path).text)
    assert "Nothing is ranked" in shown
    assert "Best:" not in shown


@pytest.mark.parametrize("png", ["", "PHN2Zz48L3N2Zz4="])
def test_what_is_no_png_is_no_map(tmp_path, png):
    bench, one = Bench(), about("standard")
    bench.measured(one, 1.5)
    bench.add(one, "map", picture() | {"png": png})
    write_report(bench.rows, tmp_path)
    assert not list(tmp_path.glob("plots/attention*"))


def test_a_map_is_shown_for_one_checkpoint_of_each_configuration(tmp_path):
    bench = Bench()
    for seed in (0, 1):
        bench.measured(about("standard", seed), 1.5)
        bench.add(about("standard", seed), "map", picture())
    write_report(bench.rows, tmp_path)
    (shown,) = tmp_path.glob("plots/attention*")
    with Image.open(shown) as seen:
        assert np.array_equal(np.asarray(seen), np.eye(32, dtype=np.uint8) * 255)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({}, "any validation by last.ckpt"),
        ({"val/loss": {"step": [], "value": []}}, "any validation by"),
        ({"val/loss": {"step": [199], "value": [1.5]}}, "more than one validation by last.ckpt"),
    ],
)
def test_a_course_of_fewer_than_two_points_is_not_drawn(tmp_path, metrics, words):
    bench, one = Bench(), about("standard")
    bench.measured(one, 1.5)
    bench.add(one, "training", training(metrics=metrics))
    write_report(bench.rows, tmp_path)
    assert words in " ".join(page(tmp_path).text)
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
    table = "#table-first_E1_D2_val"
    header = f"[...document.querySelectorAll('{table} thead th')].find(th => th.innerText.includes('bits per byte'))"
    script = f"{header}.querySelector('button').click();" * clicks
    sorting = tmp_path / "sorting.html"
    sorting.write_text((written / "report.html").read_text().replace("</body>", f"<script>{script}</script></body>"))
    dom = browse(sorting, 1280, "--dump-dom")
    rows = re.findall(r'<th scope="row">(.*?)</th>', dom[dom.index(table[1:]) :])[:6]
    rows = [row.replace("<wbr>", "").split("(")[0] for row in rows]
    assert rows[:2] == expected
    assert rows[5] == "hopfield", "the disqualified stay last"


PROBE = """<script>
const scale = document.querySelector(".scale input");
const shown = () => all("div", scale.closest("figure")).map(div => div.hidden);
const before = shown();
scale.click();
const line = document.querySelector("#plot-by_length_E1_D2_val polyline[data-hover]"), plot = line.closest("svg");
all("details").forEach(one => { one.open = true; });
const at = new DOMPoint(line.points[1].x, line.points[1].y).matrixTransform(plot.getScreenCTM());
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: at.x, clientY: at.y}));
document.querySelector('#filter input[value="standard"]').click();
const names = all("#table-first_E1_D2_val tbody tr:not([hidden]) th").map(cell => cell.textContent);
const hidden = all("[data-series=standard]").every(one => one.hasAttribute("hidden"));
document.title = JSON.stringify([before, shown(), tip.textContent, names, hidden]);
</script></body>"""


def test_scales_are_switched_values_are_read_and_architectures_are_hidden(written, browse, tmp_path):
    probe = tmp_path / "probe.html"
    probe.write_text((written / "report.html").read_text().replace("</body>", PROBE))
    title = re.search(r"<title>(.*?)</title>", browse(probe, 1280, "--dump-dom"))
    assert title
    before, after, tip, names, hidden = json.loads(html.unescape(title[1]))
    assert [before[-2:], after[-2:]] == [[False, True], [True, False]]
    assert re.fullmatch(r"bsbr\(chunk_size=8\)\n512: 1\.[45]\d\d \[1\.[45]\d\d, 1\.[45]\d\d\]", tip)
    assert [name.split("(")[0] for name in names] == ["bsbr", "gau", "linear", "sliding_window", "hopfield"]
    assert hidden

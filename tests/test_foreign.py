"""Modules that have nothing but `forward` train, resume, and are compared: docs/howto/own_module.md runs here."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_readme import DATA, EVALUATE, TRAIN, commands, run
from torch import Tensor, nn

import train
from bsbr_pl import foreign
from bsbr_pl.attention import LinearAttention
from bsbr_pl.evals import analyze_results, compare_models
from bsbr_pl.evals.costs import measure_costs
from bsbr_pl.evals.matching import match
from bsbr_pl.foreign import ForeignAttention, build, find, trust
from bsbr_pl.model import LanguageModel
from bsbr_pl.module import LanguageModule
from bsbr_pl.results import check, read_rows
from bsbr_pl.spec import AttentionSpec, plain_specs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/howto/own_module.md").read_text()
MODULE, CERTIFY, COMPARE, TASK = re.findall(r"```python\n(.*?)```", PAGE, re.S)


class Mean(nn.Module):
    """The mean of the tokens so far, times a weight: (B, T, D)."""

    def __init__(self, d_model: int, n_heads: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((d_model,), scale))
        self.n_heads = n_heads

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(x)[:, None]


@pytest.fixture(autouse=True)
def _nothing_is_trusted():
    yield
    trust([])


@pytest.fixture
def here(tmp_path, monkeypatch, one_thread):
    """A folder with the page's module and a text, from which this process imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(foreign, "_given", {})
    (tmp_path / "my_attention.py").write_text(MODULE)
    text = "\n".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n" for i in range(200))
    (tmp_path / DATA["source"]).write_text(text)
    yield tmp_path
    sys.modules.pop("my_attention", None)


@pytest.mark.filterwarnings("ignore:'bsbr_pl.__main__' found in sys.modules")  # other tests use it as well
def test_the_page_runs(here, capfd):
    """Certify, train, resume, evaluate, compare: what the module cannot do is absent, and the rest is there."""
    good, leaky, fit, resume, evaluate, *_ = commands(PAGE)
    assert run(good, []) == 0
    output = capfd.readouterr()
    assert "importing my_attention, as you named it" in output.err
    assert output.out.endswith("MyAttention, 256 tokens: passed\n")
    assert run(leaky, []) == 1
    assert capfd.readouterr().out.splitlines()[-1] in PAGE
    assert not run(fit, TRAIN)
    output = capfd.readouterr().out
    assert "model     my_attention.MyAttention, " in output
    assert "decode state" not in output
    assert not run(resume, [*TRAIN, "--trainer.max_steps=3"])
    record = json.loads(Path("runs/version_0/record.json").read_text())
    assert record["steps"] == 3
    assert record["run"]["arguments"]["model.attention"] == "my_attention.MyAttention"
    assert record["run"]["arguments"]["model.attention.window"] == 16
    metrics = record["metrics"]
    D, T, V = 16, 32, 257
    products = 2 * T * (4 * D * D + 2 * T * D + 8 * D * D + V * D)  # of attention with a mask, feed-forward and head
    assert set(metrics["flops/forward_flops"]["value"]) == {products}, "before and after the resume"
    assert metrics["flops/uncounted_operators"]["value"][0] > 0
    absent = [name for name in metrics if "closed_form" in name or name.startswith("attention/")]
    assert absent == []
    assert run(evaluate, EVALUATE) == 0
    check_rows(products - 2 * T * V * D)
    capfd.readouterr()
    exec(CERTIFY)
    assert "passed" in capfd.readouterr().out
    exec(COMPARE)
    assert re.search(r"decode_time.*\n *mine +- +- ", capfd.readouterr().out)


@pytest.mark.filterwarnings("ignore")  # of scripts, which are not tested for warnings
def test_a_study_of_the_module(here, monkeypatch, capfd):
    monkeypatch.syspath_prepend(ROOT / "study")
    for folder in ("study", "configs"):
        (here / folder).symlink_to(ROOT / folder)
    page = PAGE[PAGE.index("mkdir -p mine") : PAGE.index("## Your own task")]
    shell, study = page.split("python study/run.py ", 1)
    subprocess.run(["bash", "-ec", shell], check=True)
    options, _, trusted = study.split("\n")[0].partition(" -- ")
    sizes = ["--model.hidden_dim=16", "--data.num_train=64", "--data.num_test=8"]
    small = ["--steps=2", "--rates", "0.01", "--seeds", "1", "--", *sizes]
    assert not run("study/run.py " + options, [*small, *trusted.split()])
    rows = read_rows(["runs/mine/induction/results.jsonl"])
    results = {row["about"]["study"]["model"]: row["values"] for row in rows if row["identity"]["kind"] == "training"}
    assert results.keys() == {"mine", "delta_net"}
    assert all(0 <= values["result"]["test"] <= 1 for values in results.values())
    assert results["mine"]["result"]["flops_per_token"] > 0
    assert "state_bytes" not in results["mine"]["result"]


def test_a_task_of_your_own(here, capfd):
    (here / "my_tasks.py").write_text(TASK)
    fit, evaluate = (one for one in commands(PAGE) if "my_tasks" in one)
    small = ["--model.hidden_dim=16", "--model.num_layers=1", "--trainer.max_steps=2"]
    assert not run(fit, small)
    assert "evaluate.py runs/version_0 --trust=my_tasks\n" in capfd.readouterr().out
    assert run(evaluate, ["--lengths=[]"]) == 0
    (found,) = (row for row in read_rows(["evaluation/results.jsonl"]) if row["identity"]["kind"] == "recall")
    assert found["about"]["data"]["class"] == "FirstToken"


def check_rows(flops: int) -> None:
    """The rows of one evaluation with costs at 16 tokens."""
    rows = read_rows(["evaluation/results.jsonl"])
    by_kind: dict[str, list] = {}
    for row in rows:
        check(row)
        by_kind.setdefault(row["identity"]["kind"], []).append(row)
    assert by_kind.keys() == {"training", "certificate", "text", "cost"}, by_kind.get("problem")
    (cost,) = by_kind["cost"]
    assert cost["values"].keys() == {
        *("forward", "training", "forward_bytes", "training_bytes", "forward_flops", "uncounted"),
    }
    T, D = 16, 16
    assert cost["values"]["forward_flops"] == 2 * T * (4 * D * D + 2 * T * D + 8 * D * D)
    assert "aten::_native_multi_head_attention" in cost["values"]["uncounted"]
    about = cost["about"]
    assert about["architecture"] == "MyAttention(window=16)"
    assert about["attention"] == ["my_attention.MyAttention"]
    tokens = about["run"]["tokens"]
    assert about["run"]["flops"] == pytest.approx(3 * tokens * (flops + 2 * 32 * 257 * 16) / 32)
    assert all(row["values"]["passed"] for row in by_kind["certificate"])
    page = Path("evaluation/report.md").read_text()
    assert "MyAttention(window=16) has no closed form: torch's counter counted it; fvcore has no formula for" in page


def test_what_is_not_trusted_is_not_imported(here, capfd):
    assert run("train.py fit --model.attention=my_attention.MyAttention", TRAIN) == 2
    refused = "my_attention.MyAttention is of a package that is not trusted: add --trust=my_attention"
    assert refused in capfd.readouterr().err
    assert "my_attention" not in sys.modules
    fit = commands(PAGE)[2]
    assert not run(fit, TRAIN)
    del sys.modules["my_attention"]
    foreign._given.clear()
    assert run("evaluate.py runs/", EVALUATE) == 1
    assert "--trust=PACKAGE" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"module='my_attention.MyAttention' .*\(--trust=my_attention\)"):
        ForeignAttention(16, 2, "my_attention.MyAttention")
    for path in ("torch.nn.Identity", "my_attention.MyAttention", "bsbr_pl.foreign.ForeignAttention"):
        init_args = {"module": "torch.nn.Identity"} if path.startswith("bsbr_pl") else {}
        with pytest.raises(ValueError, match="or a class of a package that is trusted"):
            AttentionSpec.of({"class_path": path, "init_args": init_args})
    assert "my_attention" not in sys.modules
    config = Path("runs/version_0/config.yaml")  # names the wrapper and its module
    assert not run(f"train.py fit --trust my_attention --config {config}", [])
    sys.modules.pop("my_attention")
    foreign._given.clear()
    assert run("train.py fit --model.attention=my_attention.MyAttention", TRAIN) == 2, "what was trusted is withdrawn"
    assert refused in capfd.readouterr().err
    assert "my_attention" not in sys.modules


MISTAKES = {
    "--model.attention.nope=1": r"unexpected keyword argument 'nope'; give it other init_args",
    "--model.num_heads=3": "hidden_dim must be a multiple of num_heads",
}


@pytest.mark.parametrize("option", MISTAKES)
def test_mistakes_are_answered_in_a_sentence(here, option):
    with pytest.raises(ValueError, match=MISTAKES[option]):
        train.main(["fit", "--trust=my_attention", "--model.attention=my_attention.MyAttention", *TRAIN, option])


def test_sizes_go_to_the_arguments_that_mean_them():
    built = build(Mean, 8, 2, {"scale": 2.0})
    assert (built.weight.tolist(), built.n_heads) == ([2.0] * 8, 2)
    assert build(Mean, 8, None, {"d_model": 3}).n_heads == 1
    assert build(nn.Identity, 8, 2, {}) is not None
    with pytest.raises(ValueError, match=r"Mean\(\) cannot be built: .*'d_model'"):
        build(Mean, None, None, {})


def test_of_names_and_classes():
    """One spec, given as a class, a partial or plain values; after that the class is found by its path."""
    spec = AttentionSpec.of(partial(Mean, scale=0.5))
    assert str(spec) == "Mean(scale=0.5)"
    assert plain_specs(spec) == {"class_path": f"{__name__}.Mean", "init_args": {"scale": 0.5}}
    assert AttentionSpec.of(plain_specs(spec)) == spec
    assert AttentionSpec(ForeignAttention, {"module": spec.key, "options": {"scale": 0.5}}) == spec
    assert (spec.key, spec.settings, spec.replaces_feed_forward) == (f"{__name__}.Mean", {"scale": 0.5}, False)
    trust(["torch.nn"])
    assert find("torch.nn.Identity") is nn.Identity
    assert find("torch.nn.functional.relu") is None
    assert find("torch.nnn.Identity") is None
    assert find("torchvision.models.VGG") is None
    trust([])
    assert find("torch.nn.Identity") is None


def test_it_is_the_module_and_keeps_its_start():
    torch.manual_seed(0)
    model = LanguageModel([AttentionSpec(Mean, {"scale": 0.25}), LinearAttention], 11, 8, num_layers=2, num_heads=2)
    mean = model.attentions[0]
    assert (mean.has_map, mean.has_decode, mean.reach, mean.period) == (False, False, None, 1)
    for absent in (mean.state_size, mean.flops, mean.attention_map):
        with pytest.raises(NotImplementedError, match="Mean is a module of another library and has no "):
            absent(3)
    assert mean.module.weight.tolist() == [0.25] * 8
    x = torch.randn(3, 5, 8)
    expected = torch.stack([0.25 * x[:, : t + 1].mean(1) for t in range(5)], 1)
    torch.testing.assert_close(mean(x), expected)
    first, state = mean.prefill(x[:, :3])
    rest, state = mean.prefill(x[:, 3:4], state)
    last, _ = mean.step(x[:, 4], state)
    torch.testing.assert_close(torch.cat((first, rest, last[:, None]), 1), expected)
    assert mean.prefill(x[:, :0])[0].shape == (3, 0, 8)
    ids = torch.tensor([[1, 2, 3]])
    generated = model.eval().generate(ids, 4, temperature=0)
    for n in range(3, 7):
        assert generated[0, n] == model(generated[:, :n])[0, -1].argmax()


def test_outputs_of_another_form():
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return 2 * x, None

    x = torch.ones(1, 2, 4)
    assert torch.equal(ForeignAttention(4, 1, Pair)(x), 2 * x)
    with pytest.raises(ValueError, match=r"Flatten must map \(B, T, D\) to \(B, T, D\), got \(1, 8\) for \(1, 2, 4\)"):
        ForeignAttention(4, 1, nn.Flatten)(x)
    with pytest.raises(ValueError, match=r"MultiheadAttention.forward must take one tensor: missing .*'key'; wrap it"):
        ForeignAttention(4, 1, nn.MultiheadAttention)(x)


def test_costs_of_what_cannot_be_counted(one_thread):
    """Data decides the control flow: neither counter can run it, so FLOPs are absent; another model keeps its own."""

    class Asks(Mean):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().sum()) > 0 else x

    models = {
        "asks": LanguageModel(AttentionSpec(Asks), 11, 8, num_layers=1, num_heads=2),
        "linear": LanguageModel(LinearAttention, 11, 8, num_layers=1, num_heads=2),
    }
    found = measure_costs(models, 6, rounds=1)
    assert found["asks"].keys() == {"forward", "training", "forward_bytes", "training_bytes", "uncounted"}
    assert found["linear"]["forward_flops"] == models["linear"].flops(6) - 2 * 6 * 8 * 11
    assert {"decode", "state_bytes"} <= found["linear"].keys()


def test_comparisons(tmp_path, one_thread):
    """Trained by the comparison, disqualified if it leaks, matched by what it has."""

    class Leaks(Mean):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x.mean(1, keepdim=True).expand_as(x)

    models = {"mine": partial(Mean, scale=0.5), "leaky": Leaks, "Standard": "Standard"}
    with pytest.warns(UserWarning, match="leaky is excluded"):
        found = compare_models(
            (8, 12), models, ("state_size", "flops", "accuracy"), hidden_dim=16, num_heads=2, num_layers=1,
            train_steps=2, cache_dir=tmp_path, device="cpu", rounds=1,
        )  # fmt: skip
    assert {"suffix_0", "training_suffix"} <= set(found["disqualified"]["leaky"])
    assert found["mine"]["state_size"] == [None, None]
    assert found["mine"]["flops"] == [2 * T * 8 * 16 * 16 for T in (8, 12)], "the feed-forward network"
    assert [row["model"] for row in analyze_results(found)["rankings"]["state_size"]] == ["Standard"]
    assert all(0 <= value <= 1 for value in found["mine"]["accuracy"])
    arguments = {"vocab_size": 16, "hidden_dim": 16, "num_layers": 1, "num_heads": 2}
    sized = {name: {**arguments, "attention": AttentionSpec.of(models[name])} for name in ("mine",)}
    sized["standard"] = {**arguments, "attention": AttentionSpec.of("standard")}
    matched = match("params", sized, 8, "standard")["mine"]
    assert matched.value == pytest.approx(matched.reference, rel=0.01)
    with pytest.raises(ValueError, match=r"match=state_bytes: Mean\(scale=0.5\) does not say its state_bytes"):
        match("state_bytes", sized, 8, "standard")


def test_a_trained_one_is_loaded_again(tmp_path):
    module = LanguageModule(attention=partial(Mean, scale=0.5), vocab_size=11, hidden_dim=8, num_layers=1, num_heads=2)
    assert module.hparams["attention"] == {"class_path": f"{__name__}.Mean", "init_args": {"scale": 0.5}}
    again = LanguageModule(**module.hparams)
    assert type(again.model.attentions[0].module) is Mean


def test_the_command_finds_a_module_in_the_working_directory(tmp_path):
    """As a stranger runs it: from a folder of their own, the installed command."""
    (tmp_path / "my_attention.py").write_text(MODULE)
    start = "import sys; sys.path.pop(0); from bsbr_pl.__main__ import main; sys.exit(main())"
    options = ["certify", "my_attention:Forgotten", "--hidden_dim=8", "--num_heads=2", "--length=40"]
    command = [sys.executable, "-W", "ignore", "-c", start, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "Forgotten, 40 tokens: FAILED; token 0 is the first that saw the future"

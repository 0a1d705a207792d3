"""evaluate.py on real checkpoints: trained ones, a leaky one, damaged and hostile ones."""

import base64
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor

from bsbr_pl.__main__ import main as command
from bsbr_pl.attention import ARCHITECTURES, StandardAttention
from bsbr_pl.data import InductionData
from bsbr_pl.evals.checkpoints import _digest as weights_digest
from bsbr_pl.evals.checkpoints import find, read, read_all
from bsbr_pl.evals.evaluation import Evaluation
from bsbr_pl.evals.pictures import course, draw_map
from bsbr_pl.evals.subject import Subject, describe_model
from bsbr_pl.module import LanguageModule
from bsbr_pl.results import Results, open_problems
from callbacks import RunRecorder

ROOT = Path(__file__).parents[2]


def main(arguments: list[str]) -> int:
    return command(["evaluate", *arguments])


def evaluate(runs: Path, results: Results, **options) -> tuple[Evaluation, list[dict]]:
    """An evaluation, and its rows."""
    chosen = {name: options.pop(name) for name in ("multiples", "lengths") if name in options}
    evaluation = Evaluation(results, **options)
    subjects = [checkpoint.subject() for checkpoint in read_all([runs], trusted=True)]
    evaluation.run(subjects, **chosen)
    return evaluation, evaluation.rows(subjects)


def said(evaluation: Evaluation) -> list[str]:
    return [row["values"]["problem"] for row in evaluation.problems]


class UpperTriangle(StandardAttention):
    """Looks at the future instead of the past."""

    def prefill(self, x: Tensor, state=None):
        y, state = super().prefill(x.flip(1), state)
        return y.flip(1), state


def train(folder: Path, attention, data, seed: int = 0) -> None:
    seed_everything(seed, verbose=False)
    module = LanguageModule(attention, data.vocab_size, hidden_dim=16, num_layers=1, num_heads=2, warmup_steps=2)
    Trainer(
        default_root_dir=folder,
        logger=False,
        callbacks=[RunRecorder(), ModelCheckpoint(folder, "best", monitor="val/loss", save_last=True)],
        max_epochs=-1,
        max_steps=8,
        val_check_interval=4,
        log_every_n_steps=4,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    ).fit(module, data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_data) -> Path:
    """Two seeds of one architecture, another one, a recall task, a leak, and four files that are no checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    bsbr = partial(ARCHITECTURES["bsbr"], chunk_size=8)
    train(folder / "bsbr0", bsbr, make_data(seed=0), seed=0)
    train(folder / "bsbr1", bsbr, make_data(seed=1), seed=1)
    train(folder / "linear", partial(ARCHITECTURES["linear"], chunk_size=8), make_data())
    train(
        folder / "recall",
        partial(ARCHITECTURES["bsbr"], chunk_size=4),
        InductionData(16, 16, [8, 16], num_train=64, num_test=20, batch_size=8),
    )
    train(folder / "leaky", UpperTriangle, make_data())
    whole = (folder / "linear" / "best.ckpt").read_bytes()
    broken = folder / "broken"
    broken.mkdir()
    (broken / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (broken / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, broken / "foreign.ckpt")

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (broken / "was_here",))

    with (broken / "hostile<script>.ckpt").open("wb") as stream:
        pickle.dump({"hyper_parameters": Hostile(), "state_dict": {}}, stream)
    saved = torch.load(folder / "linear" / "best.ckpt", weights_only=True)
    saved["hyper_parameters"]["num_layers"] = 10**9
    torch.save(saved, broken / "endless.ckpt")
    saved["hyper_parameters"] |= {"num_layers": 1, "vocab_size": 10**12}
    torch.save(saved, broken / "huge.ckpt")
    return folder


@pytest.fixture(scope="module")
def evaluated(runs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluation")
    arguments = [
        str(runs),
        f"--output_dir={output}",
        "--lengths=[16,32,64]",
        "--rounds=2",
        "--multiples=[1,2]",
        "--trust_data",
    ]
    assert main([*arguments, "--device=cpu"]) == 0
    return output


def rows(output: Path, kind: str) -> list[dict]:
    lines = (output / "results.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["identity"]["kind"] == kind]


def by_name(output: Path, kind: str, **facts: int) -> dict[str, dict]:
    found = [row for row in rows(output, kind) if facts.items() <= row["identity"].items()]
    return {row["about"]["checkpoint"]["name"]: row for row in found}


def test_everything_is_measured_once(runs, evaluated):
    certificates = {
        row["about"]["checkpoint"]["name"]: row["values"]["passed"] for row in rows(evaluated, "certificate")
    }
    assert len(certificates) == len({c.digest for c in read_all([runs]) if not c.problem})
    assert not any(passed for name, passed in certificates.items() if "leaky" in name)
    assert all(passed for name, passed in certificates.items() if "leaky" not in name)
    texts = rows(evaluated, "text")
    assert {(row["about"]["architecture"], row["identity"]["length"]) for row in texts} >= {
        ("bsbr(chunk_size=8)", 32),
        ("bsbr(chunk_size=8)", 64),
        ("linear(chunk_size=8)", 64),
    }
    assert {row["about"]["seed"] for row in texts if "bsbr" in row["about"]["architecture"]} == {0, 1}
    (recall,) = rows(evaluated, "recall")
    assert recall["about"]["architecture"] == "bsbr(chunk_size=4)"
    routed, (layer,) = recall["values"]["retrieval"], recall["values"]["retrieval"]["layers"]
    assert (routed["accuracy"], routed["questions"]) == (pytest.approx(recall["values"]["accuracy"]), 40)
    assert 0 < layer["questions"] < routed["questions"], "some answers stand in the chunk of their question"
    table = (evaluated / "report.html").read_text().split("The router: ", 1)[1].split("</table>")[0]
    assert f">{layer['questions']}<" in table
    assert not any("UpperTriangle" in row["about"]["architecture"] for row in texts)
    costs = rows(evaluated, "cost")
    assert sorted((row["identity"]["length"], len(row["about"]["timed_with"])) for row in costs) == [
        (length, 3) for length in (16, 32, 64) for _ in range(3)
    ], "seeds share their costs; a leak has none"


def test_a_second_call_measures_nothing_and_gives_the_same_report(runs, evaluated, monkeypatch):
    def files() -> dict[str, bytes]:
        return {str(p.relative_to(evaluated)): p.read_bytes() for p in evaluated.rglob("*") if p.is_file()}

    before = files()
    for name in ("certify", "text_accuracy", "recall_accuracy", "measure_costs"):
        monkeypatch.setattr(f"bsbr_pl.evals.evaluation.{name}", lambda *a, **k: pytest.fail("measured again"))
    arguments = [
        str(runs),
        f"--output_dir={evaluated}",
        "--lengths=[16,32,64]",
        "--rounds=2",
        "--multiples=[1,2]",
        "--trust_data",
    ]
    assert main([*arguments, "--device=cpu"]) == 0
    assert files() == before


def test_the_validation_loss_is_that_of_training(runs, evaluated):
    found = {
        row["about"]["checkpoint"]["name"]: row for row in rows(evaluated, "text") if row["identity"]["length"] == 32
    }
    assert len(found) >= 3
    for name, row in found.items():
        record = read(Path(name)).record["metrics"]["val/loss"]
        assert record["step"][-1] + 1 == row["about"]["step"], "the checkpoint has seen its own validation"
        assert row["values"]["loss"] == pytest.approx(record["value"][-1], abs=1e-6)


def test_what_is_no_checkpoint_is_named_and_runs_no_code(runs, evaluated):
    report = (evaluated / "report.html").read_text()
    for name in ("truncated.ckpt", "empty.ckpt", "foreign.ckpt", "hostile&lt;script&gt;.ckpt", "huge.ckpt"):
        assert name in report
    assert "hostile<script>" not in report
    assert not (runs / "broken" / "was_here").exists()
    assert "1000000000 layers" in (read(runs / "broken" / "endless.ckpt").problem or "")
    assert read(runs / "broken" / "huge.ckpt").problem
    assert "disqualified" in report


def test_rows_hold_the_compressors_of_their_text_and_the_convolutions(runs, evaluated):
    own = [row for row in rows(evaluated, "text") if "compressed" in row["values"]]
    assert {row["identity"]["length"] for row in own} == {32}, "at the length of validation alone"
    for row in own:
        text = read(Path(row["about"]["checkpoint"]["name"]), trusted=True).open_data().text_data.text("val")
        sizes = {"xz -9": len(lzma.compress(text, preset=9)), "gzip -9": len(gzip.compress(text, 9))}
        assert len(text) >= row["values"]["bytes"]
        assert row["values"]["compressed"] == {name: 8 * size / len(text) for name, size in sizes.items()}
    taps = {row["about"]["attention"][0]: row["about"]["conv_size"] for row in own}
    expected = {"standard": 1, "linear": 4, "bsbr": 4}
    assert taps
    assert all(set(sizes) == {expected[name]} for name, sizes in taps.items() if name in expected)


def test_another_precision_is_another_row(runs, evaluated, tmp_path):
    shutil.copy(evaluated / "results.jsonl", tmp_path)
    results = Results(tmp_path / "results.jsonl")
    before = len(results.rows)
    evaluation, _ = evaluate(runs / "linear", results, dtype="float64", multiples=[1], lengths=[])
    assert not evaluation.problems
    new = results.rows[before:]
    assert {row["identity"]["environment"]["dtype"] for row in new} == {"float64"}
    old = [r for r in rows(evaluated, "text") if r["about"]["architecture"] == "linear(chunk_size=8)"]
    assert new[1]["values"]["loss"] == pytest.approx(old[0]["values"]["loss"], rel=1e-4)


def test_data_that_cannot_be_had_does_not_stop_the_rest(runs, tmp_path, monkeypatch):
    def gone(self, **changes):
        raise ValueError("source='x' is gone")

    monkeypatch.setattr("bsbr_pl.evals.checkpoints.Checkpoint.open_data", gone)
    evaluation, rows = evaluate(runs / "linear", Results(tmp_path / "r.jsonl"), lengths=[16, 32], rounds=1)
    assert {row["identity"]["of"]["kind"] for row in evaluation.problems} == {"data", "map"}
    assert all("is gone" in words for words in said(evaluation))
    assert len([row for row in rows if row["identity"]["kind"] == "cost"]) == 2


def test_interrupting_keeps_what_was_measured(runs, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bsbr_pl.evals.evaluation.measure_costs", interrupt)
    assert main([str(runs / "linear"), f"--output_dir={tmp_path}", "--multiples=[1]", "--trust_data"]) == 130
    assert {row["identity"]["kind"] for row in Results(tmp_path / "results.jsonl").rows} == {
        *("training", "certificate", "text", "map")
    }
    assert (tmp_path / "report.html").exists()


def test_running_out_of_memory_at_one_length_is_a_problem_of_that_length(runs, tmp_path, monkeypatch):
    from bsbr_pl.evals import evaluation as module

    measure = module.measure_costs

    def scarce(models, length, *args):
        if length > 16 and not enough:
            raise RuntimeError("not enough memory: you tried to allocate 1 TB")
        return measure(models, length, *args)

    enough: list[bool] = []

    monkeypatch.setattr(module, "measure_costs", scarce)
    results = Results(tmp_path / "r.jsonl")
    options = {"multiples": [1], "lengths": [16, 32], "rounds": 1}
    evaluation, rows = evaluate(runs / "linear", results, **options)
    assert [row["identity"]["length"] for row in rows if row["identity"]["kind"] == "cost"] == [16]
    (problem,) = evaluation.problems
    assert "costs at 32 tokens: not enough memory" in problem["values"]["problem"]
    assert problem["identity"]["of"] == {"kind": "cost", "length": 32}
    assert open_problems(results.rows) == [problem]
    before = results.path.read_text()
    evaluate(runs / "linear", results, **options)
    assert results.path.read_text() == before, "the same problem is written once"
    enough.append(True)
    evaluation, rows = evaluate(runs / "linear", results, **options)
    assert [row["identity"]["length"] for row in rows if row["identity"]["kind"] == "cost"] == [16, 32]
    assert evaluation.problems == open_problems(results.rows) == []


def test_find_takes_folders_files_and_patterns_once_each(runs, tmp_path):
    everything = find([runs])
    assert everything == find([runs, runs / "linear", str(runs / "*" / "*.ckpt")])
    assert {path.name for path in find([runs / "linear"])} == {"best.ckpt", "last.ckpt"}
    (tmp_path / "link.ckpt").symlink_to(everything[0])
    assert find([everything[0], tmp_path / "link.ckpt"]) == [everything[0]]
    with pytest.raises(ValueError, match="is not there"):
        find([tmp_path / "nothing"])
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint"):
        find([tmp_path / "void"])
    (tmp_path / "folder.ckpt").mkdir()
    assert read(tmp_path / "folder.ckpt").problem


def test_configurations_differ_in_what_was_chosen_and_seeds_do_not(runs, tmp_path, make_data):
    train(tmp_path / "narrow", partial(ARCHITECTURES["bsbr"], chunk_size=8), make_data(context_length=16))
    first, second, narrow = (
        read(folder / "best.ckpt").about for folder in (runs / "bsbr0", runs / "bsbr1", tmp_path / "narrow")
    )
    assert first["config"] == second["config"]
    assert (first["seed"], second["seed"]) == (0, 1)
    differing = {name for name in first["config"] if first["config"][name] != narrow["config"][name]}
    assert differing == {"data.context_length"}
    assert first["architecture"] == narrow["architecture"] == "bsbr(chunk_size=8)"


def test_about_describes_model_data_and_run(runs, evaluated, make_data):
    module = read(runs / "bsbr0" / "best.ckpt").module
    (row,) = [row for row in rows(evaluated, "certificate") if "bsbr0/best" in row["about"]["checkpoint"]["name"]]
    about, data = row["about"], make_data(seed=0)
    data.prepare_data()
    assert about["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    sizes = {"vocab_size": 257, "hidden_dim": 16, "num_layers": 1, "num_heads": 2, "ff_dim": None}
    assert (about["attention"], about["sizes"], about["seed"], about["step"]) == (["bsbr"], sizes, 0, 8)
    told = {name: about["data"][name] for name in ("class", "kind", "fingerprint", "tokenizer", "train_lengths")}
    assert told == {"class": "TextData", "kind": "text", "fingerprint": data.fingerprint, "tokenizer": "bytes",
                    "train_lengths": {"32": 1}}  # fmt: skip
    assert (about["data"]["validation_length"], about["data"]["trained_length"]) == (32, 32)
    assert about["run"]["budget"] == ["8 steps", 8 * 4 * 32, 4, None]
    assert about["command"].startswith("python")
    (recall,) = rows(evaluated, "recall")
    assert recall["about"]["data"]["kind"] == "recall"
    for name, told in recall["about"].items():
        assert type(told) is type(about[name]), "rows of every checkpoint say the same"


def test_the_course_of_a_training_is_a_row(runs, evaluated):
    found = {row["identity"]["checkpoint"]: row for row in rows(evaluated, "training")}
    for checkpoint in (one for one in read_all([runs]) if not one.problem):
        values = found[checkpoint.digest]["values"]
        recorded = {n: c for n, c in checkpoint.record["metrics"].items() if n.startswith("val/")}
        assert values["metrics"] == recorded
        assert values["seconds"] == checkpoint.record["seconds"]
        assert (values["precision"], values["processes"]) == ("32-true", 1)
        assert values["environment"]["cpu"] == checkpoint.record["environment"]["cpu"]


def test_a_long_course_is_thinned_and_keeps_its_end():
    steps = list(range(0, 25_000, 10))
    columns = {"step": steps, "value": [1 / (1 + step) for step in steps], "seconds": [0.5 * step for step in steps]}
    record = {"metrics": {"val/loss": columns, "train/loss": columns, "flops/step_flops": columns}, "seconds": 9.0}
    found = course(record)["metrics"]
    assert set(found) == {"val/loss", "flops/step_flops"}
    assert len(found["val/loss"]["step"]) == 834, "every third of 2,500"
    assert found["val/loss"]["step"][-1] == steps[-1]
    for step, value in zip(found["val/loss"]["step"], found["val/loss"]["value"], strict=True):
        assert value == 1 / (1 + step)


def test_a_map_is_drawn_once_for_each_configuration_and_is_white_where_nothing_is_attended(runs, evaluated):
    found = {row["about"]["checkpoint"]["name"]: row["values"] for row in rows(evaluated, "map")}
    assert len(found) == 4, "seeds share theirs"
    assert not any("bsbr1" in name for name in found)
    for name, values in found.items():
        png = base64.b64decode(values["png"])
        assert len(png) <= 60_000
        assert name in values["caption"]
        assert values["caption"].endswith("White is exactly 0.")
        with Image.open(io.BytesIO(png)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert (pixels == 255).all(-1).mean() > 0.3, "the future is white"
        assert (pixels != 255).any(-1).mean() > 0.05


@pytest.mark.parametrize(("heads", "length"), [(4, 128), (8, 512)])
def test_a_map_is_small_even_where_every_weight_differs(make_data, heads, length):
    torch.manual_seed(0)
    model = LanguageModule(StandardAttention, 257, hidden_dim=32, num_layers=6, num_heads=heads).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(3 * torch.randn_like(parameter))
    values = draw_map(model, make_data(eval_context_length=length, eval_batch_size=1), "x")
    assert len(base64.b64decode(values["png"])) <= 60_000
    assert "Layers 0, 2, 3, 5; the first 4 heads." in values["caption"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not there"),
        (["{runs}", "--rounds=0"], "rounds must be at least 1"),
        (["{runs}", "--lengths=[0]"], "lengths must be at least 1"),
        (["{runs}", "--dtype=int8"], "dtype"),
        (["{runs}", "--device=toaster"], "device='toaster' cannot be used here"),
        (["{runs}/linear", "--output_dir={runs}/linear/best.ckpt", "--device=cpu"], "best.ckpt/results.jsonl"),
        (["{runs}", "--colour=red"], "colour"),
    ],
)
def test_a_bad_argument_is_named(runs, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([argument.format(runs=runs) for argument in arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_it_runs_as_a_module_outside_the_checkout(runs, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "bsbr_pl", "evaluate", str(runs / "linear"), str(runs / "broken")]
    options = ["--lengths=[16,32]", "--rounds=1", "--multiples=[1]", "--device=cpu", "--trust_data"]
    paths = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run([*command, *options], **paths, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "truncated.ckpt" in done.stderr
    assert (tmp_path / "evaluation" / "report.html").exists()
    assert f"python -m bsbr_pl evaluate {runs}" in (tmp_path / "evaluation" / "results.jsonl").read_text()


def test_evaluate_has_a_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "timing rounds; every round times all models" in " ".join(capsys.readouterr().out.split())


NO_TORCH = """
import sys
sys.modules["torch"] = None
from bsbr_pl.__main__ import main, run
sys.exit(main(sys.argv[1:]) if sys.argv[1] == "report" else run("evaluate", sys.argv[1:], "evaluate.py"))
"""


@pytest.mark.parametrize("command", [["report"], []])
def test_rows_of_two_machines_make_one_report_without_torch(runs, evaluated, tmp_path, command):
    """Rows of one file are divided into two: the report of both is that of the whole."""
    lines = (evaluated / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[::2]))
    (tmp_path / "b.jsonl").write_text("".join(lines[1::2]))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *command, *files, f"--output_dir={tmp_path / 'both'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both" / "report.html").read_bytes() == (evaluated / "report.html").read_bytes()
    assert not (tmp_path / ".lock").exists(), "nothing is written beside the rows"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere.jsonl"], "nowhere.jsonl"),
        (["report", "x.ckpt"], "x.ckpt is no results.jsonl: give either results or checkpoints"),
        (["evaluate", "x.jsonl", "x.ckpt"], "x.ckpt is no results.jsonl: give either results or checkpoints"),
        (["report", "{empty}"], "there is no row of a result in "),
        (["report"], "paths"),
        (["report", "{empty}", "--colour=red"], "colour"),
        (["draw"], "there is no command draw; there are evaluate, report, "),
        (["reprot"], "there is no command reprot: did you mean report?"),
        (["match", "--match=parms"], "step_time: did you mean params?"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit) as stop:
        command([argument.format(empty=tmp_path / "empty.jsonl") for argument in arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[0]


def test_the_commands_are_listed(capsys):
    assert command(["--help"]) == command([]) == 0
    printed = capsys.readouterr().out
    for name in ("evaluate", "report", "certify", "match", "retrieval", "submit", "lm-eval", "export"):
        assert printed.count(f"\n  {name} ") == 2
        with pytest.raises(SystemExit) as stop:
            command([name, "--help"])
        assert stop.value.code == 0


def test_rows_of_another_commit_are_not_taken_over(make_module, monkeypatch):
    module = make_module("linear")
    about = describe_model("a", "0", module.hparams, module.model)
    found = []
    for commit in ("one", "two"):
        monkeypatch.setattr("bsbr_pl.evals.evaluation.git_commit", lambda commit=commit: {"commit": commit})
        found.append(Evaluation(Results(None)).identity(Subject(module.model, about), "certificate"))
    assert [identity["environment"].pop("commit") for identity in found] == [{"commit": "one"}, {"commit": "two"}]
    assert found[0] == found[1]


def test_weights_of_another_model_are_another_checkpoint(make_module, tmp_path):
    """Rotary positions have no weights: two models with equal weights, and not the same predictions."""
    for name, rope in (("a", True), ("b", False), ("c", True)):
        module = make_module("standard", rope=rope)
        content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        torch.save(content | {"pytorch-lightning_version": "2.6.6", "name": name}, tmp_path / f"{name}.ckpt")
    a, b, c = (read(tmp_path / f"{name}.ckpt").digest for name in "abc")
    about = read(tmp_path / "b.ckpt").about["checkpoint"]
    assert (about["name"], about["digest"]) == ((tmp_path / "b.ckpt").as_posix(), b)
    assert a == c != b
    assert [checkpoint.digest for checkpoint in read_all([tmp_path])] == [a, b]


def test_other_code_of_a_foreign_class_is_another_model(make_module, monkeypatch):
    """Of this package, the version and the commit tell the code."""
    foreign, own = LanguageModule(UpperTriangle, 50, hidden_dim=16, num_layers=1, num_heads=2), make_module("linear")
    found = []
    for code in ("causal", "not causal", "causal"):
        monkeypatch.setattr("bsbr_pl.utils.code.inspect.getsource", lambda cls, code=code: code)
        for module in (foreign, own):
            body = describe_model("a", "0", module.hparams, module.model)["checkpoint"]["body"]
            found.append((weights_digest(module), body))
    a, own_a, b, own_b, c, own_c = found
    assert (a, own_a, own_b) == (c, own_b, own_c)
    assert a[0] != b[0]
    assert a[1] != b[1]


def test_a_leak_behind_weights_of_zero_is_found():
    """A model whose output maps are 0 sees nothing, neither past nor future."""
    torch.manual_seed(0)
    module = LanguageModule(UpperTriangle, 50, hidden_dim=16, num_layers=1, num_heads=2)
    torch.nn.init.zeros_(module.model.attentions[0].out.weight)
    subject = Subject(module.model, describe_model("a", "0", module.hparams, module.model))
    assert Evaluation(Results(None)).certify([subject]) == []


def test_costs_are_of_lengths_that_leave_room_for_a_decoded_token():
    """A decoded token is one more than the text that it continues."""
    module = LanguageModule(StandardAttention, 50, hidden_dim=16, num_layers=1, num_heads=2, positions=16)
    subject = Subject(module.model, describe_model("a", "0", module.hparams, module.model))
    evaluation = Evaluation(Results(None), rounds=1)
    evaluation.costs([subject], [8, 15, 16], memory=False)
    assert not evaluation.problems
    found = [row["identity"]["length"] for row in evaluation.results.rows if row["identity"]["kind"] == "cost"]
    assert found == [8, 15]


def test_costs_that_another_process_measured_meanwhile_are_taken_over(make_module, tmp_path, monkeypatch):
    module = make_module("linear")
    subject = Subject(module.model, describe_model("a", "0", module.hparams, module.model))
    ours, theirs = (Evaluation(Results(tmp_path / "results.jsonl"), rounds=1) for _ in range(2))
    theirs.costs([subject], [16], memory=False)
    monkeypatch.setattr("bsbr_pl.evals.evaluation.measure_costs", lambda *a, **k: pytest.fail("measured again"))
    ours.costs([subject], [16], memory=False)
    assert not ours.problems

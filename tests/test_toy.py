"""One file, one YAML, one line: an architecture and a recall task that only this test knows work everywhere.

The toy architecture is an exponential moving average. The toy task asks at every position for the token that stood
`lag` positions before. Neither is named in the product; registering them is one line each.
"""

import base64
import io
import json
import signal
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback, Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_readme import run as in_this_process
from torch import Tensor, nn

import train
from bsbr_pl import __main__ as command_line
from bsbr_pl.attention import ARCHITECTURES, Attention
from bsbr_pl.attention.parts import check_number, merge_heads, split_heads
from bsbr_pl.data import DATA_SETS
from bsbr_pl.data.base import IGNORED
from bsbr_pl.data.recall import RecallData, Segment
from bsbr_pl.data.tasks import Random
from bsbr_pl.evals import analyze_results, compare_models, scaling_analysis
from bsbr_pl.evals.certificate import certify
from bsbr_pl.model import LanguageModel
from bsbr_pl.module import LanguageModule
from bsbr_pl.results import check, read_rows
from bsbr_pl.utils.flops import count_flops
from bsbr_pl.utils.macs import count_macs

ROOT = Path(__file__).parents[1]


# The file of the architecture.


class Average(NamedTuple):
    mean: Tensor  # (B, H, V)


class AverageAttention(Attention[Average]):
    """m_t = a m_{t-1} + (1 - a) v_t, with a in (0, 1) learned for each head. Cost: O(T^2 D) here. State: D numbers.

    Args:
        hidden_dim: width D.
        num_heads: heads H.
        half_life: tokens after which a value has half its weight, at initialization.
    """

    def __init__(self, hidden_dim: int, num_heads: int, half_life: float = 2.0) -> None:
        super().__init__(hidden_dim, num_heads)
        check_number("above 0", lambda value: value > 0, half_life=half_life)
        decay = torch.tensor(0.5 ** (1 / half_life))
        self.logit = nn.Parameter(torch.logit(decay).expand(num_heads).clone())
        self.v = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, hidden_dim, bias=False)

    def values(self, x: Tensor) -> Tensor:
        return split_heads(self.v(x), self.num_heads)

    def emit(self, mixed: Tensor, x: Tensor) -> Tensor:
        return self.out(merge_heads(mixed).to(x.dtype))

    def weights(self, num_tokens: int) -> Tensor:
        """(H, T, T)"""
        a = self.logit.sigmoid()[:, None, None]
        age = torch.arange(num_tokens, device=a.device)[:, None] - torch.arange(num_tokens, device=a.device)
        return ((1 - a) * a ** age.clamp(min=0)).tril()

    def attention_map(self, x: Tensor) -> Tensor:
        return self.weights(x.shape[1]).expand(len(x), -1, -1, -1)

    def prefill(self, x: Tensor, state: Average | None = None) -> tuple[Tensor, Average]:
        T = x.shape[1]
        if not T:
            return x, state or self.init_state(len(x))
        mixed = self.weights(T) @ self.values(x)
        if state is not None:
            steps = torch.arange(1, T + 1, device=x.device)[:, None]
            mixed = mixed + self.logit.sigmoid()[:, None, None] ** steps * state.mean[:, :, None]
        return self.emit(mixed, x), Average(mixed[:, :, -1])

    def init_state(self, batch_size: int) -> Average:
        return Average(self.v.weight.new_zeros(batch_size, self.num_heads, self.head_dim))

    def step(self, x: Tensor, state: Average) -> tuple[Tensor, Average]:
        a = self.logit.sigmoid()[:, None]
        mean = a * state.mean + (1 - a) * self.values(x[:, None])[:, :, 0]
        return self.emit(mean[:, :, None], x[:, None])[:, 0], Average(mean)

    def state_size(self, num_tokens: int) -> int:
        return self.hidden_dim

    def flops(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.hidden_dim * (2 * self.hidden_dim + num_tokens)


# The file of the task.


def echo(random: Random, length: int, lag: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which token stood `lag` positions before?

    Example (T = 6, lag = 2):

        input    2  5  4  0  7  3
        target   .  .  2  5  4  0
    """
    if not 1 <= lag < length:
        raise ValueError(f"lag={lag} must be at least 1 and below the length, {length}")
    inputs = random.integers(0, vocab_size, length)
    targets = np.full_like(inputs, IGNORED)
    targets[:, lag:] = inputs[:, :-lag]
    return inputs, targets


class EchoData(RecallData):
    """Echo, at one length.

    Args:
        vocab_size: tokens
        context_length: of all samples
        lag: distance of the answer
        num_train, num_test: samples
    """

    def __init__(
        self,
        vocab_size: int = 8,
        context_length: int = 16,
        lag: int = 1,
        num_train: int = 2000,
        num_test: int = 50,
        batch_size: int = 20,
        eval_batch_size: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(context_length, batch_size, eval_batch_size, seed, num_workers)
        self.save_hyperparameters(logger=False)
        task = partial(echo, length=context_length, lag=lag, vocab_size=vocab_size)
        name = f"T{context_length}"
        self._set_segments(vocab_size, [Segment(name, task, num_train)], [Segment(name, task, num_test)])


# The YAML.

CONFIG = f"""
trainer:
  accelerator: cpu
  max_steps: 12
  val_check_interval: 4
  log_every_n_steps: 1
  enable_progress_bar: false
model:
  attention: {{class_path: {__name__}.AverageAttention, init_args: {{half_life: 1.0}}}}
  hidden_dim: 16
  num_layers: 2
  num_heads: 2
data:
  class_path: {__name__}.EchoData
  init_args: {{context_length: 16, batch_size: 20}}
"""


# The line.


def register() -> None:
    ARCHITECTURES["average"] = AverageAttention
    DATA_SETS["EchoData"] = EchoData
    train.TRUSTED.append(__name__)  # a package of one's own


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TRUSTED", [*train.TRUSTED])
        register()
        yield
    del ARCHITECTURES["average"], DATA_SETS["EchoData"]


def fit(folder: Path, *options: str) -> LanguageModule:
    (folder / "toy.yaml").write_text(CONFIG)
    where = [f"--config={folder / 'toy.yaml'}", f"--trainer.logger.save_dir={folder / 'runs'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py"])
        patch.chdir(folder)
        return train.main(["fit", *where, *options]).model


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread) -> Path:
    """A run of 12 steps with every callback."""
    folder = tmp_path_factory.mktemp("toy")
    fit(folder)
    return folder / "runs/version_0"


def test_the_law():
    """Definition == fast form == the form in parts == decode, outputs and gradients."""
    torch.manual_seed(0)
    attention = AverageAttention(16, 2, half_life=3.0).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)

    def definition(x: Tensor) -> Tensor:
        return attention.emit(attention.attention_map(x) @ attention.values(x), x)

    def in_parts(n: int, x: Tensor) -> Tensor:
        first, state = attention.prefill(x[:, :n])
        return torch.cat((first, attention.prefill(x[:, n:], state)[0]), 1)

    def decode(x: Tensor) -> Tensor:
        outputs, state = [], attention.init_state(len(x))
        for token in x.unbind(1):
            output, state = attention.step(token, state)
            outputs.append(output)
        return torch.stack(outputs, 1)

    def result(form) -> list[Tensor]:
        own = x.clone().requires_grad_()
        output = form(own)
        return [output, *torch.autograd.grad(output.square().sum(), [own, *attention.parameters()])]

    expected = result(definition)
    for form in (attention, decode, *(partial(in_parts, n) for n in range(10))):
        for found, truth in zip(result(form), expected, strict=True):
            torch.testing.assert_close(found, truth)


def test_it_says_what_it_can():
    """The defaults of the contract, with nothing declared."""
    attention = AverageAttention(16, 2)
    assert (attention.reach, attention.period, attention.routes_chunks) == (None, 1, False)
    assert (attention.has_map, attention.has_decode, attention.has_kernel) == (True, True, False)
    data = EchoData(context_length=24)
    assert (data.kind, data.train_lengths, data.validation_length) == ("recall", {24: 1}, 24)
    assert data.chance() == 1 / 8
    assert EchoData(**{**data.arguments, **data.at_length(40)}).validation_length == 40
    with pytest.raises(ValueError, match="lag=1 must be at least 1 and below the length, 1"):
        data.at_length(1)


def test_counted_flops_are_the_closed_form():
    attention, tokens = AverageAttention(16, 2), 12
    expected = 2 * (2 * tokens * 16 * 16 + tokens * tokens * 16)
    x = torch.zeros(1, tokens, 16)
    assert attention.flops(tokens) == expected == count_flops(attention, x)
    assert count_macs(attention, x).total == expected // 2
    model = LanguageModel(AverageAttention, 8, 16, 2, 2)
    assert model.flops(tokens) == count_flops(model, torch.zeros(1, tokens, dtype=torch.long))


def test_training_runs_every_callback(run):
    """Metrics of every callback, and the maps in TensorBoard."""
    record = json.loads((run / "record.json").read_text())
    assert (record["status"], record["steps"], record["run"]["tokens"]) == ("finished", 12, 12 * 20 * 16)
    assert record["run"]["arguments"]["model.attention"] == "average"
    assert record["run"]["arguments"]["model.attention.half_life"] == 1.0
    assert record["run"]["arguments"]["data.class"] == "EchoData"
    metrics = record["metrics"]
    prefixes = {name.split("/")[0] for name in metrics}
    assert prefixes >= {"train", "val", "step", "memory", "flops", "attention"}
    model = LanguageModel(AverageAttention, 8, 16, 2, 2)
    assert metrics["flops/forward_flops"]["value"] == [model.flops(16)]
    assert metrics["flops/forward_closed_form_flops"]["value"] == [model.flops(16)]
    assert not any("outside_share" in name for name in metrics), "absent, because there is no reach"
    assert [step + 1 for step in metrics["val/accuracy_T16"]["step"]] == [4, 8, 12]
    assert metrics["val/loss"]["value"][-1] < metrics["val/loss"]["value"][0]
    (picture,) = EventAccumulator(str(run), size_guidance={"images": 0}).Reload().Images("attention/maps")
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert pixels.std() > 0


class Stop(Callback):
    """Ctrl-C after five steps."""

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 5:
            signal.raise_signal(signal.SIGINT)


def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "REQUIRED", (*train.REQUIRED, Stop))
        with pytest.raises(SystemExit):
            fit(tmp_path)
    stopped = tmp_path / "runs/version_0"
    assert weights(stopped)["global_step"] == 5
    fit(tmp_path, "--ckpt_path=last")
    found, expected = weights(stopped), weights(run)
    assert found["global_step"] == expected["global_step"] == 12
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], tensor), name


def weights(run: Path) -> dict:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_generate_and_weights(run):
    module = LanguageModule.load(run / "checkpoints/last.ckpt")
    model = module.model.eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    generated = model.generate(ids, 5, temperature=0)
    for n in range(4, 9):  # each token is the most likely one after those before it
        assert generated[0, n] == model(generated[:, :n])[0, -1].argmax()
    weights = model.get_attention_weights(ids)
    assert weights.shape == (2, 1, 2, 4, 4)
    a = model.attentions[0].logit.sigmoid()[0]
    torch.testing.assert_close(weights[0, 0, 0, 3], (1 - a) * a ** torch.tensor([3.0, 2.0, 1.0, 0.0]))


def test_certify(run):
    passed = certify(LanguageModule.load(run / "checkpoints/last.ckpt").model)
    assert passed.passed, passed

    class Leaking(AverageAttention):
        def prefill(self, x: Tensor, state: Average | None = None) -> tuple[Tensor, Average]:
            output, after = super().prefill(x, state)
            return output + x.mean(1, keepdim=True), after

    torch.manual_seed(0)
    assert not certify(LanguageModel(Leaking, 8, 16, 2, 2)).passed


def test_evaluate_and_report(run, tmp_path, capfd):
    """Every kind of row, and a page that names the toy; then the page again, from its rows alone."""
    options = ["--rounds=1", "--lengths=[16,32]", "--device=cpu"]
    last = run / "checkpoints/last.ckpt"
    assert command_line.main(["evaluate", str(last), f"--output_dir={tmp_path}", "--trust_data", *options]) == 0
    rows = read_rows([str(tmp_path / "results.jsonl")])
    for row in rows:
        check(row)
    by_kind = {}
    for row in rows:
        by_kind.setdefault(row["identity"]["kind"], []).append(row)
    assert {kind: len(found) for kind, found in by_kind.items()} == {
        **{"certificate": 1, "recall": 1, "cost": 2, "training": 1, "map": 1}
    }, [row["values"] for row in by_kind.get("problem", [])]
    about = by_kind["recall"][0]["about"]
    assert about["architecture"] == "average(half_life=1.0)"
    assert about["attention"] == ["average"]
    assert (about["data"]["class"], about["data"]["kind"]) == ("EchoData", "recall")
    assert about["data"]["train_lengths"] == {"16": 1}
    assert by_kind["certificate"][0]["values"]["passed"]
    assert by_kind["recall"][0]["values"]["samples"] == 50
    assert by_kind["recall"][0]["values"]["accuracy"] == pytest.approx(accuracy(last))
    model = LanguageModel(AverageAttention, 8, 16, 2, 2)
    costs = {row["identity"]["length"]: row["values"] for row in by_kind["cost"]}
    assert {length: values["forward_flops"] for length, values in costs.items()} == {
        length: without_head(model, length) for length in (16, 32)
    }
    assert {values["state_bytes"] for values in costs.values()} == {4 * 2 * 16}
    assert Image.open(io.BytesIO(base64.b64decode(by_kind["map"][0]["values"]["png"]))).size > (10, 10)
    page = (tmp_path / "report.html").read_text()
    assert "average(half_life=1.0)" in page
    assert "EchoData" in page
    again = tmp_path / "again"
    assert command_line.main(["report", str(tmp_path / "results.jsonl"), f"--output_dir={again}"]) == 0
    assert (again / "report.html").read_text() == page


def without_head(model: LanguageModel, tokens: int) -> int:
    """The cost that evaluations count: from the embedding to the last norm."""
    return model.flops(tokens) - 2 * tokens * 16 * model.vocab_size


@torch.no_grad()
def accuracy(path: Path) -> float:
    """The share of right answers on the validation samples, counted here."""
    model = LanguageModule.load(path).model.eval()
    right = asked = 0
    for batch in EchoData().val_dataloader():
        counted = batch["targets"] != IGNORED
        right += int((model(batch["input_ids"]).argmax(-1) == batch["targets"])[counted].sum())
        asked += int(counted.sum())
    return right / asked


def test_comparisons(tmp_path, run, one_thread):
    """By its key, trained on the toy task, beside a known architecture and as a checkpoint."""
    last = str(run / "checkpoints/last.ckpt")
    with pytest.warns(UserWarning, match="unequal budgets"):
        found = compare_models(
            (16, 32),
            ("average", "Standard", "trained"),
            ("flops", "state_size", "accuracy"),
            checkpoints={"trained": last},
            task=EchoData(),
            train_steps=3,
            hidden_dim=16,
            num_heads=2,
            cache_dir=tmp_path,
            device="cpu",
            rounds=1,
        )
    assert found["disqualified"] == {}
    model = LanguageModel(AverageAttention, 16, 16, 2, 2)
    assert found["average"]["flops"] == [without_head(model, 16), without_head(model, 32)]
    assert found["trained"]["state_size"] == [4 * 2 * 16 / 1e6] * 2
    assert all(0 <= value <= 1 for value in found["average"]["accuracy"])
    assert found["accuracy_task"]["chance"] == 1 / 8
    assert "average" in str(analyze_results(found))
    costs = scaling_analysis((16, 32), ("average", "Standard"), ("flops",), hidden_dim=16, num_heads=2, device="cpu")
    model = LanguageModel(AverageAttention, 256, 16, 2, 2)
    assert costs["average"]["flops"] == [without_head(model, 16), without_head(model, 32)]


@pytest.mark.parametrize("quantity", ["params", "flops"])
def test_match(quantity, tmp_path, capfd):
    """`bsbr match` finds sizes of the toy, and writes a YAML that train.py reads."""
    options = ["--architectures=[average]", "--tokens=32", "--vocab_size=8", "--hidden_dim=32", "--num_heads=2"]
    assert command_line.main(["match", f"--match={quantity}", *options, f"--out={tmp_path}"]) == 0
    assert "average" in capfd.readouterr().out
    found = yaml.safe_load((tmp_path / "average.yaml").read_text())["model"]
    assert found["attention"]["class_path"] == f"{__name__}.AverageAttention"
    sizes = {name: found[name] for name in ("hidden_dim", "num_layers", "num_heads", "ff_dim")}
    built = LanguageModel(AverageAttention, 8, **sizes)
    reference = LanguageModel(ARCHITECTURES["standard"], 8, 32, 2, 2)

    def value(model: LanguageModel) -> int:
        return sum(p.numel() for p in model.parameters()) if quantity == "params" else model.flops(32)

    assert value(built) == pytest.approx(value(reference), rel=0.05)
    assert value(LanguageModel(AverageAttention, 8, 32, 2, 2)) != pytest.approx(value(reference), rel=0.05)


@pytest.mark.filterwarnings("ignore")  # of scripts, which are not tested for warnings
def test_a_study_of_two_steps(tmp_path, monkeypatch, capsys, one_thread):
    """A folder of configurations and a script that registers the toys; its runs are rows that the report reads."""
    config = yaml.safe_load(CONFIG)
    model = {"model": {"attention": config["model"].pop("attention")}}
    config["model"] |= {"ff_dim": 32, "learning_rate": 0.01}
    (tmp_path / "configs/models").mkdir(parents=True)
    (tmp_path / "configs/models/average.yaml").write_text(yaml.safe_dump(model))
    (tmp_path / "configs/echo.yaml").write_text(yaml.safe_dump(config))
    script = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
        import {__name__} as toy
        import train

        toy.register()
        if __name__ == "__main__":
            train.command_line()
    """
    (tmp_path / "train_toy.py").write_text(textwrap.dedent(script))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [str(ROOT / "study"), *sys.path])  # the script changes it too
    monkeypatch.delitem(ARCHITECTURES, "average")  # which the script registers
    monkeypatch.delitem(DATA_SETS, "EchoData")
    options = ["--train", "train_toy.py", "--steps", "2", "--seeds", "0", "--rates", "0.01"]
    code, printed = in_this_process("study/run.py", ["runs", "--configs", "configs", *options]), capsys.readouterr()
    assert not code, printed.err
    certificate, recall, row = read_rows([str(tmp_path / "runs/echo/results.jsonl")])
    assert (certificate["values"]["passed"], recall["identity"]["split"]) == (True, "test")
    about = row["about"]["study"]
    assert about.pop("configuration")
    assert about.pop("base")
    assert about == {"task": "echo", "model": "average", "phase": "final", "rate": 0.01}
    record = json.loads((tmp_path / "runs/echo/final/average/rate0.01_steps2_seed0/record.json").read_text())
    assert row["values"]["metrics"]["val/accuracy_T16"]["value"] == record["metrics"]["val/accuracy_T16"]["value"]
    accuracy = f"{recall['values']['slices'][0]['accuracy']:.3f}"
    assert f"| average | 2 | 0.01 | 1 | {accuracy} | " in printed.out

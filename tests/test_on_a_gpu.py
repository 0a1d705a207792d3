"""What reads a GPU's clock and its memory, run on one: training, evaluating, decoding."""

import json
import sys
from pathlib import Path

import pytest
import torch

import train
from bsbr_pl.__main__ import main
from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.memory import measure_memory
from bsbr_pl.utils.timing import StepClock, measure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROOT = Path(__file__).parents[1]


def fit(folder: Path, name: str, *more: str, run: str = "run") -> dict:
    """A run of seconds from the YAML; its record."""
    (folder / "text.txt").write_text("".join(f"def add_{i}(a):\n    return a + {i * i}\n" for i in range(600)))
    data = {"source": folder / "text.txt", "tokenizer": "bytes", "context_length": 64, "batch_size": 4}
    trainer = {"max_steps": 6, "val_check_interval": 3, "log_every_n_steps": 2, "enable_progress_bar": "false"}
    sections = {"data": data | {"cache_dir": folder / "cache"}, "trainer": trainer, "model": {"hidden_dim": 32}}
    options = [f"--{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]
    where = [
        f"--trainer.logger.init_args.save_dir={folder}",
        "--trainer.logger.init_args.name=",
        f"--trainer.logger.init_args.version={run}",
    ]
    train.main(["fit", f"--config={ROOT / 'configs' / f'{name}.yaml'}", *options, *where, *more])
    return json.loads((folder / run / "record.json").read_text())


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_and_is_evaluated(name, tmp_path):
    record = fit(tmp_path, name)
    assert record["environment"]["device"].startswith("cuda")
    last = {key: column["value"][-1] for key, column in record["metrics"].items()}
    phases = [last[f"memory/{phase}_peak_bytes"] for phase in ("forward", "backward", "optimizer")]
    assert last["memory/peak_bytes"] == max(phases) > 0
    assert 0 < last["step/seconds"] < 5
    assert (
        main(["evaluate", str(tmp_path / "run"), f"--output_dir={tmp_path / 'e'}", "--lengths=[128]", "--rounds=2"])
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "e" / "results.jsonl").read_text().splitlines()]
    kinds = {row["identity"]["kind"]: row for row in rows}
    assert {"certificate", "text", "cost"} <= set(kinds)
    assert all(row["identity"]["environment"]["device"].startswith("cuda") for row in rows)


def test_mixed_precision_learns_as_fp32_does(tmp_path):
    def loss(precision: str) -> float:
        record = fit(tmp_path, "bsbr", f"--trainer.precision={precision}", run=precision)
        return record["metrics"]["val/loss"]["value"][-1]

    assert loss("bf16-mixed") == pytest.approx(loss("32-true"), rel=0.02)


@pytest.mark.filterwarnings("ignore")  # of torch itself, while it compiles
@pytest.mark.parametrize("name", ["standard", "linear", "bsbr"])
def test_compiled_gradients_are_those_of_the_model(name):
    torch.manual_seed(0)
    model = LanguageModel(ARCHITECTURES[name], vocab_size=257, hidden_dim=32, num_layers=2, num_heads=4).cuda()
    ids = torch.randint(257, (4, 64), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for hidden in (model.hidden, torch.compile(model.hidden)):
        loss = torch.nn.functional.cross_entropy(model.head(hidden(ids)[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for (key, _), plain, compiled in zip(model.named_parameters(), *found, strict=True):
        error = (plain - compiled).square().mean().sqrt() / plain.square().mean().sqrt().clamp(min=1e-12)
        assert error < 1e-4, f"{key}: relative error {error:.2e}"


def test_times_are_those_of_the_device_not_of_the_launch():
    a = torch.randn(4096, 4096, device="cuda")

    def work() -> None:
        for _ in range(20):
            a @ a

    timing = measure({"work": work}, rounds=3, device="cuda")["work"]
    least = 20 * 2 * 4096**3 / 1e15  # no GPU does 1e15 fp32 operations a second
    assert timing.median > least
    clock = StepClock("cuda:0")
    clock.begin()
    work()
    clock.end()
    (step,) = clock.read()
    assert step.seconds == pytest.approx(timing.median, rel=0.5)


def test_memory_is_the_allocators():
    def work() -> None:
        torch.empty(50_000_000, dtype=torch.uint8, device="cuda").fill_(1)

    found = measure_memory(work, "cuda")
    assert 50e6 <= found["peak_bytes"] - found["held_bytes"] < 60e6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decode_is_training_on_a_gpu(name):
    model = (
        LanguageModel(ARCHITECTURES[name], vocab_size=64, hidden_dim=64, num_layers=2, num_heads=2)
        .cuda()
        .double()
        .eval()
    )
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    logits, states = model.prefill(ids[:, :20])
    outputs = [logits]
    for t in range(20, 39):
        step, states = model.step(ids[:, t], states)
        outputs.append(step)
    torch.testing.assert_close(torch.stack(outputs, 1), model(ids)[:, 19:39], rtol=1e-9, atol=1e-9)

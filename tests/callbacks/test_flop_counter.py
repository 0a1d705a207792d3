"""Counted once, in units that the key names, and never more than the device can do."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bsbr_pl.attention import ARCHITECTURES, StandardAttention
from bsbr_pl.data import InductionData
from bsbr_pl.model import LanguageModel
from bsbr_pl.module import LanguageModule
from callbacks import FlopCounter
from callbacks.flop_counter import _dtype
from callbacks.step_windows import Window

exact = LanguageModel.flops


class Wrong(StandardAttention):
    """An attention whose closed form forgets its projections."""

    def flops(self, num_tokens: int) -> int:
        return 0


class Odd(StandardAttention):
    """An attention with an operator that nothing is known about."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.erfinv(x.tanh() * 0.5))


def fit(attention, make_data, make_trainer, lines, **arguments):
    torch.manual_seed(0)
    module = LanguageModule(attention, 257, hidden_dim=16, num_layers=2, num_heads=2)
    make_trainer(logger=lines, callbacks=FlopCounter(), **arguments).fit(module, make_data())
    return module, lines.of("flops/")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name, make_data, make_module, make_trainer, lines):
    module = make_module(name)
    make_trainer(logger=lines, callbacks=FlopCounter(), max_steps=6).fit(module, make_data())
    (step, once), (_, counted), *windows = lines.of("flops/")
    closed = module.model.flops(32)
    assert step == 0
    assert once["flops/forward_closed_form_flops"] == closed
    assert once["flops/forward_flops"] == pytest.approx(closed, rel=0.02)
    assert 2 * once["flops/forward_macs"] == pytest.approx(closed, rel=0.02)
    assert once["flops/forward_elementwise_operations"] > 0
    assert once["flops/uncounted_operators"] == 0
    assert counted["flops/step_flops"] == pytest.approx(3 * 4 * closed, rel=0.05), "four sequences, backward"
    assert all(0 < metrics["flops/utilization"] <= 1 for _, metrics in windows)
    assert [step for step, _ in windows] == [3, 5]


def test_accumulated_batches_count_in_one_step(make_data, make_trainer, lines):
    module, found = fit(StandardAttention, make_data, make_trainer, lines, accumulate_grad_batches=2)
    assert found[1][1]["flops/step_flops"] == pytest.approx(3 * 8 * module.model.flops(32), rel=0.01)


def test_a_recall_task_has_logits_where_it_asks(make_trainer, lines):
    """One position in 32: by torch's counter of the training step itself."""
    data = InductionData(16, 32, [32], num_train=64, num_test=8, batch_size=8)
    module = LanguageModule("linear", 16, hidden_dim=16, num_layers=1, num_heads=2)
    make_trainer(logger=lines, callbacks=FlopCounter(), max_steps=6).fit(module, data)
    counted = next(metrics for _, metrics in lines.of("flops/") if "flops/step_flops" in metrics)
    batch = next(iter(data.train_dataloader()))
    with FlopCounterMode(display=False) as counter:
        module._loss_through(module.model.hidden, batch).backward()
    assert counted["flops/step_flops"] == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_utilization_never_exceeds_the_peak(make_data, make_trainer, lines, monkeypatch):
    monkeypatch.setattr("callbacks.flop_counter.matmul_peak", lambda device, dtype: 1.0)
    _, found = fit(StandardAttention, make_data, make_trainer, lines)
    assert found[2][1]["flops/utilization"] == 1.0
    assert all(metrics["flops/utilization"] <= 1 for _, metrics in found[2:])


@pytest.mark.parametrize(("waits", "seconds"), [([], 2.0), ([0.5, 1.5], 3.0)])
def test_utilization_is_of_the_time_of_steps_and_of_waits(waits, seconds, make_trainer, monkeypatch):
    logged = []
    monkeypatch.setattr("callbacks.flop_counter.log", lambda trainer, metrics, **_: logged.append(metrics))
    counter = FlopCounter()
    counter._flops_per_token, counter._peak, counter._step_flops_logged = 10.0, 1000.0, True
    counter.on_window(make_trainer(), None, Window([1.0, 3.0], waits, tokens=200))
    assert logged == [{"flops/utilization": pytest.approx(10.0 * 100 / seconds / 1000.0)}]


def test_disagreement_is_warned_about(make_data, make_trainer, lines):
    with pytest.warns(UserWarning, match="counts .* FLOPs at 32 tokens, the closed form says") as caught:
        fit(Wrong, make_data, make_trainer, lines, max_steps=1)
    assert {"fvcore", "torch"} <= {str(warning.message).split()[0] for warning in caught}


@pytest.mark.parametrize(("share", "warned"), [(0.97, True), (0.99, False), (1.01, False), (1.03, True)])
def test_a_difference_of_two_percent_is_too_much(make_data, make_trainer, lines, recwarn, monkeypatch, share, warned):
    monkeypatch.setattr(LanguageModel, "flops", lambda model, length: int(share * exact(model, length)))
    fit(StandardAttention, make_data, make_trainer, lines, max_steps=1)
    assert any("the closed form says" in str(warning.message) for warning in recwarn) is warned


def test_what_is_uncounted_is_named(make_data, make_trainer, lines, caplog):
    with caplog.at_level("INFO"):
        _, found = fit(Odd, make_data, make_trainer, lines, max_steps=1)
    assert found[0][1]["flops/uncounted_operators"] == 2
    assert "fvcore has no formula for aten::erfinv (2)" in caplog.text


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
        ("transformer-engine", torch.float32),
    ],
)
def test_the_peak_is_taken_in_the_precision_of_the_run(precision, dtype):
    assert _dtype(precision) == dtype

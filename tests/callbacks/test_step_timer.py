"""A scripted clock gives exact dictionaries: what is timed, what is left out, what is logged and when."""

from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.flops import count_flops
from callbacks import FlopCounter, StepTimer
from callbacks.step_windows import over_ranks


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(LanguageModule):
    """Every batch takes the next of some scripted seconds; a validation batch takes an hour."""

    def script(self, clock: Clock, seconds: list[float]) -> "Timed":
        self.clock, self.seconds = clock, iter(seconds)
        return self

    def training_step(self, batch, batch_idx):
        self.clock.now += next(self.seconds)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.clock.now += 3600.0
        super().validation_step(batch, batch_idx)


class Slow(Callback):
    """Between two steps a quarter of a second passes; an hour where it is told to save a checkpoint."""

    def __init__(self, clock: Clock, save_after: int | None = None) -> None:
        self.clock, self.save_after = clock, save_after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.clock.now += 0.25
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/saved.ckpt")
            self.clock.now += 3600.0


def run(make_data, make_trainer, lines, seconds, warmup_steps, save_after=None, **arguments):
    clock = Clock()
    torch.manual_seed(0)
    module = Timed(torch_attention(), 257, hidden_dim=16, num_layers=1, num_heads=2).script(clock, seconds)
    timer = StepTimer(warmup_steps)
    timer.clock = clock
    trainer = make_trainer(logger=lines, callbacks=[timer, Slow(clock, save_after)], **arguments)
    trainer.fit(module, make_data())
    return lines.of("step/")


def torch_attention():
    from bsbr_pl.attention import StandardAttention

    return StandardAttention


def test_exact_dictionaries(make_data, make_trainer, lines):
    # Validation after steps 4 and 8: the waits before steps 5 and 9 are left out, as are two steps of warm-up.
    seconds = [9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert run(make_data, make_trainer, lines, seconds, 2, max_steps=7) == [
        (3, {"step/seconds": 1.5, "step/data_seconds": 0.25, "step/tokens_per_second": 128 / 1.75}),
        (5, {"step/seconds": 3.5, "step/data_seconds": 0.25, "step/tokens_per_second": 128 / 3.75}),
        (6, {"step/seconds": 5.0, "step/data_seconds": 0.25, "step/tokens_per_second": 128 / 5.25}),
        (6, {"step/p50_seconds": 3.0, "step/p95_seconds": pytest.approx(4.8)}),
    ]


def test_an_unknown_wait_is_absent_and_a_checkpoint_is_no_wait(make_data, make_trainer, lines):
    found = run(make_data, make_trainer, lines, [1.0, 2.0, 3.0], 0, save_after=2, max_steps=3, log_every_n_steps=1)
    assert found == [
        (0, {"step/seconds": 1.0, "step/tokens_per_second": 128.0}),
        (1, {"step/seconds": 2.0, "step/data_seconds": 0.25, "step/tokens_per_second": 128 / 2.25}),
        (2, {"step/seconds": 3.0, "step/tokens_per_second": 128 / 3}),
        (2, {"step/p50_seconds": 2.0, "step/p95_seconds": pytest.approx(2.9)}),
    ]


def test_a_step_of_several_batches_is_one_step(make_data, make_trainer, lines):
    found = run(
        make_data, make_trainer, lines, [1.0] * 9, 1, max_steps=3, accumulate_grad_batches=3, val_check_interval=9
    )
    assert found == [
        (1, {"step/seconds": 3.0, "step/data_seconds": 0.75, "step/tokens_per_second": 384 / 3.75}),
        (2, {"step/seconds": 3.0, "step/data_seconds": 0.75, "step/tokens_per_second": 384 / 3.75}),
        (2, {"step/p50_seconds": 3.0, "step/p95_seconds": 3.0}),
    ]


def test_a_run_shorter_than_its_warm_up_logs_nothing(make_data, make_trainer, lines):
    assert run(make_data, make_trainer, lines, [1.0] * 2, 3, max_steps=2) == []


def test_warmup_must_not_be_negative():
    with pytest.raises(ValueError, match="warmup_steps must be 0 or more, got -1"):
        StepTimer(-1)


def with_a_slower_process(monkeypatch):
    """Reductions as if a second process had twice the numbers of this one."""

    def reduce(strategy, tensor, *args, reduce_op="mean", **kwargs):
        return {"max": 2 * tensor, "sum": 3 * tensor, "mean": tensor}[reduce_op]

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", reduce)


def test_of_several_processes_the_slowest_counts_and_their_tokens_add_up(make_data, make_trainer, lines, monkeypatch):
    with_a_slower_process(monkeypatch)
    found = run(make_data, make_trainer, lines, [1.0, 2.0, 3.0, 4.0], 0, max_steps=4, val_check_interval=9)
    assert found == [
        (1, {"step/seconds": 3.0, "step/data_seconds": 0.5, "step/tokens_per_second": 3 * 128 / 3.5}),
        (3, {"step/seconds": 7.0, "step/data_seconds": 0.5, "step/tokens_per_second": 3 * 128 / 7.5}),
        (3, {"step/p50_seconds": 5.0, "step/p95_seconds": pytest.approx(7.7)}),
    ]


def test_utilization_is_flops_of_a_step_over_its_seconds_and_the_peak(make_data, make_trainer, lines, monkeypatch):
    """Two windows of two steps of 4 x 32 tokens, with a quarter of a second of data before each."""
    monkeypatch.setattr("callbacks.flop_counter.matmul_peak", lambda device, dtype: 1e12)
    clock = Clock()
    module = Timed(torch_attention(), 257, hidden_dim=16, num_layers=1, num_heads=2).script(clock, [1.0, 3.0, 2.0, 4.0])
    counter = FlopCounter(0)
    counter.clock = clock
    settings = {"max_steps": 4, "val_check_interval": 9}
    make_trainer(logger=lines, callbacks=[counter, Slow(clock)], **settings).fit(module, make_data())
    flops = 4 * count_flops(module.model, torch.zeros(1, 32, dtype=torch.long), backward=True)
    (_, first), (_, once), (step, a), (_, b) = lines.of("flops/")
    assert once == {"flops/step_flops": pytest.approx(flops)}
    assert first["flops/peak_flops_per_second"] == 1e12
    assert step == 1
    assert a == {"flops/utilization": pytest.approx(flops / 2.25 / 1e12)}
    assert b == {"flops/utilization": pytest.approx(flops / 3.25 / 1e12)}


def test_numbers_of_processes_keep_their_precision():
    def reduce(tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        return tensor + tensor if reduce_op == "sum" else tensor

    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu"), reduce=reduce))
    assert over_ranks(trainer, [0.1, 2.0**40 + 1], "max") == [0.1, 2.0**40 + 1]
    assert over_ranks(trainer, [2**25 + 1, 0.1], "sum") == [2**26 + 2, 0.2]

"""On CUDA (mocked) the allocator is asked at every phase; on a CPU tensor bytes are measured, and called so."""

from types import SimpleNamespace

import pytest
import torch

from bsbr_pl.utils.memory import LiveTensors
from callbacks import PeakMemory


def test_mocked_cuda_is_asked_phase_by_phase(monkeypatch, lines):
    calls, peaks = [], iter([10, 30, 20, 11, 29, 25])

    def peak(device):
        calls.append("peak")
        return next(peaks)

    fake = SimpleNamespace(max_memory_allocated=peak, reset_peak_memory_stats=lambda device: calls.append("reset"))
    monkeypatch.setattr(torch, "cuda", fake)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda tensor, reduce_op: tensor)
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, loggers=[lines], strategy=strategy)
    module, callback = SimpleNamespace(device=torch.device("cuda")), PeakMemory()
    callback.on_train_start(trainer, module)
    for _ in range(2):
        callback.on_train_batch_start(trainer, module, {}, 0)
        callback.on_before_backward(trainer, module, None)
        callback.on_before_optimizer_step(trainer, module, None)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, {}, 0)
    assert calls == ["reset", "peak", "reset", "peak", "reset", "peak", "reset"] * 2
    assert lines.lines == [
        (
            1,
            {
                "memory/peak_bytes": 30,
                "memory/forward_peak_bytes": 11,
                "memory/backward_peak_bytes": 30,
                "memory/optimizer_peak_bytes": 25,
            },
        )
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_cpu_step_is_measured_once_under_its_own_name(make_data, make_module, make_trainer, lines, accumulate):
    trainer = make_trainer(logger=lines, callbacks=PeakMemory(), accumulate_grad_batches=accumulate, max_steps=5)
    trainer.fit(make_module(), make_data())
    found = lines.of("memory/")
    assert [step for step, _ in found] == [1, 1, 3, 4]
    tensors = found[0][1]
    assert set(tensors) == {f"memory/{name}peak_tensor_bytes" for name in ("", "forward_", "backward_", "optimizer_")}
    assert tensors["memory/peak_tensor_bytes"] == max(tensors.values())
    assert all(set(metrics) == {"memory/peak_resident_bytes"} for _, metrics in found[1:])
    assert not any(key.startswith("memory/") and key.endswith("/peak_bytes") for key in lines.keys())  # noqa: SIM118
    assert all(value > 0 for _, metrics in found for value in metrics.values())


def test_the_measured_step_is_right(make_data, make_module, make_trainer, lines):
    module, data = make_module(), make_data()
    trainer = make_trainer(logger=lines, callbacks=PeakMemory(), max_steps=3, gradient_clip_val=1.0)
    trainer.fit(module, data)
    batch = next(iter(data.val_dataloader()))
    optimizer = trainer.optimizers[0]
    optimizer.zero_grad()
    live = LiveTensors(module, optimizer, batch)

    def loss() -> torch.Tensor:
        logits = module.model(batch["input_ids"])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())

    with live:
        loss().backward()
        optimizer.step()
    measured = lines.of("memory/peak_tensor_bytes")[0][1]["memory/peak_tensor_bytes"]
    assert measured == pytest.approx(live.peak, rel=0.05)


def test_a_failing_step_leaves_no_counter_behind(make_data, make_module, make_trainer):
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    module = make_module()
    module.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make_trainer(callbacks=PeakMemory(probe_step=0)).fit(module, make_data())
    assert _get_current_dispatch_mode() is None


def test_probe_step_must_not_be_negative():
    with pytest.raises(ValueError, match="probe_step must be 0 or more, got -1"):
        PeakMemory(-1)

"""Tensor bytes against the truth: the allocator's own record (torch's profiler), which knows nothing of our counter."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils import memory
from bsbr_pl.utils.memory import LiveTensors, PhasePeaks, analyze_memory_usage, profile_memory_usage

ROOT = Path(__file__).parents[2]


def recorded_peak(run) -> int:
    """The most bytes that torch's CPU allocator had given out above the start, from its own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def training_step(model: LanguageModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    logits = model(ids)
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def build(name: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ARCHITECTURES[name], 257, hidden_dim=64, num_layers=2, num_heads=2)


@pytest.mark.parametrize("length", [64, 300, 1000])
@pytest.mark.parametrize("name", ["standard", "delta_net", "bsbr", "gau"])
def test_live_bytes_of_a_training_step_agree_with_the_allocator(name, length):
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.arange(2 * length).reshape(2, length) % 257
    training_step(model, optimizer, ids)  # the optimiser's state is there from now on
    live = LiveTensors(model, optimizer, ids)
    held = live.current
    with live:
        training_step(model, optimizer, ids)
    assert live.current == held, "what a step made and freed is not live"
    truth = recorded_peak(lambda: training_step(model, optimizer, ids))
    assert live.peak - held == pytest.approx(truth, rel=0.05)
    assert held > 3 * sum(4 * p.numel() for p in model.parameters()), "parameters and two moments"


RESIDENT = """
import ctypes, gc, json
import torch
from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.memory import LiveTensors

def status(field):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

libc = ctypes.CDLL(None)
libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: a tensor has its own pages, returned when it is freed
libc.mallopt(-4, 1 << 20)  # M_MMAP_MAX
torch.set_num_threads(1)
ratios = {}
for name in ("sliding_window", "linear", "bsbr"):
    model = LanguageModel(ARCHITECTURES[name], 257, 64, 2, 2)
    step = lambda ids: model(ids).square().sum().backward()
    step(torch.zeros(1, 256, dtype=torch.long))  # libraries and gradients are there
    for length in (256, 512, 1024):
        ids = torch.zeros(8, length, dtype=torch.long)
        gc.collect()
        libc.malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
        before = status("VmRSS")
        step(ids)
        grown = status("VmHWM") - before
        live = LiveTensors(model, ids)
        held = live.current
        with live:
            step(ids)
        ratios[f"{name} {length}"] = (live.peak - held) / grown
print(json.dumps(ratios))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the peak of resident memory")
def test_live_bytes_of_a_step_agree_with_the_kernel():
    """Growth of a fresh process's resident memory, which the kernel counts: three architectures at three lengths."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, cwd=ROOT)
    ratios = json.loads(done.stdout)
    assert len(ratios) == 9
    assert all(ratio == pytest.approx(1.0, abs=0.05) for ratio in ratios.values()), ratios


def test_views_count_once_and_freed_storages_are_subtracted():
    with LiveTensors() as live:
        a = torch.ones(1000)
        b = a[10:].view(-1)
        assert live.current == live.peak == 4000
        del a
        assert live.current == 4000, "the view keeps the storage"
        del b
        assert live.current == 0
        assert live.peak == 4000
        c = torch.ones(10)
        live.reset()
        assert live.peak == live.current == c.nbytes


def test_an_unknown_input_was_there_all_along():
    a = torch.ones(1000)
    with LiveTensors() as live:
        b = torch.ones(500)
        del b
        assert (live.current, live.peak) == (0, 2000)
        a.mul_(2)
    assert (live.current, live.peak) == (4000, 6000)


def test_storages_that_outlive_the_counter_are_harmless():
    live = LiveTensors()
    with live:
        a = torch.ones(10)
    del live
    del a


def test_counting_changes_no_result():
    for name in ARCHITECTURES:
        gradients = []
        for counted in (False, True):
            model, ids = build(name), torch.arange(300)[None] % 257
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01)
            if counted:
                with LiveTensors(model):
                    model(ids).square().mean().backward()
            else:
                model(ids).square().mean().backward()
            gradients.append([p.grad for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)), name


def test_phases_keep_the_largest_peak_of_each():
    class Script:
        current, peak, resets = 0, 0, 0

        def reset(self) -> None:
            self.resets += 1

    meter = Script()
    phases = PhasePeaks(meter)
    for forward, backward in ((5, 9), (7, 8)):
        phases.enter("forward")
        meter.peak = forward
        phases.enter("backward")
        meter.peak = backward
        phases.enter(None)
    assert phases.read() == {"forward": 7, "backward": 9}
    assert phases.read() == {}
    assert meter.resets == 6


@pytest.mark.parametrize("training", [False, True])
def test_profile_leaves_no_trace_and_gives_the_two_figures(training):
    model, ids = build("bsbr").train(training), torch.arange(256)[None] % 257
    state = torch.get_rng_state()
    found = profile_memory_usage(model, ids)
    assert set(found) == {"peak_memory", "current_memory"}
    assert found["peak_memory"] > found["current_memory"] > 0
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_analysis_adds_up_and_the_backward_pass_costs_more():
    model, ids = build("standard"), torch.arange(256)[None] % 257
    forward, both = (analyze_memory_usage(model, ids, backward=backward) for backward in (False, True))
    parameters = sum(p.nbytes for p in model.parameters()) / memory.MB
    assert forward["parameters"] == both["parameters"] == pytest.approx(parameters)
    assert forward["peak_memory"] == pytest.approx(parameters + ids.nbytes / memory.MB + forward["activations"])
    logits = 256 * 257 * 4 / memory.MB
    assert forward["current_memory"] == pytest.approx(parameters + ids.nbytes / memory.MB + logits)
    assert both["peak_memory"] > forward["peak_memory"]
    assert both["current_memory"] == pytest.approx(2 * parameters + ids.nbytes / memory.MB)
    truth = recorded_peak(lambda: torch.no_grad()(model)(ids)) / memory.MB
    assert forward["activations"] == pytest.approx(truth, rel=0.05)


def test_cuda_is_asked_on_cuda(monkeypatch):
    calls = []

    def answer(name, value):
        def call(device):
            calls.append(name)
            return value

        return call

    fake = SimpleNamespace(
        synchronize=answer("synchronize", None),
        memory_allocated=answer("allocated", 10),
        max_memory_allocated=answer("peak", 30),
        reset_peak_memory_stats=answer("reset", None),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    found = memory.measure_memory(lambda: calls.append("run"), "cuda")
    assert found == {"held_bytes": 10, "peak_bytes": 30, "current_bytes": 10}
    assert calls == ["synchronize", "reset", "allocated", "run", "synchronize", "peak", "allocated"]


def test_resident_bytes_are_bytes():
    assert memory.peak_resident_bytes() > 50e6


def test_gradients_and_buffers_are_held_and_a_megabyte_is_a_million_bytes():
    model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.BatchNorm1d(4))
    ids = torch.zeros(3, 4, dtype=torch.long)
    bare = 4 * (10 * 8 + 2 * 4 + 2 * 4) + 8  # weights; gain and bias; mean and variance; an int64 counts batches
    assert LiveTensors(model).current == bare
    model(ids).sum().backward()
    assert LiveTensors(model).current == bare + 4 * (10 * 8 + 2 * 4)
    found = analyze_memory_usage(model, ids)
    assert found["parameters"] == pytest.approx((bare + 4 * (10 * 8 + 2 * 4)) / 1e6)

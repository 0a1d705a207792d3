"""Times of a call: on the device alone (the replay of a CUDA graph), and launched from Python."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_rows import Setting

from bsbr_pl.values import one_line

Call = Callable[[], object]


def seconds(call: Call, setting: Setting, samples: int = 5, least: float = 0.04) -> list[float]:
    """Seconds of a call, `samples` times; each sample repeats the call for about `least` seconds."""
    call()
    once = sample(call, setting, 1)
    repeats = 1 if setting.toy else max(1, min(200, math.ceil(least / max(once, 1e-6))))
    return [sample(call, setting, repeats) for _ in range(1 if setting.toy else samples)]


def sample(call: Call, setting: Setting, repeats: int) -> float:
    """Mean seconds of `repeats` calls."""
    if setting.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if setting.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def both_times(call: Call, setting: Setting, start: Callable[[], Call] | None = None) -> dict[str, Any]:
    """Median milliseconds launched from Python; on CUDA also on the device, and the peak memory.

    `start` makes a call that continues what it did before, anew: then memory and device time are those of its first
    calls after one, however often it was launched.
    """
    found: dict[str, Any] = {"launched_ms": 1e3 * statistics.median(seconds(call, setting))}
    if setting.device == "cuda":
        if start:
            call = start()
            call()
        torch.cuda.reset_peak_memory_stats()
        call()
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        try:
            found["device_ms"] = 1e3 * statistics.median(seconds(graphed(call), setting))
        except Exception as error:
            found["graph_error"] = one_line(error, 200)
    return found


def graphed(call: Call) -> Call:
    """The replay of a CUDA graph of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def peak(name: str, setting: Setting) -> dict[str, Any]:
    """Operations per second of the best matrix product, or bytes read and written per second by the best copy."""
    size = 64 if setting.toy else 8192
    if name == "matrix product":
        a, b = (torch.randn(size, size, device=setting.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        return {"per_second": 2 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out), setting, samples=10))}
    source = torch.randn(8 * size**2, device=setting.device)
    target = torch.empty_like(source)
    return {"per_second": 2 * source.nbytes / min(seconds(lambda: target.copy_(source), setting, samples=10))}

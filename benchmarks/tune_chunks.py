"""Finds the best number of warps of the scores within a chunk on this card: constants of triton_chunks.py.

    python benchmarks/tune_chunks.py [--write]

Each kernel is timed at 16 heads of width 64 and 16,384 tokens, with one query of a token (GLA) and two (KDA), alone, by
CUDA events.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import set_constants

from bsbr_pl.attention import triton_chunks as kernels

WARPS = (1, 2, 4, 8)
CHUNKS, WIDTH = 16 * 16_384 // 64, 64


def milliseconds(call: Callable[[], object]) -> float:
    """Median of ten samples of ten calls."""
    call()
    samples = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            call()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / 10)
    return statistics.median(samples)


def times(queries: int) -> dict[tuple[str, int], float]:
    """Of each kernel with each number of warps."""
    q = torch.randn(queries, CHUNKS, 64, WIDTH, device="cuda").bfloat16()
    k, g = torch.randn_like(q[0]), -0.1 * torch.rand(CHUNKS, 64, WIDTH, device="cuda").cumsum(1)
    grad = torch.randn(queries, CHUNKS, 64, 64, device="cuda").bfloat16()
    found = {}
    for warps in WARPS:
        kernels.SCORES = kernels.SCORES_GRADIENT = warps
        found["SCORES", warps] = milliseconds(lambda: kernels.decayed_scores(q, k, g))
        found["SCORES_GRADIENT", warps] = milliseconds(lambda: kernels.decayed_scores_backward(grad, q, k, g))
    return found


def main() -> None:
    by_queries = {queries: times(queries) for queries in (1, 2)}
    best = {}
    for name in ("SCORES", "SCORES_GRADIENT"):
        total = {warps: sum(found[name, warps] for found in by_queries.values()) for warps in WARPS}
        best[name] = min(WARPS, key=total.__getitem__)
        for queries, found in by_queries.items():
            each = " | ".join(f"{found[name, warps]:.3f}" for warps in WARPS)
            print(f"{name}, queries {queries}, ms with {' | '.join(map(str, WARPS))} warps: {each}")
    set_constants(Path(kernels.__file__), best, "--write" in sys.argv)


if __name__ == "__main__":
    main()

"""Finds the best number of warps of the delta rule's Triton kernels on this card: constants of triton_delta_rule.py.

    python benchmarks/tune_delta_rule.py [--write]        # about 40 s, most of it compiling in parallel

Every kernel is timed with 4 and 8 warps at 16 heads and 16,384 tokens, alone, by CUDA events.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import set_constants

from bsbr_pl.attention import triton_delta_rule as kernels

NAMES = ("PREPARE", "OUTPUT", "PREPARE_GRADIENT", "GRADIENT")
CASES = [(width, decays) for width in (64, 128) for decays in (False, True)]


def milliseconds(width: int, decays: bool, warps: int, tokens: int = 16_384) -> dict[str, float]:
    """Of each kernel, and of the recurrences, with so many warps."""
    for name in NAMES:
        setattr(kernels, name, (warps,) * 4)
    q, k, v, grad = torch.randn(4, 1, tokens, 16, width, device="cuda").bfloat16()
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = torch.rand(1, tokens, 16, device="cuda")
    log_alpha = -0.1 * torch.rand_like(beta) if decays else None

    def both() -> None:
        *_, inverses, states = kernels.forward(q, k, v, beta, log_alpha)
        kernels.backward(grad, None, inverses, states, q, k, v, beta, log_alpha)

    both()
    both()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            both()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / 1e4 for event in profile.key_averages()}


def main() -> None:
    if len(sys.argv) == 4:
        milliseconds(*map(int, sys.argv[1:]), tokens=16_384)
        return
    start = time.monotonic()
    jobs = [(width, decays, warps) for width, decays in CASES for warps in (4, 8)]
    for process in [subprocess.Popen([sys.executable, __file__, *(str(int(x)) for x in job)]) for job in jobs]:
        process.wait()
    print(f"compiled in {time.monotonic() - start:.0f} s")
    best: dict[str, list[int]] = {name: [] for name in NAMES}
    for width, decays in CASES:
        times = {warps: milliseconds(width, decays, warps) for warps in (4, 8)}
        for name in NAMES:
            kernel = "_" + name.lower()
            best[name].append(min((4, 8), key=lambda warps, kernel=kernel: times[warps][kernel]))
        print(f"width {width}, decays {decays}, ms with 4 | 8 warps:")
        for key in sorted(times[4], key=times[4].get, reverse=True)[:8]:
            print(f"    {key[:60]:60} {times[4][key]:.3f} | {times[8].get(key, float('nan')):.3f}")
    warps_of = {name: tuple(warps) for name, warps in best.items()}
    set_constants(Path(kernels.__file__), warps_of, "--write" in sys.argv)


if __name__ == "__main__":
    main()

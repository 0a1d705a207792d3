"""The attention operation alone, forward and backward, against causal `scaled_dot_product_attention`.

    python benchmarks/operation.py                                    # 1,024 and 16,384 tokens
    python benchmarks/operation.py --lengths 4096 --architectures bsbr linear

What is timed lies between the linear projections and the output's projection: feature maps, key normalisation, chunk
scores, gains. Rotary positions and short convolutions are left out, on both sides. One sequence, fp32, 4 heads of 64;
GAU has its one head, with keys of 128 and values of 512 dimensions. Gradients are taken by all inputs. The speed-up is
the time of scaled_dot_product_attention over that of the architecture, round by round.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import parser, publish, ratio
from torch import Tensor

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.utils.timing import measure

HIDDEN_DIM, NUM_HEADS, HEAD_DIM = 256, 4, 64
BASELINE = "scaled_dot_product_attention"
BSBR = {  # its options under the names of the tables
    "bsbr": {},
    "bsbr top-k 8": {"retrieval_top_k": 8},
    "bsbr own chunk": {"overlap": False, "conv_size": 1},
}
NAMES = (*BSBR, "linear", "sliding_window", "gau", "delta_net")


def operation(name: str, length: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """An architecture's operation and its inputs, laid out in memory as a projection leaves them."""
    generator = torch.Generator().manual_seed(0)

    def heads(tokens: int = length) -> Tensor:  # (B, H, T, K)
        return torch.randn(1, tokens, NUM_HEADS, HEAD_DIM, generator=generator).transpose(1, 2)

    q, k, v = heads(), heads(), heads()
    if name == BASELINE:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]
    if name in BSBR:
        bsbr = ARCHITECTURES["bsbr"](HIDDEN_DIM, NUM_HEADS, rope=False, initial_gain=1.0, **BSBR[name])
        chunks = -(-length // bsbr.chunk_size)
        return lambda *inputs: bsbr.mix(*inputs)[0], [q, k, v, heads(chunks), heads(chunks)]
    attention = ARCHITECTURES[name](
        HIDDEN_DIM, NUM_HEADS, **({} if name in ("linear", "delta_net") else {"rope": False})
    )
    if name == "linear":
        return lambda q, k, v: attention.mix(F.elu(q) + 1, F.elu(k) + 1, v)[0], [q, k, v]
    if name == "delta_net":
        beta = torch.rand(1, NUM_HEADS, length, 1, generator=generator)
        return lambda q, k, v, beta: attention.mix(*map(unit, (q, k)), v, beta)[0], [q, k, v, beta]
    if name == "gau":
        z = torch.randn(1, length, attention.key_dim, generator=generator)
        return lambda *inputs: attention.mix(*inputs)[0], [
            z,
            torch.randn(1, length, attention.value_dim, generator=generator),
        ]
    return attention.mix, [q, k, v]


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def call(name: str, length: int, compiled: bool = False) -> Callable[[], object]:
    """Forward and backward of an operation."""
    forward, inputs = operation(name, length)
    return both_passes(torch.compile(forward, dynamic=False) if compiled else forward, inputs)


def both_passes(forward: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward, and the gradients by all inputs of a sum with dense random weights."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with torch.no_grad():
        weights = torch.randn(forward(*inputs).shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(forward(*inputs), inputs, weights)


def main() -> None:
    options = parser(__doc__, rounds=9)
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 16384], help="tokens")
    options.add_argument("--architectures", nargs="+", default=list(NAMES), choices=NAMES)
    options.add_argument("--compile", action="store_true", help="time each through torch.compile as well")
    chosen = options.parse_args()
    keep_freed_memory()
    rows = []
    for length in chosen.lengths:
        calls = {name: call(name, length) for name in (BASELINE, *chosen.architectures)}
        if chosen.compile:
            calls |= {f"{name} compiled": call(name, length, compiled=True) for name in chosen.architectures}
        timings = measure(calls, chosen.rounds, min_seconds=0.1)
        for name, timing in timings.items():
            gain = ratio(timings[BASELINE], timing)
            rows.append(
                {
                    "tokens": length,
                    "operation": name,
                    "milliseconds": timing.median * 1e3,
                    "speed-up": gain.median,
                    "95 % interval": [gain.low, gain.high],
                }
            )
    publish(rows, chosen.out)


if __name__ == "__main__":
    main()

"""The attention operation alone, forward and backward, against causal `scaled_dot_product_attention`.

    python benchmarks/operation.py                                    # 1,024 and 16,384 tokens
    python benchmarks/operation.py --lengths 4096 --architectures bsbr linear
    python benchmarks/operation.py --device cuda --dtype bfloat16 --lengths 1024 16384

What is timed lies between the linear projections and the output's projection: feature maps, key normalisation, chunk
scores, gains. Rotary positions and short convolutions are left out, on both sides. One sequence, 4 heads of 64; GAU has
its one head, with keys of 128 and values of 512 dimensions. Gradients are taken by all inputs. The speed-up is the time
of scaled_dot_product_attention over that of the architecture, round by round. "kernel" is what kernels.py chooses, on
CUDA in low precision.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import parser, publish, ratio
from torch import Tensor

from bsbr_pl.attention import ARCHITECTURES, kernels
from bsbr_pl.attention.parts import at_least_fp32
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.utils.timing import measure

HIDDEN_DIM, NUM_HEADS, HEAD_DIM = 256, 4, 64
BASELINE = "scaled_dot_product_attention"
BSBR = {  # its options under the names of the tables
    "bsbr": {},
    "bsbr top-k 8": {"retrieval_top_k": 8},
    "bsbr own chunk": {"overlap": False, "conv_size": 1},
}
KERNELS = {"linear kernel": kernels.linear_kernel, "delta_net kernel": kernels.delta_rule_kernel}
NAMES = (*BSBR, "linear", "sliding_window", "gau", "delta_net")


def operation(
    name: str, length: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """An architecture's operation and its inputs, laid out in memory as a projection leaves them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, dtype)

    def heads(tokens: int = length) -> Tensor:  # (B, H, T, K)
        return random(tokens, NUM_HEADS, HEAD_DIM).transpose(1, 2)

    q, k, v = heads(), heads(), heads()
    if name == BASELINE:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]
    architecture = "bsbr" if name in BSBR else name.removesuffix(" kernel")
    options = {} if architecture in ("linear", "delta_net") else {"rope": False}
    if architecture == "bsbr":
        options |= {"initial_gain": 1.0, **BSBR[name]}
    attention = ARCHITECTURES[architecture](HIDDEN_DIM, NUM_HEADS, **options).to(device, dtype)
    mix = partial(KERNELS[name], dtype) if name in KERNELS else attention.mix
    if architecture == "bsbr":
        chunks = -(-length // attention.chunk_size)
        return lambda *inputs: mix(*inputs)[0], [q, k, v, heads(chunks), heads(chunks)]
    if architecture == "linear":
        return lambda q, k, v: mix(feature(q), feature(k), at_least_fp32(v))[0], [q, k, v]
    if architecture == "delta_net":
        beta = torch.rand(1, NUM_HEADS, length, 1, generator=generator).to(device, dtype)
        return lambda q, k, v, beta: mix(unit(q), unit(k), *map(at_least_fp32, (v, beta)))[0], [q, k, v, beta]
    if architecture == "gau":
        return lambda *inputs: mix(*inputs)[0], [random(length, attention.key_dim), random(length, attention.value_dim)]
    return mix, [q, k, v]


def feature(x: Tensor) -> Tensor:
    return F.elu(at_least_fp32(x)) + 1


def unit(x: Tensor) -> Tensor:
    return F.normalize(at_least_fp32(x), dim=-1)


def call(
    name: str, length: int, compiled: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    """Forward and backward of an operation."""
    forward, inputs = operation(name, length, device, dtype)
    return both_passes(torch.compile(forward, dynamic=False) if compiled else forward, inputs)


def both_passes(forward: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward, and the gradients by all inputs of a sum with dense random weights."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with torch.no_grad():
        mixed = forward(*inputs)
        weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(mixed)
    return lambda: torch.autograd.grad(forward(*inputs), inputs, weights)


def main() -> None:
    options = parser(__doc__, rounds=9)
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 16384], help="tokens")
    options.add_argument("--architectures", nargs="+", default=list(NAMES), choices=NAMES)
    options.add_argument("--compile", action="store_true", help="time each through torch.compile as well")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    chosen = options.parse_args()
    keep_freed_memory()
    rows = []
    where = {"device": chosen.device, "dtype": getattr(torch, chosen.dtype)}
    plain = [BASELINE, *chosen.architectures]
    if chosen.device != "cpu" and chosen.dtype != "float32":
        plain += [name for name in KERNELS if name.removesuffix(" kernel") in plain]
    for length in chosen.lengths:
        calls = {name: call(name, length, **where) for name in plain}
        if chosen.compile:
            calls |= {f"{name} compiled": call(name, length, compiled=True, **where) for name in chosen.architectures}
        timings = measure(calls, chosen.rounds, min_seconds=0.1, device=chosen.device)
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
    publish(rows, chosen.out, chosen.device)


if __name__ == "__main__":
    main()

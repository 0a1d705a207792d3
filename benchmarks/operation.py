"""The attention operation alone, forward and backward, against causal `scaled_dot_product_attention`.

    python benchmarks/operation.py                                    # 1,024 and 16,384 tokens
    python benchmarks/operation.py --lengths 4096 --architectures bsbr linear

What is timed is `mix`, which an architecture has between its projections and its output: no projections, feature maps,
key normalisation, short convolutions, output norm and gate. One sequence, 4 heads of 64; GAU has one head, with keys
of 128 and values of 512 dimensions. There are no rotary positions on either side. The inputs are those that a layer
gives `mix` for random x; gradients are taken by all of them. The speed-up is the time of scaled_dot_product_attention
over that of the architecture, round by round.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import parser, publish, ratio
from torch import Tensor

from bsbr_pl.attention import ARCHITECTURES, Attention
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.utils.timing import measure

HIDDEN_DIM, NUM_HEADS, HEAD_DIM = 256, 4, 64
BASELINE = "scaled_dot_product_attention"
BSBR: dict[str, dict[str, Any]] = {  # its options under the names of the tables
    "bsbr": {},
    "bsbr top-k 8": {"retrieval_top_k": 8},
    "bsbr own chunk": {"overlap": False, "conv_size": 1},
}
NAMES = (*BSBR, *(name for name, kind in ARCHITECTURES.items() if name not in BSBR and hasattr(kind, "mix")))


def layer(name: str) -> Attention:
    """The layer of a row, without rotary positions; BSBR retrieves with a gain of 1."""
    kind = ARCHITECTURES["bsbr" if name in BSBR else name]
    options = {"initial_gain": 1.0, **BSBR[name]} if name in BSBR else {}
    if "rope" in inspect.signature(kind).parameters:
        options["rope"] = False
    return kind(HIDDEN_DIM, NUM_HEADS, **options)


def operation(name: str, length: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """An operation and its inputs, laid out in memory as the projections leave them."""
    torch.manual_seed(0)
    if name == BASELINE:
        qkv = [torch.randn(1, length, NUM_HEADS, HEAD_DIM).transpose(1, 2) for _ in range(3)]
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), qkv
    attention = layer(name)
    mix, calls = attention.mix, []
    attention.mix = lambda *given: calls.append(given) or mix(*given)
    with torch.no_grad():
        attention(torch.randn(1, length, HIDDEN_DIM))
    (given,) = calls
    inputs = [one for one in given if isinstance(one, Tensor)]  # what follows is a state, of which there is none
    assert given[: len(inputs)] == (*inputs,)

    def forward(*inputs: Tensor) -> Tensor:
        mixed = mix(*inputs)
        return mixed[0] if isinstance(mixed, tuple) else mixed

    return forward, inputs


def call(name: str, length: int, compiled: bool = False) -> Callable[[], object]:
    """Forward and backward of an operation."""
    forward, inputs = operation(name, length)
    return both_passes(torch.compile(forward, dynamic=False) if compiled else forward, inputs)


def both_passes(forward: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward, and the gradients by all inputs of a sum with dense random weights."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    with torch.no_grad():
        mixed = forward(*inputs)
        weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(mixed)
    return lambda: torch.autograd.grad(forward(*inputs), inputs, weights, allow_unused=True)  # MoBA chooses by means


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

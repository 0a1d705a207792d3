"""Compares with alternatives: the published predecessor and two well-known packages, in a separate environment.

    python -m venv others && others/bin/pip install -c constraints.txt -e . local-attention
    others/bin/pip install --no-build-isolation git+https://github.com/idiap/fast-transformers    # compiles
    git clone https://github.com/JacobFV/bsbr predecessor
    PYTHONPATH=predecessor/src others/bin/python benchmarks/others.py

- layer: forward and backward of a whole attention layer, hidden 256, 4 heads, chunk or window 128, one sequence,
  against the layer of the same name in the predecessor (PyPI `bsbr` holds its BSBR, its repository the other six too);
- operation: without projections, as in operation.py, against the causal linear attention of fast-transformers (C++)
  and the window of local-attention.

Speed-up: their time over ours, round by round. They are not dependencies; what is not installed is skipped.
"""

import importlib
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import parser, publish, ratio
from operation import NUM_HEADS, both_passes, call, operation
from torch import nn

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.utils.timing import measure

HIDDEN_DIM, CHUNK = 256, 128
# Registry key -> module, class and arguments beyond the width (and heads) in the predecessor.
PREDECESSOR = {
    "bsbr": ("bsbr", "BSBRAttention", (NUM_HEADS, CHUNK)),
    "standard": ("bsbr_extras.standard_transformer", "StandardAttention", (NUM_HEADS,)),
    "sliding_window": ("bsbr_extras.sliding_window_transformer", "SlidingWindowAttention", (NUM_HEADS, CHUNK)),
    "linear": ("bsbr_extras.linear_transformer", "LinearAttention", (NUM_HEADS,)),
    "delta_net": ("bsbr_extras.delta_net", "DeltaNetAttention", (NUM_HEADS,)),
    "hopfield": ("bsbr_extras.hopfield_network", "HopfieldAttention", (NUM_HEADS,)),
    "gau": ("bsbr_extras.gau", "ChunkGatedAttentionUnit", (CHUNK,)),
}


def passes(layer: nn.Module, length: int, backward: bool) -> Callable[[], object]:
    x = torch.randn(1, length, HIDDEN_DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = [x, *layer.parameters()]

    def run() -> object:
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        return torch.autograd.grad(out.square().mean(), inputs, allow_unused=True) if backward else out

    return run


def predecessor_layer(name: str) -> nn.Module:
    module, kind, arguments = PREDECESSOR[name]
    return getattr(importlib.import_module(module), kind)(HIDDEN_DIM, *arguments).eval()


def fast_transformers(length: int) -> Callable[[], object]:
    from fast_transformers.attention.causal_linear_attention import CausalLinearAttention
    from fast_transformers.masking import LengthMask, TriangularCausalMask

    attention = CausalLinearAttention(HIDDEN_DIM // NUM_HEADS)
    mask, lengths = TriangularCausalMask(length), LengthMask(torch.tensor([length]))
    inputs = [part.transpose(1, 2) for part in operation("linear", length)[1]]  # (B, T, H, K)
    return both_passes(lambda q, k, v: attention(q, k, v, mask, lengths, lengths), inputs)


def our_linear(length: int) -> Callable[[], object]:
    """With a feature map, which theirs includes."""
    mix, inputs = operation("linear", length)
    return both_passes(lambda q, k, v: mix(F.elu(q) + 1, F.elu(k) + 1, v), inputs)


def local_attention(length: int) -> Callable[[], object]:
    from local_attention import LocalAttention

    attention = LocalAttention(CHUNK, causal=True, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True)
    return both_passes(attention, operation("sliding_window", length)[1])


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--layer-lengths", type=int, nargs="*", default=[1024, 4096], help="tokens")
    options.add_argument("--operation-lengths", type=int, nargs="*", default=[4096, 16384], help="tokens")
    chosen = options.parse_args()
    keep_freed_memory()
    rows: list[dict] = []

    def compare(what: str, length: int, against: str, theirs: Callable[[], object], ours: Callable[[], object]) -> None:
        timings = measure({"theirs": theirs, "ours": ours}, chosen.rounds, warmup=1, min_seconds=0.05)
        gain = ratio(timings["theirs"], timings["ours"])
        row = {"what": what, "tokens": length, "against": against}
        row |= {f"{name}, ms": timing.median * 1e3 for name, timing in timings.items()}
        rows.append(row | {"speed-up": gain.median, "95 % interval": [gain.low, gain.high]})
        print(rows[-1], flush=True)

    for length in chosen.layer_lengths:
        for name in PREDECESSOR:
            try:
                theirs, ours = predecessor_layer(name), ARCHITECTURES[name](HIDDEN_DIM, NUM_HEADS)
            except ImportError as error:
                print(f"left out: predecessor's {name}: {error}")
                continue
            backward = True
            try:
                passes(theirs, length, backward)()
            except RuntimeError as error:
                print(f"predecessor's {name} has no backward pass: {str(error).split(':')[0]}")
                backward = False
            what = "layer" if backward else "layer, forward alone"
            both = [passes(layer, length, backward) for layer in (theirs, ours)]
            compare(what, length, f"predecessor's {name}", *both)
    for length in chosen.operation_lengths:
        for against, theirs, ours in (
            ("fast-transformers' linear", fast_transformers, our_linear),
            ("local-attention's window", local_attention, partial(call, "sliding_window")),
        ):
            try:
                compare("operation", length, against, theirs(length), ours(length))
            except ImportError as error:
                print(f"left out: {against}: {error}")
    publish(rows, chosen.out)


if __name__ == "__main__":
    main()

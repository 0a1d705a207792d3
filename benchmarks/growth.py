"""How cost grows: the operation from 2,048 to 32,768 tokens, a decoded token after 1,024 and 65,536, a prefill.

    python benchmarks/growth.py
    python benchmarks/growth.py --lengths 256 512 --contexts 64 256 --prefill 256 --rounds 1       # a minute's look

- exponents: least-squares slope of ln(cost) over ln(tokens) of the attention operation, forward and backward (as in
  operation.py): seconds, and the peak of live tensor bytes, its inputs among them;
- decode: milliseconds a token of a model (hidden 256, 4 layers), the mean over the 128 tokens that follow the context
  (BSBR does most of its work once in a chunk of 128), and the ratio of the longest context to the shortest;
- prefill: `model.prefill`, which leaves the decode state, over the forward pass to the same last token's logits.
"""

from collections.abc import Callable

import torch
from common import parser, publish, ratio
from operation import BSBR, NAMES, call
from training_step import SIZE

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.utils.memory import measure_memory
from bsbr_pl.utils.timing import measure
from bsbr_pl.values import exponent

CHUNK = 128


def build(name: str) -> LanguageModel:
    torch.manual_seed(0)
    options = BSBR.get(name, {})
    kind = ARCHITECTURES["bsbr" if name in BSBR else name]
    return LanguageModel(lambda hidden_dim, num_heads: kind(hidden_dim, num_heads, **options), **SIZE).eval()


def tokens(length: int) -> torch.Tensor:
    return torch.randint(SIZE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))


def decode(model: LanguageModel, context: int) -> Callable[[], object]:
    """CHUNK tokens after a context."""
    following = tokens(CHUNK)[0]
    with torch.no_grad():
        start = model.prefill(tokens(context))[1]

    @torch.no_grad()
    def run() -> None:
        states = start
        for i in range(CHUNK):
            _, states = model.step(following[i : i + 1], states)

    return run


@torch.no_grad()
def last_logits(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    return model.head(model.hidden(ids)[:, -1])


@torch.no_grad()
def prefill(model: LanguageModel, ids: torch.Tensor) -> object:
    return model.prefill(ids)


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768], help="tokens")
    options.add_argument("--contexts", type=int, nargs=2, default=[1024, 65536], help="tokens before those decoded")
    options.add_argument("--prefill", type=int, default=16384, help="tokens of the prefill")
    options.add_argument("--architectures", nargs="+", default=list(NAMES), choices=NAMES)
    chosen = options.parse_args()
    keep_freed_memory()
    seconds: dict[str, dict[int, list[float]]] = {name: {} for name in chosen.architectures}
    peaks: dict[str, dict[int, list[float]]] = {name: {} for name in chosen.architectures}
    for length in chosen.lengths:
        calls = {name: call(name, length) for name in chosen.architectures}
        for name, timing in measure(calls, chosen.rounds, min_seconds=0.1).items():
            seconds[name][length] = timing.samples
        for name, one in calls.items():
            peaks[name][length] = [measure_memory(one, "cpu")["peak_bytes"]]
    rows = []
    for name in chosen.architectures:
        model, ids = build(name), tokens(chosen.prefill)
        short, long = chosen.contexts
        decoded = measure({"short": decode(model, short), "long": decode(model, long)}, chosen.rounds, warmup=1)
        passes = {"forward": lambda m=model, i=ids: last_logits(m, i), "prefill": lambda m=model, i=ids: prefill(m, i)}
        filled = measure(passes, 2 * chosen.rounds, warmup=1)
        time_exponent = exponent(seconds[name])
        memory_exponent = exponent(peaks[name])
        rows.append(
            {
                "architecture": name,
                "time exponent": time_exponent["exponent"] if time_exponent else None,
                "its 95 % interval": time_exponent["interval"] if time_exponent else None,
                "memory exponent": memory_exponent["exponent"] if memory_exponent else None,
                f"decode after {short:,}, ms": decoded["short"].median / CHUNK * 1e3,
                f"after {long:,}, ms": decoded["long"].median / CHUNK * 1e3,
                "long / short": ratio(decoded["long"], decoded["short"]).median,
                "prefill / forward": ratio(filled["prefill"], filled["forward"]).median,
            }
        )
        print(rows[-1], flush=True)
    publish(rows, chosen.out)


if __name__ == "__main__":
    main()

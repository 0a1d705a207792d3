"""A training step of the whole model (forward, loss, backward, clipping, AdamW): BSBR and others against Standard.

    python benchmarks/training_step.py                                  # long sequences, then the share of the peak
    python benchmarks/training_step.py --lengths 4096 --architectures linear

Hidden 256, 4 layers, 4 heads, 8,192 ids, fp32. First one sequence of each length, the speed-up being Standard's time
over the architecture's, round by round. Then Standard on 8 sequences of 512 tokens: matrix-product floating-point
operations by closed form (backward counted as twice forward) over time, as a share of the best matrix product in the
same run.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import parser, publish, ratio

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.utils.flops import matmul_peak
from bsbr_pl.utils.timing import measure

SIZE = {"vocab_size": 8192, "hidden_dim": 256, "num_layers": 4, "num_heads": 4}
SHORT = 512  # tokens


def training_step(model: LanguageModel, batch: int, length: int, compiled: bool = False) -> Callable[[], object]:
    """One optimiser step on the same random tokens; `compiled` as `--model.compile=true` does it."""
    hidden = torch.compile(model.hidden, dynamic=False) if compiled else model.hidden
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(model.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        loss = F.cross_entropy(model.head(hidden(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384], help="tokens")
    options.add_argument("--architectures", nargs="+", default=["bsbr"], choices=list(ARCHITECTURES))
    options.add_argument("--batch", type=int, default=8, help=f"sequences of {SHORT} tokens for the share of the peak")
    options.add_argument("--compile", action="store_true", help="time each through torch.compile as well")
    chosen = options.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    names = dict.fromkeys(["standard", *chosen.architectures])
    models = {name: LanguageModel(ARCHITECTURES[name], **SIZE) for name in names}
    rows: list[dict] = []
    for length in chosen.lengths:
        calls = {name: training_step(model, 1, length) for name, model in models.items()}
        if chosen.compile:
            calls |= {f"{name} compiled": training_step(model, 1, length, True) for name, model in models.items()}
        timings = measure(calls, chosen.rounds, warmup=1)
        for name, timing in timings.items():
            gain = ratio(timings["standard"], timing)
            rows.append(
                {
                    "architecture": name,
                    "batch": 1,
                    "tokens": length,
                    "seconds": timing.median,
                    "speed-up": gain.median,
                    "95 % interval": [gain.low, gain.high],
                }
            )
    before = matmul_peak()
    timing = measure({"standard": training_step(models["standard"], chosen.batch, SHORT)}, 3 * chosen.rounds)[
        "standard"
    ]
    peak = max(before, matmul_peak())
    flops = 3 * chosen.batch * models["standard"].flops(SHORT)
    rows.append(
        {
            "architecture": "standard",
            "batch": chosen.batch,
            "tokens": SHORT,
            "seconds": timing.median,
            "GFLOP/s": flops / timing.median / 1e9,
            "matmul peak GFLOP/s": peak / 1e9,
            "share of peak": flops / timing.median / peak,
        }
    )
    publish(rows, chosen.out)


if __name__ == "__main__":
    main()

"""Every architecture on one CUDA card: the law, the operation, the training step, a decoded token.

    python benchmarks/gpu.py --seconds 480            # measure the missing rows, the most important first
    python benchmarks/gpu.py --table                  # the rows so far as Markdown
    python benchmarks/gpu.py --dry-run                # every row at toy size on a CPU; into a temporary file

Each row is a line of benchmarks/results/gpu.jsonl. It is written when it is measured, and skipped if the file has it
for the card, the torch and the code of now (of its architecture and what that imports), so that several short calls
fill one table. Rows of older code stay in the table, marked, until they are measured again. A row that fails writes its
error, and the next row follows.
Compiled forms are first compiled in parallel processes, one per core, for at most `--warm-seconds`.

The operation is the operation of `benchmarks/operation.py` (without projections, convolutions and rotary positions),
forward and backward, one sequence, bf16. "device" is the time of a CUDA graph's replay, "launched" the time of the same
calls from Python. The training step uses `bf16-mixed`: hidden 768, 12 layers, 12 heads, 16,384 ids, AdamW, clipping.

One file for each subject: gpu_rows.py (which rows), gpu_operation.py, gpu_model.py and gpu_law.py (what is measured),
gpu_clock.py (how it is timed), gpu_run.py (the order, the time limit), gpu_tables.py.
"""

import json
import os
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from common import ROOT, parser
from gpu_rows import rows
from gpu_run import code, compile_keys, measure_rows, read
from gpu_tables import tables

CACHE = "/tmp/bsbr_pl-gpu-cache"


def choose_options() -> Namespace:
    options = parser(__doc__)
    options.set_defaults(out=None)
    options.add_argument("--seconds", type=float, default=480, help="start no row after this time, default 480")
    options.add_argument("--warm-seconds", type=float, default=110, help="time to compile in parallel, default 110")
    options.add_argument("--kinds", nargs="+", help="peak, law, operation, step, decode; default all")
    options.add_argument("--only", nargs="+", default=[""], help="rows whose key contains one of these texts")
    options.add_argument("--table", action="store_true", help="print the rows so far and stop")
    options.add_argument("--list", action="store_true", help="print the keys in order and stop")
    options.add_argument("--dry-run", action="store_true", help="every row at toy size on a CPU")
    options.add_argument("--warm", help="(for its own processes) keys to compile, as JSON")
    return options.parse_args()


def main() -> None:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{CACHE}/inductor")
    os.environ.setdefault("TRITON_CACHE_DIR", f"{CACHE}/triton")
    chosen = choose_options()
    if chosen.warm:
        return compile_keys(json.loads(chosen.warm))
    wanted = [row for row in rows() if not chosen.kinds or row.kind in chosen.kinds]
    wanted = [row for row in wanted if any(text in row.key for text in chosen.only)]
    if chosen.list:
        return print("\n".join(row.key for row in wanted))
    if chosen.out is None:
        folder = Path(tempfile.mkdtemp()) if chosen.dry_run else ROOT / "benchmarks" / "results"
        chosen.out = folder / "gpu.jsonl"
    if not chosen.table:
        if not chosen.dry_run and not torch.cuda.is_available():
            sys.exit("there is no CUDA device: --dry-run measures every row at toy size on the CPU")
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        measure_rows(wanted, chosen.out, chosen.seconds, chosen.warm_seconds, chosen.dry_run)
    print(tables(read(chosen.out), code))


if __name__ == "__main__":
    main()

"""The command line: `python evaluate.py runs/`, or `python -m bsbr_pl.evals runs/` where only the package is."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from bsbr_pl.parsing import Parser
from bsbr_pl.results import Results
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.values import one_line

from .checkpoints import read_all
from .evaluation import LENGTHS, MULTIPLES, Evaluation, this_command
from .report import write_report
from .report.budgets import warnings
from .report.findings import Findings
from .saved_data import HERE, DataLocation


def evaluate(
    paths: Sequence[str],
    output_dir: str = "evaluation",
    split: Literal["val", "test"] = "val",
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    multiples: list[int] = list(MULTIPLES),  # noqa: B006 - never changed; the command line shows it as the default
    lengths: list[int] = list(LENGTHS),  # noqa: B006
    rounds: int = 5,
    data: DataLocation = HERE,
) -> int:
    """Certify checkpoints, measure their accuracy and their costs, and write a report. 0 if any could be evaluated.

    Args:
        paths: folders, files or patterns of checkpoints (*.ckpt) that train.py wrote
        output_dir: where results.jsonl, report.html, report.md, tables and plots go; results already there are kept
        split: of the data that each was trained on
        device: cpu, cuda, ...; auto takes a GPU where there is one
        dtype: of weights and computation
        multiples: context lengths to predict text at, in lengths of training
        lengths: tokens of the sequences that time, memory and FLOPs are measured on; an empty list for none
        rounds: samples of each time; all models are timed in turn in each round
        data: where the text that checkpoints were trained on is now, if it has moved

    Raises:
        ValueError: naming the argument, or a path that holds no checkpoint.
        OSError: naming what cannot be read or written.
    """
    for name, values in (("multiples", multiples), ("lengths", lengths), ("rounds", [rounds])):
        if any(value < 1 for value in values):
            raise ValueError(f"{name} must be at least 1, got {values}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for it
        raise ValueError(f"device={device!r} cannot be used here: {one_line(error)}") from error
    evaluation = Evaluation(
        checkpoints=read_all(paths, data),
        results=Results(Path(output_dir) / "results.jsonl"),
        device=device,
        dtype=dtype,
        split=split,
        multiples=multiples,
        lengths=lengths,
        rounds=rounds,
        command=this_command(),
    )
    stopped = False
    try:
        evaluation.run()
    except KeyboardInterrupt:
        stopped = True
        print("\nStopped: the report shows what was measured; the same command goes on from there.", file=sys.stderr)
    report = write_report(evaluation, Path(output_dir))
    for name, problem in evaluation.problems.items():
        print(f"{name}: {problem}", file=sys.stderr)
    for warning in warnings(Findings(evaluation)):
        print(f"Warning: {warning}", file=sys.stderr)
    print(report)
    return 130 if stopped else int(all(c.module is None for c in evaluation.checkpoints))


def main(args: Sequence[str] | None = None) -> int:
    """Parse the command line and evaluate; the exit code."""
    keep_freed_memory()
    parser = Parser(prog="evaluate.py", description=(evaluate.__doc__ or "").split("\n")[0])
    parser.add_argument("paths", nargs="+", type=str, help="folders, files or patterns of checkpoints (*.ckpt)")
    parser.add_function_arguments(evaluate, skip={"paths"}, as_group=False)
    options = parser.parse_args(args)
    try:
        return evaluate(**vars(parser.instantiate_classes(options)))
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
    except ValueError as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    sys.exit(main())

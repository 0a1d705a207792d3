"""The command line, `bsbr` or `python -m bsbr_pl`: evaluate, report, certify, match, retrieval and others."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bsbr_pl.parsing import Parser, open_streams, trusted_packages, warnings_in_a_line
from bsbr_pl.results import open_problems, read_rows
from bsbr_pl.values import did_you_mean, one_line

COMMANDS = {
    "evaluate": "certify checkpoints, measure their accuracy and their costs, and write a report",
    "report": "write a report from the rows of results.jsonl files, without their checkpoints",
    "certify": "check that a module of your own is causal",
    "match": "print the sizes at which architectures have the budget of a reference",
    "retrieval": "print where a trained model fails on its own recall task",
    "submit": "check the rows of models, and append them to a board",
    "lm-eval": "evaluate a trained model on tasks of the lm-evaluation-harness",
    "export": "write a trained model as a folder for Hugging Face's transformers",
}
#: Arguments that are no options.
POSITIONAL = ("paths", "module", "checkpoint", "folder")


def report(paths: Sequence[str], output_dir: str = "evaluation", latex: str | None = None) -> int:
    """Write a report from rows. Needs no checkpoint, no data and no torch.

    Args:
        paths: results.jsonl files, of any machines; of equal rows the last one counts
        output_dir: where report.html, report.md, tables and plots go
        latex: folder for tables (booktabs) and figures (PDF, 3.25 inches wide) of a paper
    """
    from bsbr_pl.report import write_latex, write_report

    others = [path for path in paths if not path.endswith(".jsonl")]
    if others:
        raise ValueError(f"{others[0]} is no results.jsonl: give either results or checkpoints")
    rows = read_rows(paths)
    if not rows:
        raise ValueError(f"there is no row of a result in {', '.join(paths)}")
    measured = [row for row in rows if row["identity"]["kind"] != "problem"]
    rows = [*measured, *open_problems(rows)]
    print(write_report(rows, Path(output_dir)))
    if latex is not None:
        print(write_latex(rows, Path(latex)))
    return 0


def main(args: Sequence[str] | None = None, program: str = "bsbr") -> int:
    """Run the command that the first argument names; the exit code."""
    name, *options = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {program} COMMAND ...\n")
        print("\n".join(f"  {command:10} {text}" for command, text in COMMANDS.items()))
        print(f"\n`{program} COMMAND --help` shows the options of a command")
        return 0
    if name not in COMMANDS:
        words = did_you_mean(name, list(COMMANDS)) or f"; there are {', '.join(COMMANDS)}"
        print(f"{program}: error: there is no command {name}{words}", file=sys.stderr)
        raise SystemExit(2)
    return run(name, options, f"{program} {name}")


def run(name: str, args: Sequence[str], program: str) -> int:
    """Run one command; the exit code. Files of results are never evaluated, but reported."""
    open_streams()
    if name == "evaluate" and any(a.endswith(".jsonl") for a in args if not a.startswith("-")):
        name = "report"
    command = _command(name)
    parser = Parser(prog=program, description=(command.__doc__ or "").split("\n")[0])
    _add_arguments(parser, command)
    words = "packages, separated by commas, that are imported, so that checkpoints may name their classes"
    parser.add_argument("--trust", type=str | None, default=None, help=words)
    options = parser.parse_args(args)
    del options.trust
    try:
        packages = trusted_packages(args)
        if name != "report":  # which needs no torch
            from bsbr_pl.foreign import trust

            trust(packages)
        for package in packages:
            importlib.import_module(package)
        with warnings_in_a_line():
            return command(**vars(parser.instantiate(options)))
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.error(one_line(error))


def _add_arguments(parser: Parser, command: Callable[..., int]) -> None:
    """An option for each argument of a command but those of `POSITIONAL`; a bool is an option without a value."""
    helps = dict(re.findall(r"^ {8}(\w+): (.*)", command.__doc__ or "", re.MULTILINE))
    arguments = inspect.signature(command).parameters
    positional = [name for name in arguments if name in POSITIONAL]
    flags = [name for name in arguments if arguments[name].annotation is bool]
    for name in positional:
        nargs = None if arguments[name].annotation is str else "+"
        parser.add_argument(name, type=str, nargs=nargs, help=helps[name])
    parser.add_function_arguments(command, skip={*positional, *flags}, as_group=False)
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true", help=helps[name])


def _command(name: str) -> Callable[..., int]:
    if name == "report":
        return report
    from bsbr_pl.evals import commands  # imports torch

    return getattr(commands, name.replace("-", "_"))


if __name__ == "__main__":
    sys.exit(main(program="python -m bsbr_pl"))

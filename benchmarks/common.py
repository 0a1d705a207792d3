"""Shared by the scripts of this folder: the options, the table on the screen, the JSON file, ratios of times."""

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bsbr_pl.utils.files import write_json  # noqa: E402
from bsbr_pl.utils.records import environment, git_commit  # noqa: E402
from bsbr_pl.utils.timing import Timing, summarize  # noqa: E402


def parser(doc: str | None, rounds: int | None = None) -> ArgumentParser:
    """An ArgumentParser with the options of every script; `rounds` adds the option of scripts that measure times."""
    options = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    if rounds is not None:
        options.add_argument("--rounds", type=int, default=rounds, help=f"samples of each time, default {rounds}")
    default = ROOT / "benchmarks" / "results" / f"{Path(sys.argv[0]).stem}.json"
    options.add_argument(
        "--out", type=Path, default=default, help="JSON file, default benchmarks/results/<script>.json"
    )
    return options


def set_constants(source: Path, constants: dict[str, Any], write: bool) -> None:
    """Print lines `NAME = value` of a module, and with `write` put them in the place of its own."""
    text = source.read_text()
    for name, value in constants.items():
        text = re.sub(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        print(f"{name} = {value}")
    if write:
        source.write_text(text)


def ratio(numerator: Timing, denominator: Timing) -> Timing:
    """The ratios of two calls that were timed in the same rounds: their median and its interval."""
    return summarize([a / b for a, b in zip(numerator.samples, denominator.samples, strict=True)])


def publish(rows: list[dict[str, Any]], out: Path, device: str = "cpu") -> None:
    """Print the rows as a table and write them with the command, the commit and the machine that made them."""
    facts = environment(device)
    where = facts.get("gpu") or f"{facts['cpu']} ({facts['instructions']}), {facts['threads']} threads"
    print(f"{where}, torch {facts['versions']['torch']}\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([shown(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for i, line in enumerate(cells):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    command = " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
    write_json(out, {"command": command, "commit": git_commit(), "environment": facts, "rows": rows})


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return f"{value:,}" if isinstance(value, int) else str(value)

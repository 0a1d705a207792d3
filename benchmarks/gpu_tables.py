"""The rows of gpu.jsonl as Markdown tables, one of each kind for each card."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

Line = dict[str, Any]


def tables(lines: list[Line], code: Callable[[str], str]) -> str:
    """The newest row of each key and card. The rows of another code than that of their name are marked, and what failed
    is listed."""
    lines = [line | {"code": "now" if line.get("code") == code(line["name"]) else "older"} for line in lines]
    parts = []
    for card in dict.fromkeys(line["card"] for line in lines):
        of_card = [line for line in lines if line["card"] == card]
        here = list({line["key"]: line for line in of_card if "error" not in line}.values())
        versions = ", ".join(dict.fromkeys(line["torch"] for line in of_card))
        parts += [[f"One {card}, torch {versions}, bf16 unless the row says otherwise."], peaks(here)]
        parts += [operations(here), steps(here), decoded(here), law(here), failed(of_card)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def failed(lines: list[Line]) -> list[str]:
    """The rows that failed twice with the code of now, and are not tried again."""
    errors = Counter((line["key"], line["torch"]) for line in lines if "error" in line and line["code"] == "now")
    keys = dict.fromkeys(key for (key, _), count in errors.items() if count > 1)
    return [f"- failed twice: {key}" for key in keys]


def of_kind(lines: list[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def table(head: str, rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; `head` has its columns between commas."""
    columns = head.split(", ")
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


def peaks(lines: list[Line]) -> list[str]:
    units = {"matrix product": "TFLOP/s", "copy": "TB/s"}
    return [
        f"- {line['name']}: {line['per_second'] / 1e12:.3g} {units[line['name']]} (code: {line['code']})"
        for line in of_kind(lines, "peak")
    ]


def own_ms(line: Line) -> float:
    """Milliseconds on the device, or else launched from Python."""
    return line.get("device_ms", line["launched_ms"])


def device_ms(line: Line) -> str:
    return f"{line['device_ms']:.3g}" if "device_ms" in line else ""


def operations(lines: list[Line]) -> list[str]:
    measured = sorted(of_kind(lines, "operation"), key=lambda line: (line["width"], line["tokens"]))
    sdpa = {(line["tokens"], line["width"]): own_ms(line) for line in reversed(measured) if line["name"] == "sdpa"}
    rows = []
    for line in measured:
        other = sdpa.get((line["tokens"], line["width"]))
        gain = f"{other / own_ms(line):.3g}" if other else ""
        cells = [line["name"], line["form"], f"{line['heads']} of {line['width']}", f"{line['tokens']:,}"]
        cells += [device_ms(line), f"{line['launched_ms']:.3g}", gain, f"{line.get('peak_gib', math.nan):.2g}"]
        rows.append([*cells, line["code"]])
    return table("operation, form, heads, tokens, device ms, launched ms, times as fast as SDPA, GiB, code", rows)


def steps(lines: list[Line]) -> list[str]:
    measured = sorted(of_kind(lines, "step"), key=lambda line: line["tokens"])
    standard = [line for line in measured if (line["name"], line["form"]) == ("standard", "compiled")]
    rates = {line["tokens"]: line["tokens_per_second"] for line in reversed(standard)}
    rows = []
    for line in measured:
        other = rates.get(line["tokens"])
        gain = f"{line['tokens_per_second'] / other:.2f}" if other else ""
        cells = [line["name"], line["form"], f"{line['batch']} x {line['tokens']:,}", f"{line['ms']:.1f}"]
        cells += [f"{line['tokens_per_second']:,.0f}", gain, f"{line.get('share_of_peak', math.nan):.2f}"]
        rows.append([*cells, f"{line.get('peak_gib', math.nan):.1f}", line["code"]])
    head = "training step, form, sequences x tokens, ms, tokens/s, against Standard, share of peak, GiB, code"
    return table(head, rows)


def decoded(lines: list[Line]) -> list[str]:
    rows = []
    for line in of_kind(lines, "decode"):
        rows.append([line["name"], f"{line['tokens']:,}", device_ms(line), f"{line['launched_ms']:.3g}", line["code"]])
    return table("a decoded token, after tokens, device ms, launched ms, code", rows)


def law(lines: list[Line]) -> list[str]:
    rows = []
    for line in of_kind(lines, "law"):
        numbers = [line["output"], line["gradient"]]
        errors = [line.get(key, math.nan) for key in ("to_fp64", "definition_to_fp64")]
        cells = [line["name"], line["dtype"], line["form"], *(f"{number:.1e}" for number in numbers), line["of"]]
        rows.append([*cells, *(f"{number:.1e}" for number in errors), "yes" if line["kept"] else "no", line["code"]])
    return table("law, dtype, form, output, largest gradient, of, its error, the definition's, kept, code", rows)

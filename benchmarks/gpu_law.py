"""Errors of an architecture's fast form against its definition on a card."""

import sys
from typing import Any

import torch
from common import ROOT
from gpu_rows import Row, Setting
from torch import Tensor

from bsbr_pl.attention import ARCHITECTURES

LIMITS = {"bfloat16": 8e-3, "float32": 1e-5}
WIDTH, HEADS = 128, 2


def law(row: Row, setting: Setting) -> dict[str, Any]:
    """Relative root-mean-square errors of the fast form against the definition, the largest over several lengths.

    The law is kept if the fast form is as near to fp64 as the limit, or as twice the error of the definition (the
    gradient of a gain is a sum of signed products, whose rounding errors remain).
    """
    sys.path.insert(0, str(ROOT / "tests" / "attention"))
    from test_law import definition, results

    attention, exact = modules(row, setting)
    forward = type(attention).forward
    if row.form == "compiled" and not setting.toy:
        forward = torch.compile(forward, dynamic=False)
    worst: dict[str, Any] = {"output": 0.0, "gradient": 0.0, "of": "", "limit": LIMITS[row.dtype], "kept": True}
    for tokens in lengths(row, setting):
        x = torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens)).to(setting.device)
        x = x.to(setting.dtype(row))
        found, plain = results(forward, attention, x), results(definition, attention, x)
        add(worst, found, plain, results(definition, exact, x.double()))
    return worst


def modules(row: Row, setting: Setting) -> tuple[torch.nn.Module, torch.nn.Module]:
    """An architecture with noise added to all parameters, in the row's precision and in fp64."""
    torch.manual_seed(1)
    attention = ARCHITECTURES[row.name](WIDTH, HEADS).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    attention.to(setting.device, setting.dtype(row))
    exact = ARCHITECTURES[row.name](WIDTH, HEADS).double().to(setting.device)
    exact.load_state_dict(attention.state_dict())
    return attention, exact


def lengths(row: Row, setting: Setting) -> tuple[int, ...]:
    if setting.toy:
        return (70,)
    return (63, 130, 300) if row.form == "eager" else (300,)


def add(worst: dict[str, Any], found: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Update the largest errors with the outputs and gradients of one length."""
    largest = max(root_mean_square(value) for value in truth.values())
    for key, value in truth.items():
        size = max(root_mean_square(value), 1e-3 * largest)
        error = root_mean_square(found[key].double() - plain[key].double()) / size
        to_fp64, definition_to_fp64 = (root_mean_square(form[key].double() - value) / size for form in (found, plain))
        worst["kept"] &= to_fp64 <= max(worst["limit"], 2 * definition_to_fp64)
        if key == "output":
            worst["output"] = max(worst["output"], error)
        elif not error <= worst["gradient"]:  # also when it is not a number
            worst |= {"gradient": error, "of": key.removeprefix("gradient of ")}
            worst |= {"to_fp64": to_fp64, "definition_to_fp64": definition_to_fp64}


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())

"""One check of a certificate."""

import math
from dataclasses import dataclass, replace

import torch

from bsbr_pl.values import one_line


@dataclass(frozen=True)
class Check:
    """One property: the measured value and its limit.

    A check that is not `required` disqualifies no model: the property is only useful, or could not be measured, as
    `note` says. `token` is the first token whose output changed with later tokens.
    """

    name: str
    measured: float
    limit: float
    required: bool = True
    token: int | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit  # False for NaN

    def __str__(self) -> str:
        if self.passed:
            return "passed"
        words = self.note or ("" if self.token is None else f"the output of token {self.token} saw the future")
        return ": ".join(filter(None, ["FAILED" if self.required else "no", words]))


def impossible(name: str, limit: float, error: Exception) -> Check:
    """A check that a module cannot compute. It disqualifies no module."""
    return Check(name, math.nan, limit, False, note=f"{type(error).__name__}: {one_line(error, 120)}")


def worst(checks: list[Check]) -> Check:
    """The largest measured value of one check (NaN is larger than all), and the first token."""
    measured = torch.tensor([check.measured for check in checks], dtype=torch.float64)
    token = min((check.token for check in checks if check.token is not None), default=None)
    first = next((check for check in checks if check.note), checks[0])
    return replace(first, measured=float(measured.max()), token=token)

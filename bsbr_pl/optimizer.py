"""AdamW with its learning-rate schedule, both functions of the module's hyper-parameters."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from .attention.parts import check_number


def check_optimization(
    learning_rate: float, min_learning_rate: float, warmup_steps: int, weight_decay: float, beta1: float, beta2: float
) -> None:
    """Raise a ValueError that names the first argument out of range, its value and the range."""
    check_number("positive", lambda rate: rate > 0, learning_rate=learning_rate)
    check_number("a share from 0 to 1", lambda share: 0 <= share <= 1, min_learning_rate=min_learning_rate)
    check_number("0 or more", lambda steps: steps >= 0, whole=True, warmup_steps=warmup_steps)
    check_number("0 or more", lambda decay: decay >= 0, weight_decay=weight_decay)
    check_number("at least 0 and below 1", lambda beta: 0 <= beta < 1, beta1=beta1, beta2=beta2)


def adamw(module: nn.Module, hparams: Mapping[str, Any], fused: bool) -> AdamW:
    """AdamW over a module's parameters: the matrices of linear maps decay, all other parameters do not."""
    matrices = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    decayed = {id(matrix) for matrix in matrices}
    others = [p for p in module.parameters() if id(p) not in decayed]
    groups = [
        {"params": matrices, "weight_decay": hparams["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    betas = (hparams["beta1"], hparams["beta2"])
    return AdamW(groups, lr=hparams["learning_rate"], betas=betas, fused=fused)


def share_of_learning_rate(step: int, total: int | None, hparams: Mapping[str, Any]) -> float:
    """The share of `learning_rate` for the step after `step` others: linear warm-up, then half a cosine to `total`.

    Constant after warm-up if `total` is None.
    """
    end, lowest = total or math.inf, hparams["min_learning_rate"]
    warmup = min(hparams["warmup_steps"], end)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, end - warmup))
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2


def set_arguments(optimizer: torch.optim.Optimizer, scheduler: Any, hparams: Mapping[str, Any], share: float) -> None:
    """Give the optimiser of `adamw` and its scheduler these arguments in place of those that a checkpoint restored."""
    rate = hparams["learning_rate"]
    scheduler.base_lrs = [rate for _ in optimizer.param_groups]
    for group, decay in zip(optimizer.param_groups, (hparams["weight_decay"], 0.0), strict=True):
        group |= {"initial_lr": rate, "lr": rate * share, "weight_decay": decay}
        group["betas"] = (hparams["beta1"], hparams["beta2"])

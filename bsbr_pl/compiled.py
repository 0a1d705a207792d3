"""The training form of a model through torch.compile, layer by layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .model import LanguageModel


def compile_hidden(model: LanguageModel) -> Callable[[Tensor], Tensor]:
    """`model.hidden` with every branch compiled: equal layers share one compiled form, however many there are."""
    run = torch.compile(_run)

    def hidden(input_ids: Tensor) -> Tensor:
        x = model.embed(input_ids)
        for branch in model.branches:
            x = run(branch, x)
        return model.norm(x)

    return hidden


def _run(branch: nn.Module, x: Tensor) -> Tensor:
    return branch(x)

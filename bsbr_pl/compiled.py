"""The training form of a model through torch.compile, layer by layer, and whether it is to be trusted."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .model import LanguageModel


def compile_hidden(model: LanguageModel) -> Callable[[Tensor], Tensor]:
    """`model.hidden` with every branch compiled: equal layers share one compiled form, however many there are.

    Where the weights are sharded, the whole of it is compiled as one.
    """
    if isinstance(model, FSDPModule):
        return torch.compile(model.hidden)
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 64)  # one is used for every kind of branch and every length
    run = torch.compile(_run)

    def hidden(input_ids: Tensor) -> Tensor:
        x = model.embed(input_ids)
        for branch in model.branches:
            x = run(branch, x)
        return model.norm(x)

    return hidden


def _run(branch: nn.Module, x: Tensor) -> Tensor:
    return branch(x)


def check_gradients(
    model: nn.Module, own: Callable[[], Tensor] | None, compiled: Callable[[], Tensor], low: bool
) -> None:
    """Compare the gradients of two losses by the parameters; without `own`, only compute them.

    Args:
        model: whose parameters.
        own: the loss as the model computes it.
        compiled: the same, compiled.
        low: whether they are computed in bf16 or fp16.

    Raises:
        RuntimeError: naming the parameter whose gradient differs by more than rounding.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = []
    for loss in (compiled,) if own is None else (own, compiled):
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        found.append([p.new_zeros(()) if g is None else g for p, g in zip(parameters, gradients, strict=True)])
    if own is None:
        return
    tolerance, floor = (0.1, 1e-2) if low else (1e-2, 1e-3)
    largest = max(_root_mean_square(gradient) for gradient in found[0])
    for name, expected, gradient in zip(names, *found, strict=True):
        error = _root_mean_square(gradient - expected) / max(_root_mean_square(expected), floor * largest, 1e-30)
        if not error <= tolerance:
            raise RuntimeError(
                f"torch.compile gives {name} another gradient than the model has (relative difference {error:.2g} on "
                f"the first batch), with torch {torch.__version__} on {gradient.device}: set compile to false"
            )


def _root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())

"""Training through torch.compile, layer by layer, after its gradients were compared with the model's own."""

import os
import shutil
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .model import LanguageModel
from .patches import allow_recompilations

Hidden = Callable[[Tensor], Tensor]  # ids (B, T) -> activations (B, T, D)


def check_compiler(device: torch.device) -> None:
    """Raise a ValueError if torch.compile needs a C++ compiler on this device and none is installed."""
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ValueError(f"compile needs a C++ compiler on a CPU, and there is no {' or '.join(compilers)}")


class CompiledHidden:
    """`model.hidden` through torch.compile.

    Args:
        model: equal layers share one compiled form; a model with sharded weights is compiled as a whole.
        form: the compiled form, if it exists already.
    """

    def __init__(self, model: LanguageModel, form: Hidden | None = None) -> None:
        self.model = model
        self.form = form or _compile(model)
        self.checked = False

    def __call__(self, input_ids: Tensor) -> Tensor:
        return self.form(input_ids)

    def check(self, loss_through: Callable[[Hidden], Tensor], comparable: bool, low_precision: bool) -> None:
        """Compare the gradients of a loss computed through the compiled form and through `model.hidden`.

        If `model.hidden` runs out of memory, only a warning is given: the compiled form may need less.

        Args:
            loss_through: computes the loss () with the given form.
            comparable: whether both should give the same; if not, the compiled form only has to run.
            low_precision: whether the loss is computed in bf16 or fp16.

        Raises:
            RuntimeError: naming the parameter whose gradient differs by more than rounding.
        """
        self.checked = True
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            expected = self._own_gradients(loss_through) if comparable else None
            found = _gradients(self.model, loss_through(self))
        if expected is not None:
            _compare(expected, found, low_precision)

    def _own_gradients(self, loss_through: Callable[[Hidden], Tensor]) -> dict[str, Tensor] | None:
        """The gradients through `model.hidden`; None, and a warning, if they do not fit into memory."""
        try:
            return _gradients(self.model, loss_through(self.model.hidden))
        except torch.cuda.OutOfMemoryError:
            pass  # what the error holds is free after this line only
        torch.cuda.empty_cache()
        warnings.warn("compiled gradients are not compared: the model does not fit without torch.compile", stacklevel=4)
        return None


def _compile(model: LanguageModel) -> Hidden:
    if isinstance(model, FSDPModule):
        return torch.compile(model.hidden)
    allow_recompilations(64)  # one for each kind of branch and each length
    run = torch.compile(lambda branch, x: branch(x))
    return partial(model.hidden, run=run)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter by name; 0 () where the loss does not depend on it."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: loss.new_zeros(()) if gradient is None else gradient
        for name, gradient in zip(names, gradients, strict=True)
    }


def _compare(expected: dict[str, Tensor], found: dict[str, Tensor], low_precision: bool) -> None:
    tolerance, floor = (0.1, 1e-2) if low_precision else (1e-2, 1e-3)
    largest = max(map(_root_mean_square, expected.values()))
    for name, gradient in found.items():
        scale = max(_root_mean_square(expected[name]), floor * largest, 1e-30)
        error = _root_mean_square(gradient - expected[name]) / scale
        if not error <= tolerance:
            raise RuntimeError(
                f"torch.compile gives {name} another gradient than the model has (relative difference {error:.2g} on "
                f"the first batch), with torch {torch.__version__} on {gradient.device}: set compile to false"
            )


def _root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())

"""ForeignAttention: an `nn.Module` (B, T, D) -> (B, T, D) of any library in the place of an architecture of this one.

YAML, command line and checkpoints name such a class by its import path. It is imported only if its package is trusted.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention.base import Attention

#: What constructors call the width D, and the number of heads.
WIDTH = ("hidden_dim", "dim", "d_model", "embed_dim", "hidden_size", "n_embd", "width", "channels")
HEADS = ("num_heads", "heads", "n_heads", "n_head", "nheads", "nhead", "num_attention_heads")


def _set_default_device(device: torch.device) -> None:
    """None for the CPU: torch would keep a mode that slows every call and turns its fused attention off."""
    torch.set_default_device(None if device.type == "cpu" else device)


#: What all models of a process share -> how to set it, and its value.
SHARED: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "the number of threads": (torch.set_num_threads, torch.get_num_threads),
    "the default dtype": (torch.set_default_dtype, torch.get_default_dtype),
    "the default device": (_set_default_device, torch.get_default_device),
    "whether gradients are computed": (torch.set_grad_enabled, torch.is_grad_enabled),
    "the precision of products": (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision),
    "whether algorithms are deterministic": (
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled,
    ),
}

_trusted: set[str] = set()  # packages
_given: dict[str, type[nn.Module]] = {}  # import path -> class, of those that Python code used


def trust(packages: Iterable[str]) -> None:
    """Let command lines, configurations and checkpoints name the classes of these packages.

    What an earlier call allowed is withdrawn, also in jsonargparse. Packages are also looked for in the working
    directory, after all other places.
    """
    from jsonargparse import set_parsing_settings  # which models do not need

    named = set(packages)
    set_parsing_settings(import_path_denylist=sorted(_trusted - named), import_path_allowlist=sorted(named))
    _trusted.clear()
    _trusted.update(named)
    if _trusted and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def trusted_now() -> frozenset[str]:
    """The packages of the last call of `trust`."""
    return frozenset(_trusted)


def import_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def remember(cls: type[nn.Module]) -> None:
    """Let `find` give a class that Python code of this process uses."""
    _given[import_path(cls)] = cls


def find(path: str) -> type[nn.Module] | None:
    """The class by its import path; None if nobody trusts its package, or if it is no `nn.Module`."""
    module, _, name = path.rpartition(".")
    found: Any = _given.get(path)
    if found is None and any(f"{module}.".startswith(f"{package}.") for package in _trusted):
        with suppress(ImportError):
            found = getattr(importlib.import_module(module), name, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


@contextmanager
def shared_state_kept(name: str) -> Iterator[None]:
    """Put back what a module has changed of `SHARED`: other models would be computed in another way.

    Raises:
        ValueError: it has changed something; says what.
    """
    before = {what: get() for what, (_, get) in SHARED.items()}
    try:
        yield
    finally:
        changed = [what for what, (_, get) in SHARED.items() if get() != before[what]]
        for what in changed:
            SHARED[what][0](before[what])
        if changed:  # an error may be due to it
            words = f"{name} changes {changed[0]} of the whole process, which was {before[changed[0]]}: remove this"
            raise ValueError(words)


def build(make: Any, hidden_dim: int | None, num_heads: int | None, options: Mapping[str, Any]) -> Any:
    """Call a class or function with its options, and with the sizes under the names that its signature has for them.

    The first argument whose name is in `WIDTH` gets the width, the first in `HEADS` the number of heads. An option of
    the same name replaces them; a size that is None is not passed.

    Raises:
        ValueError: it cannot be called with these arguments; says which, and why.
    """
    arguments: dict[str, Any] = {}
    for names, size in ((WIDTH, hidden_dim), (HEADS, num_heads)):
        name = next((name for name in inspect.signature(make).parameters if name in names), None)
        if name and size is not None:
            arguments[name] = size
    arguments |= options
    try:
        return make(**arguments)
    except (TypeError, AssertionError, RuntimeError, LookupError, AttributeError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        absent = [name for name, size in (("hidden_dim", hidden_dim), ("num_heads", num_heads)) if size is None]
        what = f"{' and '.join(absent)}, or other" if absent else "other"
        reason = f"{type(error).__name__}: {error}"
        words = f"{make.__name__}({given}) cannot be built: {reason}; give it {what} init_args (options)"
        raise ValueError(words) from error


def output_of(module: nn.Module, x: Tensor) -> Tensor:
    """What a module gives for one tensor x; of a tuple the first element, of a Hugging Face output the logits.

    Raises:
        ValueError: its `forward` needs more than one argument, or gives no tensor.
    """
    try:
        inspect.signature(module.forward).bind(x)
    except TypeError as error:
        name = type(module).__name__
        words = f"{name}.forward must take one tensor: {error}; wrap it in a module that gives it all"
        raise ValueError(words) from error
    y = module(x)
    y = getattr(y, "logits", y)
    y = y[0] if isinstance(y, tuple | list) else y
    if not isinstance(y, Tensor):
        raise ValueError(f"{type(module).__name__}.forward must give a tensor, got a {type(y).__name__}")
    return y


class Inputs(NamedTuple):
    x: Tensor  # (B, T, D), all of them


class ForeignAttention(Attention[Inputs]):
    """A module of another library, which has only `forward`. It keeps its own initial values.

    The law of `Attention` is not tested: certificates tell whether it is causal. There is no map, no decoding and no
    closed form of its costs. `generate` works: every step computes the whole text again.

    Args:
        hidden_dim: width D, passed under the name that the constructor has for it; see `build`.
        num_heads: heads H, the same.
        module: the class, or the import path of a class whose package is trusted.
        options: further arguments of its constructor.

    Raises:
        ValueError: the class is unknown or not trusted, cannot be built, or gives an output of another shape.
    """

    initializes_itself = True

    def __init__(
        self, hidden_dim: int, num_heads: int, module: str | type, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(hidden_dim, num_heads)
        cls = find(module) if isinstance(module, str) else module
        if cls is None:
            package = str(module).partition(".")[0]
            raise ValueError(f"module={module!r} is no nn.Module of a package that is trusted (--trust={package})")
        self.module = build(cls, hidden_dim, num_heads, options or {})

    @property
    def has_map(self) -> bool:
        return False

    @property
    def has_decode(self) -> bool:
        return False

    def attention_map(self, x: Tensor) -> Tensor:
        raise self._absent("attention map")

    def state_size(self, num_tokens: int) -> int:
        raise self._absent("decode state")

    def flops(self, num_tokens: int) -> int:
        raise self._absent("closed form of its FLOPs (bsbr_pl.utils.flops.forward_flops counts them)")

    def _absent(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self.module).__name__} is a module of another library and has no {what}")

    def forward(self, x: Tensor) -> Tensor:
        y = output_of(self.module, x)
        if y.shape != x.shape:
            name = type(self.module).__name__
            raise ValueError(f"{name} must map (B, T, D) to (B, T, D), got {tuple(y.shape)} for {tuple(x.shape)}")
        return y

    def prefill(self, x: Tensor, state: Inputs | None = None) -> tuple[Tensor, Inputs]:
        read = x if state is None else torch.cat((state.x, x), 1)
        output = self(read)[:, read.shape[1] - x.shape[1] :] if x.shape[1] else x
        return output, Inputs(read)

    def init_state(self, batch_size: int) -> Inputs:
        return Inputs(self._zeros(batch_size, 0, self.hidden_dim))

    def step(self, x: Tensor, state: Inputs) -> tuple[Tensor, Inputs]:
        output, state = self.prefill(x[:, None], state)
        return output[:, 0], state

"""The code that decides what a class or function computes, as text: results are reused only while it is the same."""

import inspect
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from types import CodeType, FunctionType
from typing import Any

import torch

#: Packages whose versions tell their code.
KNOWN = {*sys.stdlib_module_names, "torch", "lightning", "bsbr_pl"}
INSTALLED = ("site-packages", "dist-packages")  # folders of packages that are not edited
#: Types of data that are shown as they are.
DATA = (type(None), bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, torch.dtype, torch.Tensor)


def source_code(cls: type, ignored: Collection[str] = ()) -> str:
    """The code of a class and of its bases but for those of `KNOWN`; of what was typed in, the instructions.

    Of a class that is not installed also: its attributes but for those `ignored`, what its functions close over, and
    the functions, classes, plain values and tensors of other own code that they name. Other objects are not seen.
    """
    reader = _Reader(ignored)
    reader.read(cls.__qualname__, cls)
    return "\n".join(reader.texts)


def foreign_code(module: torch.nn.Module) -> list[str]:
    """The code of every class of a module's parts that is of no package of `KNOWN`."""
    return [source_code(cls) for cls in dict.fromkeys(map(type, module.modules())) if not _is_known(cls)]


def named_by(function: FunctionType) -> dict[str, Any]:
    """What a function closes over, and the own functions, own classes, plain values and tensors that it names."""
    found = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it has no value yet
            found[name] = cell.cell_contents
    return {name: value for name, value in found.items() if _counts(value)}


class _Reader:
    """Collects texts; each class and function once."""

    def __init__(self, ignored: Collection[str]) -> None:
        self._ignored = ignored
        self.texts: list[str] = []
        self._seen: dict[int, Any] = {}  # the parts themselves, so that no other gets their address

    def read(self, name: str, value: Any) -> None:
        if isinstance(value, DATA):
            self.texts.append(f"{name} = {shown(value)}")
        elif id(value) not in self._seen:
            self._seen[id(value)] = value
            if isinstance(value, type):
                self._read_class(value)
            else:
                for function in _functions(value):
                    self._read_function(name, function)

    def _read_class(self, cls: type) -> None:
        self.texts.append(_code(cls))
        for base in cls.__bases__:
            if not _is_known(base):
                self.read(base.__qualname__, base)
        if _is_own(cls):
            for name, value in vars(cls).items():
                if name not in self._ignored and (not name.startswith("__") or callable(value)):
                    self.read(name, value)

    def _read_function(self, name: str, function: FunctionType) -> None:
        if not _is_own(function):
            return
        self.texts.append(_code(function))
        for other, value in named_by(function).items():
            self.read(f"{name}.{other}", value)


def shown(value: Any) -> str:
    """The text of a plain value or tensor, the same in each process."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        return f"{value.dtype} {list(value.shape)} {sha256(content).hexdigest()}"
    if isinstance(value, set | frozenset):
        return str(sorted(map(repr, value)))
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text


def _functions(value: Any) -> Iterator[FunctionType]:
    """The function of a method, property, partial or decorated function."""
    parts = (getattr(value, name, None) for name in ("__func__", "fget", "fset", "func", "__wrapped__"))
    for part in (value, *parts):
        if isinstance(part, FunctionType):
            yield part


def _names(code: CodeType) -> Iterator[str]:
    """The names that code uses, with those of the functions inside it."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names(part)


def _counts(value: Any) -> bool:
    if isinstance(value, type | FunctionType):
        return _is_own(value)
    return isinstance(value, (*DATA, partial)) or hasattr(value, "__wrapped__")


def _is_known(part: Any) -> bool:
    return str(part.__module__).partition(".")[0] in KNOWN


def _is_own(part: Any) -> bool:
    """Whether a class or function is of code that may be edited: neither of `KNOWN` nor installed."""
    file = getattr(sys.modules.get(part.__module__), "__file__", None) or ""
    return not _is_known(part) and not any(folder in file for folder in INSTALLED)


def _code(part: type | FunctionType) -> str:
    try:
        return inspect.getsource(part)
    except (OSError, TypeError):
        return part.__qualname__ + (_instructions(part.__code__) if isinstance(part, FunctionType) else "")


def _instructions(code: CodeType) -> str:
    """Of a function that was typed in."""
    constants = [_instructions(one) if isinstance(one, CodeType) else shown(one) for one in code.co_consts]
    return f" {code.co_code.hex()} {code.co_names} {constants}"

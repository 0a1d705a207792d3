"""Checks values from files before they are used: their types, sizes and depth. Needs no torch.

A form is a type; a range of integers; [form], a list; {name: form}, an object with these names, `name?` where it may be
missing and `*` for all others; or a tuple of forms, of which one must fit.
"""

import json
import math
from collections.abc import Mapping
from types import NoneType
from typing import Any, NoReturn

MAX_DEPTH = 8  # levels of lists and objects
MAX_VALUES = 1 << 22  # of a row or checkpoint, keys not counted
MAX_TEXT = 1 << 20  # characters
LARGEST = 1e150  # of a number that is no integer: its square is finite
COUNT = range(2**63)
NUMBER = (NoneType, int, float)
METRICS = {"*": {"step": [NUMBER], "value": [NUMBER], "seconds?": [NUMBER]}}  # the course of each metric of a run


def check(value: Any, form: Any, where: str) -> None:
    """Check that a value consists of plain values within the limits, and has a form.

    Raises:
        ValueError: naming the field and what it must be.
    """
    check_plain(value, where)
    check_form(value, form, where)


def check_plain(value: Any, where: str) -> None:
    """Check a value without recursion: only None, bool, int, float, str, and lists, tuples and objects of them.

    Raises:
        ValueError: another type, more than `MAX_DEPTH` levels, more than `MAX_VALUES` values, a longer text or a larger
            number.
    """
    values = 0
    open_parts = [(value, 0)]
    while open_parts:
        value, depth = open_parts.pop()
        values += 1
        if isinstance(value, Mapping):
            open_parts += [(name, depth + 1) for name in value] + [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list | tuple):
            open_parts += [(part, depth + 1) for part in value]
        else:
            _check_scalar(value, where)
            continue
        if depth == MAX_DEPTH:
            raise ValueError(f"{where} must be at most {MAX_DEPTH} levels deep")
        if values + len(open_parts) > MAX_VALUES:
            raise ValueError(f"{where} must hold at most {MAX_VALUES:,} values")


def _check_scalar(value: Any, where: str) -> None:
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"{where} holds a text of {len(value):,} characters, more than {MAX_TEXT:,}")
        value.encode()  # half of a surrogate pair is no text
    elif isinstance(value, int):
        if abs(value) >= COUNT.stop:
            raise ValueError(f"{where} holds an integer beyond 64 bits")
    elif isinstance(value, float):
        if math.isfinite(value) and abs(value) > LARGEST:  # a number that is not finite becomes None
            raise ValueError(f"{where} holds the number {value:g}, beyond {LARGEST:g}")
    elif value is not None:
        raise ValueError(f"{where} holds a value of type {type(value).__name__}: only plain values may be there")


def check_form(value: Any, form: Any, where: str) -> None:
    """Check that a value has a form.

    Raises:
        ValueError: naming the field and what it must be.
    """
    if isinstance(form, tuple):
        _check_any(value, form, where)
    elif isinstance(form, list):
        check_form(value, list, where)
        for item in value:
            check_form(item, form[0], f"{where}[]")
    elif isinstance(form, dict):
        check_form(value, Mapping, where)
        _check_names(value, form, where)
    elif isinstance(form, range):
        check_form(value, int, where)
        if value not in form:
            raise ValueError(f"{where}={value} must be at least {form.start}")
    elif not isinstance(value, form) or (form is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {NAMES.get(form, form.__name__)}, got {_shown(value)}")


def check_columns(metrics: Mapping[str, Mapping[str, list[Any]]], where: str) -> None:
    """Raise a ValueError where the columns of a metric of the form `METRICS` have different lengths."""
    for name, columns in metrics.items():
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError(f"{where}.metrics.{name} has columns of different lengths")


def _check_any(value: Any, forms: tuple[Any, ...], where: str) -> None:
    for form in forms[:-1]:
        try:
            return check_form(value, form, where)
        except ValueError:
            continue
    check_form(value, forms[-1], where)


def _check_names(value: Mapping[str, Any], form: Mapping[str, Any], where: str) -> None:
    for name, part in form.items():
        key = name.removesuffix("?")
        if name != "*" and (key in value or key == name):
            if key not in value:
                raise ValueError(f"{where} lacks {key}")
            check_form(value[key], part, f"{where}.{key}")
    others = [key for key in value if key not in form and f"{key}?" not in form] if "*" in form else []
    for key in others:
        check_form(value[key], form["*"], f"{where}.{key}")


NAMES = {Mapping: "object", NoneType: "null"}


def _shown(value: Any) -> str:
    """The start of a value, for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or has NaN, an infinite number, or an object with the same name twice, or is nested
            too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"it must be at most {MAX_DEPTH} levels deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{_shown(twice)} is there twice")
    return found


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        _refuse(_shown(text))
    return value

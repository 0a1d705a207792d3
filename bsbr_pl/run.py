"""The arguments of a run: collected in one place, kept with the run, compared when it is resumed or evaluated.

They are flat and plain: `{"model.hidden_dim": 128, "data.batch_size": 16, "trainer.max_steps": 640, ...}`.
When a run is resumed, every argument is of one of three kinds (`kind`):

    free      may differ: it changes neither the weights nor the reported numbers
    applied   the new value holds from the resumed step on; the run records both values and the step
    fixed     must be equal
"""

import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import NoneType
from typing import Any

from .schema import COUNT, check_form
from .spec import AttentionSpec, specs_of
from .values import plain

APPLIED_OF_TRAINER = (
    *("max_steps", "max_epochs", "max_time"),
    *("precision", "gradient_clip_val", "gradient_clip_algorithm"),
)
FIXED_OF_TRAINER = (
    *("accumulate_grad_batches", "overfit_batches", "limit_train_batches", "limit_val_batches"),
    "weight_averaging",  # no argument of its own: a callback, see steps.weight_averaging
)
#: The other arguments of the Trainer are free, and not part of a run's arguments.
OF_TRAINER = (*APPLIED_OF_TRAINER, *FIXED_OF_TRAINER)
ATTENTION = "model.attention"
OF_OPTIMIZER = ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "beta1", "beta2")
APPLIED = {f"model.{name}" for name in (*OF_OPTIMIZER, "dropout")} | {f"trainer.{name}" for name in APPLIED_OF_TRAINER}
FIXED = {*(f"trainer.{name}" for name in FIXED_OF_TRAINER), "trainer.has_epochs"}  # see steps.has_epochs
FREE = {
    "initial_weights",  # a resumed run has its checkpoint's weights
    "model.compile",
    *(f"data.{name}" for name in ("num_workers", "cache_dir", "eval_batch_size", "streaming")),
}
#: Where the data is. It may move: the data's fingerprint says whether it is the same.
LOCATIONS = ("data.source", "data.tokenizer")
PRECISIONS = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}

#: Form of `ResumableModule.run`, as `bsbr_pl.schema` checks it.
RUN: dict[str, Any] = {
    "arguments": {"*": object},
    "changes": [{"step": COUNT, "argument": str, "*": object}],
    **dict.fromkeys(("step", "tokens", "samples"), COUNT),
    **dict.fromkeys(("epoch_steps", "validated"), (NoneType, COUNT)),
    "*": object,
}

Arguments = dict[str, Any]
Difference = tuple[str, Any, Any]  # argument, value before, value now


def kind(argument: str) -> str:
    """`free`, `applied` or `fixed`."""
    if argument in APPLIED:
        return "applied"
    option = ".".join(argument.split(".")[:2])  # without the name of a setting
    return "free" if argument in FREE or (argument.startswith("trainer.") and option not in FIXED) else "fixed"


def run_arguments(
    model: Mapping[str, Any],
    data_class: str | None,
    data: Mapping[str, Any],
    trainer: Mapping[str, Any],
    seed: int | None,
    initial_weights: str | None,
) -> Arguments:
    """The arguments of a run, from those of its parts: of a configuration, or of the objects that were built."""
    found = model_arguments(model) | {"data.class": data_class}
    found |= {f"data.{name}": _as_lists(value) for name, value in data.items() if name[0] != "_"}
    found |= {f"trainer.{name}": value for name, value in _of_trainer(trainer).items()}
    found |= {} if seed is None else {"seed": seed}
    return found | {"initial_weights": initial_weights}


def model_arguments(model: Mapping[str, Any]) -> Arguments:
    """The arguments of a run that are its model's, from those of a LanguageModule."""
    found = {f"model.{name}": plain(value) for name, value in model.items() if name != "attention"}
    return found | _of_attention(model["attention"])


def of_model(arguments: Arguments) -> Arguments:
    """Those of a run's arguments that are its model's."""
    return {name: value for name, value in arguments.items() if name.startswith("model.")}


def _of_attention(attention: Any) -> Arguments:
    """`model.attention` and an entry for each of its options, defaults included; if layers differ, for each layer."""
    specs = specs_of(attention)
    layers = [
        {"": spec.key} | {f".{name}": value for name, value in spec.settings.items()}
        for spec in ((specs,) if isinstance(specs, AttentionSpec) else specs)
    ]
    if all(layer == layers[0] for layer in layers):
        return {f"{ATTENTION}{name}": value for name, value in layers[0].items()}
    return {f"{ATTENTION}.{i}{name}": value for i, layer in enumerate(layers) for name, value in layer.items()}


def _of_trainer(given: Mapping[str, Any]) -> Arguments:
    """Arguments of a Trainer, with one value for each meaning: None where nothing is limited."""
    found = {name: given[name] for name in OF_TRAINER}
    averaging = found["weight_averaging"] or {"": None}
    found |= {f"weight_averaging{name}": value for name, value in averaging.items()}
    for name in ("overfit_batches", "gradient_clip_val", "gradient_clip_algorithm"):
        found[name] = found[name] or None
    for name in ("limit_train_batches", "limit_val_batches"):
        found[name] = None if found["overfit_batches"] else _limit(found[name])
    found["precision"] = PRECISIONS.get(str(found["precision"]), found["precision"])
    found["max_time"] = seconds(found["max_time"])
    if found["max_epochs"] is None:  # as Lightning reads it
        found["max_epochs"] = 1000 if found["max_steps"] == -1 and not found["max_time"] else -1
    has_epochs = found["max_epochs"] > 0 or bool(found["limit_train_batches"] or found["overfit_batches"])
    return found | {"has_epochs": has_epochs}


def _limit(value: int | float | None) -> int | float | None:
    """A number or share of batches; None for all batches (1.0; the int 1 is one batch)."""
    if value is None or (isinstance(value, float) and value == 1):
        return None
    return int(value) if value > 1 else value


def _as_lists(value: Any) -> Any:
    """Tuples as lists, as a file holds them."""
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def seconds(duration: str | timedelta | Mapping[str, int] | float | None) -> float | None:
    """A duration as Lightning takes it (DD:HH:MM:SS, a timedelta or its arguments) in seconds; None stays None."""
    if duration is None or isinstance(duration, int | float):
        return duration
    if isinstance(duration, str):
        if not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", duration.strip()):
            raise ValueError(f"max_time={duration!r} must be DD:HH:MM:SS, such as 00:08:30:00")
        duration = dict(zip(("days", "hours", "minutes", "seconds"), map(int, duration.split(":")), strict=True))
    return (duration if isinstance(duration, timedelta) else timedelta(**duration)).total_seconds()


def run_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint records of its run: `ResumableModule.run`.

    Raises:
        ValueError: naming what is missing or of another type.
    """
    check_form(checkpoint, {"run": RUN, "*": object}, "the checkpoint")
    return checkpoint["run"]


def differences(before: Arguments, now: Arguments) -> Iterator[Difference]:
    """Arguments that both have with unequal values; of the same data the location may differ."""
    before, now = _by_layer(before, now), _by_layer(now, before)
    same_data = before.get("data.fingerprint") and before.get("data.fingerprint") == now.get("data.fingerprint")
    for argument in before:
        moved = same_data and argument in LOCATIONS
        if argument in now and before[argument] != now[argument] and not moved:
            yield argument, before[argument], now[argument]


def _by_layer(arguments: Arguments, other: Arguments) -> Arguments:
    """The arguments with an attention for each layer that `other` names, repeated as a model repeats them."""
    own, named = _layers(arguments), _layers(other)
    found = dict(arguments)
    for layer in sorted(named - own):
        source = f"{ATTENTION}.{layer % len(own)}" if own else ATTENTION
        options = {name.removeprefix(source): name for name in arguments if f"{name}.".startswith(f"{source}.")}
        found |= {f"{ATTENTION}.{layer}{option}": arguments[name] for option, name in options.items()}
    return found


def _layers(arguments: Arguments) -> set[int]:
    """The layers whose attention has a name of its own: that of the others is `model.attention`."""
    names = (name.removeprefix(f"{ATTENTION}.") for name in arguments)
    return {int(name) for name in names if name.isdecimal()}


def fixed_differences(before: Arguments, now: Arguments) -> list[Difference]:
    """The differences with which a run cannot be resumed."""
    return [difference for difference in differences(before, now) if kind(difference[0]) == "fixed"]


def check_resumable(before: Arguments, now: Arguments) -> None:
    """Refuse to resume a run with fixed arguments that differ.

    Raises:
        ValueError: naming the arguments and both values.
    """
    if found := fixed_differences(before, now):
        raise ValueError(
            f"a run cannot be resumed with {in_words(found)}: give its own arguments, or start a new run, from its "
            "weights with --initial_weights=<the checkpoint>"
        )


def check_same_model(before: Arguments, now: Arguments) -> None:
    """Refuse to evaluate the weights of one model as those of another.

    Args:
        before: those of the checkpoint's model.
        now: those of the model that gets its weights, and maybe others. Arguments of training, such as dropout, may
            differ.

    Raises:
        ValueError: naming the arguments and both values.
    """
    if found := fixed_differences(before, now):
        raise ValueError(
            f"the checkpoint's model cannot be evaluated with {in_words(found)}: give the arguments that it was "
            "trained with"
        )


def applied_differences(before: Arguments, now: Arguments, step: int) -> list[dict[str, Any]]:
    """The differences that take effect from `step` on, as a run records them."""
    return [
        {"step": step, "argument": argument, "before": old, "after": new}
        for argument, old, new in differences(before, now)
        if kind(argument) == "applied"
    ]


def in_words(found: list[Difference], most: int = 4) -> str:
    """Differences for a sentence: `chunk_size=32 instead of 16, ...`."""
    words = [f"{argument}={new!r} instead of {old!r}" for argument, old, new in found[:most]]
    return ", ".join(words) + (f" and {len(found) - most} more" if len(found) > most else "")

"""What a run was asked to do: described in one place, kept with the run, compared when it is resumed or evaluated.

A description is flat and plain: `{"model.hidden_dim": 128, "data.batch_size": 16, "trainer.max_steps": 640, ...}`.
On resume every argument is of one of three kinds (`kind`):

    free      may differ: it changes neither the weights nor what is reported of them
    applied   the new value holds from the resumed step on; the run keeps both, with the step
    fixed     must be the run's own
"""

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from .attention import ARCHITECTURES
from .description import build, plain

APPLIED = {
    *(f"model.{name}" for name in ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay")),
    *(f"model.{name}" for name in ("beta1", "beta2", "dropout")),
    *(f"trainer.{name}" for name in ("max_steps", "max_epochs", "max_time", "precision")),
    *(f"trainer.{name}" for name in ("gradient_clip_val", "gradient_clip_algorithm")),
}
FREE = {
    "initial_weights",  # a resumed run has its checkpoint's
    "model.compile",
    *(f"data.{name}" for name in ("num_workers", "cache_dir", "eval_batch_size", "streaming")),
}
#: Of the Trainer's arguments those that are fixed; every other one that is not applied is free.
FIXED_OF_TRAINER = (
    *("accumulate_grad_batches", "overfit_batches", "limit_train_batches", "limit_val_batches"),
    "has_epochs",  # whether the training data has an end: see steps.has_epochs
)
#: Arguments of the Trainer that a description holds; the others change neither weights nor figures.
OF_TRAINER = (
    *("max_steps", "max_epochs", "max_time", "precision", "gradient_clip_val", "gradient_clip_algorithm"),
    *("accumulate_grad_batches", "overfit_batches", "limit_train_batches", "limit_val_batches"),
)
#: What says where the data is; the data's fingerprint says whether it is the same.
PLACES = ("data.source", "data.tokenizer")
PRECISIONS = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}

Arguments = dict[str, Any]


def kind(argument: str) -> str:
    """`free`, `applied` or `fixed`."""
    if argument in APPLIED:
        return "applied"
    section, _, name = argument.partition(".")
    free = argument in FREE or (section == "trainer" and name not in FIXED_OF_TRAINER)
    return "free" if free else "fixed"


def describe_run(
    model: Mapping[str, Any],
    data_class: str | None,
    data: Mapping[str, Any],
    trainer: Mapping[str, Any],
    seed: int | None,
    initial_weights: str | None,
) -> Arguments:
    """The description of a run, from the arguments of its parts: those of a configuration or of the objects made."""
    described: Arguments = {f"model.{name}": plain(value) for name, value in model.items() if name != "attention"}
    described |= _attention(model["attention"]) if "attention" in model else {}
    described |= {"data.class": data_class}
    described |= {f"data.{name}": _plain_list(value) for name, value in data.items() if name[0] != "_"}
    described |= {f"trainer.{name}": value for name, value in _trainer(trainer).items()}
    described |= {} if seed is None else {"seed": seed}
    return described | {"initial_weights": initial_weights}


def _attention(specification: Any) -> Arguments:
    """`model.attention` and an entry for each of its options, defaults included; with layers that differ, by layer."""
    layers = specification if isinstance(specification, list | tuple) else [specification]
    named = [_layer(layer) for layer in layers]
    if all(layer == named[0] for layer in named):
        return {f"model.attention{name}": value for name, value in named[0].items()}
    return {f"model.attention.{i}{name}": value for i, layer in enumerate(named) for name, value in layer.items()}


def _layer(specification: Mapping[str, Any]) -> Arguments:
    factory = build(
        {"class_path": specification["class_path"], "init_args": dict(specification.get("init_args") or {})}
    )
    assert isinstance(factory, functools.partial)
    defaults = {name: parameter.default for name, parameter in inspect.signature(factory.func).parameters.items()}
    keys = {cls: key for key, cls in ARCHITECTURES.items()}
    options = {f".{name}": plain(factory.keywords.get(name, defaults[name])) for name in list(defaults)[2:]}
    return {"": keys.get(factory.func, specification["class_path"]), **options}  # type: ignore[call-overload]


def _trainer(given: Mapping[str, Any]) -> Arguments:
    """Arguments of a Trainer, with one value for each meaning: None where nothing is limited."""
    found = {name: given[name] for name in OF_TRAINER if name in given}
    for name in ("limit_train_batches", "limit_val_batches"):
        if name in found:
            found[name] = None if found.get("overfit_batches") else _limit(found[name])
    for name in ("overfit_batches", "gradient_clip_val", "gradient_clip_algorithm"):
        if name in found:
            found[name] = found[name] or None
    if "precision" in found:
        found["precision"] = PRECISIONS.get(str(found["precision"]), found["precision"])
    if "max_time" in found:
        found["max_time"] = seconds(found["max_time"])
    if found.get("max_epochs", -1) is None:  # as Lightning reads it
        found["max_epochs"] = 1000 if found["max_steps"] == -1 and not found["max_time"] else -1
    if found:
        found["has_epochs"] = found["max_epochs"] > 0 or bool(found["limit_train_batches"] or found["overfit_batches"])
    return found


def _limit(value: int | float | None) -> int | float | None:
    """A number or share of batches; None for all, which 1.0 means and 1 does not."""
    if value is None or (isinstance(value, float) and value == 1):
        return None
    return int(value) if value > 1 else value


def _plain_list(value: Any) -> Any:
    """Tuples as lists, as a file holds them."""
    return [_plain_list(item) for item in value] if isinstance(value, list | tuple) else value


def seconds(duration: str | timedelta | Mapping[str, int] | float | None) -> float | None:
    """Of a duration as Lightning takes it: DD:HH:MM:SS, a timedelta or its arguments; None stays None."""
    if duration is None or isinstance(duration, int | float):
        return duration
    if isinstance(duration, str):
        if not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", duration.strip()):
            raise ValueError(f"max_time={duration!r} must be DD:HH:MM:SS, such as 00:08:30:00")
        names = ("days", "hours", "minutes", "seconds")
        duration = dict(zip(names, map(int, duration.split(":")), strict=True))
    return duration.total_seconds() if isinstance(duration, timedelta) else timedelta(**duration).total_seconds()


def run_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of its run (`LanguageModule.run`); nothing where it is older, or not what we write."""
    run = checkpoint.get("run")
    types = {"arguments": dict, "changes": list, "step": int, "epoch_steps": int | None}
    sound = isinstance(run, dict) and all(name in run and isinstance(run[name], of) for name, of in types.items())
    return run if sound else {}  # type: ignore[return-value]


def recorded(checkpoint: Mapping[str, Any]) -> Arguments:
    """The description that a checkpoint holds; of an older one what its hyper-parameters say."""
    if run := run_of(checkpoint):
        return dict(run["arguments"])
    data = {name: value for name, value in checkpoint.get("datamodule_hyper_parameters", {}).items() if name[0] != "_"}
    described = describe_run(checkpoint.get("hyper_parameters", {}), None, data, {}, None, None)
    return {name: value for name, value in described.items() if name.split(".")[0] in ("model", "data") and value}


def differences(before: Arguments, now: Arguments) -> Iterator[tuple[str, Any, Any]]:
    """(argument, value before, value now) wherever both say something and it is not the same."""
    same_data = before.get("data.fingerprint") and before.get("data.fingerprint") == now.get("data.fingerprint")
    for argument in before:
        if argument not in now or before[argument] == now[argument]:
            continue
        if not (argument in PLACES and same_data):
            yield argument, before[argument], now[argument]


def check_resumable(before: Arguments, now: Arguments) -> None:
    """Refuse to resume a run with other fixed arguments than its own.

    Raises:
        ValueError: naming the arguments and both values.
    """
    if found := [one for one in differences(before, now) if kind(one[0]) == "fixed"]:
        raise ValueError(
            f"a run cannot be resumed with {in_words(found)}: give its own arguments, or start a new run, from its "
            "weights with --initial_weights=<the checkpoint>"
        )


def changed(before: Arguments, now: Arguments, step: int) -> list[dict[str, Any]]:
    """The differences that take effect from `step` on, as a run records them."""
    return [
        {"step": step, "argument": argument, "before": old, "after": new}
        for argument, old, new in differences(before, now)
        if kind(argument) == "applied"
    ]


def in_words(found: list[tuple[str, Any, Any]], most: int = 4) -> str:
    """Differences for a sentence: `chunk_size=32 instead of 16, ...`."""
    words = [f"{argument}={new!r} instead of {old!r}" for argument, old, new in found[:most]]
    return ", ".join(words) + (f" and {len(found) - most} more" if len(found) > most else "")

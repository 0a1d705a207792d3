"""Models and numbers of processes that are too large for this machine, refused before they take its memory."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from .description import build_layers
from .model import LanguageModel

SIZES = ("vocab_size", "hidden_dim", "num_layers", "ff_dim", "positions")
LARGEST_SIZE = 2**40  # above it torch may not even name the shapes
#: Options of the Trainer that Lightning takes as they come, and the least that means something.
LEAST = {
    "accumulate_grad_batches": 1,
    "val_check_interval": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "gradient_clip_val": 0,
    "min_steps": 0,
    "min_epochs": 0,
    "num_sanity_val_steps": -1,
}
BEYOND = 2**61  # parameters, of shapes that torch cannot name


def check_weights(attention: dict[str, Any] | list[dict[str, Any]], arguments: dict[str, Any]) -> None:
    """Compare the weights of a model, in fp32, with half the memory of this machine: a checkpoint is read beside them.

    Args:
        attention: as `describe_layers` describes it.
        arguments: the other arguments of `LanguageModel`.

    Raises:
        ValueError: naming the largest argument and the memory that the weights need.
    """
    needed, allowed = 4 * count_parameters(attention, arguments), memory() / 2
    if needed <= allowed:
        return
    layers = attention if isinstance(attention, list) else [attention]
    default = (
        [one | {"init_args": {}} for one in layers] if isinstance(attention, list) else attention | {"init_args": {}}
    )
    sizes = {name: arguments[name] for name in SIZES}
    if 4 * count_parameters(default, arguments) <= allowed:  # the attention's own options are to blame
        sizes = {name: value for one in layers for name, value in one["init_args"].items()}
    name = max(sizes, key=lambda name: sizes[name] if isinstance(sizes[name], int) else 0)
    raise ValueError(
        f"{name}={sizes[name]} is too large: the weights need at least {in_gib(needed)} of memory and as much to read "
        f"a checkpoint, and this machine has {in_gib(memory())}"
    )


def check_training(model: LanguageModel) -> None:
    """Compare what training takes at least, on a CPU in fp32, with the memory of this machine.

    Raises:
        ValueError: naming the memory that weights, gradients and both moments of AdamW need.
    """
    parameters = sum(p.numel() for p in model.parameters())
    needed = 4 * 4 * parameters
    if needed > memory():
        raise ValueError(
            f"{parameters:,} parameters are too many: with gradients and both moments of AdamW they need "
            f"{in_gib(needed)} of memory, and this machine has {in_gib(memory())}: lower hidden_dim or num_layers"
        )


def check_processes(**numbers: Any) -> None:
    """Refuse numbers of processes that would take the whole machine; `auto` and lists of devices are left alone.

    Raises:
        ValueError: naming the argument.
    """
    for name, number in numbers.items():
        if str(number).isdigit() and int(number) > most_processes():  # the command line gives `devices` as text
            raise ValueError(f"{name}={number} is too large: at most {most_processes()} processes on this machine")


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuse what Lightning would divide by, or take for something else than it says.

    Args:
        options: of the Trainer; those in `LEAST` are looked at, where they are numbers.

    Raises:
        ValueError: naming the option and the least that it may be.
    """
    for name, least in LEAST.items():
        value = options.get(name)
        share = isinstance(value, float) and 0 < value < 1  # of an epoch
        if isinstance(value, int | float) and value < least and not share:
            raise ValueError(f"{name}={value} is too small: at least {least}")
    on_cpu = options.get("accelerator") == "cpu" or not torch.accelerator.is_available()
    if on_cpu and str(options.get("devices")).startswith("-"):
        raise ValueError(f"devices={options['devices']} is not for a CPU: give the number of processes, such as 1")


def most_processes() -> int:
    return max(16, 4 * (os.cpu_count() or 1))


def count_parameters(attention: dict[str, Any] | list[dict[str, Any]], arguments: dict[str, Any]) -> int:
    """How many parameters a model has; `BEYOND` where torch cannot name its shapes."""
    num_layers = arguments["num_layers"]
    if any(isinstance(arguments[name], int) and arguments[name] > LARGEST_SIZE for name in SIZES):
        return BEYOND
    repeated = not isinstance(attention, list) and isinstance(num_layers, int) and num_layers > 1
    if repeated:  # one layer says what all of them have
        arguments = arguments | {"num_layers": 1}
    try:
        with torch.device("meta"):
            model = LanguageModel(build_layers(attention), **arguments)
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        return BEYOND
    in_layers = sum(p.numel() for branch in model.branches for p in branch.parameters())
    everything = sum(p.numel() for p in model.parameters())
    return everything + in_layers * (num_layers - 1) if repeated else everything


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"

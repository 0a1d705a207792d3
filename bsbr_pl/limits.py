"""Rejects models and numbers of processes that are too large for this machine, before they use its memory."""

import os
import re
import resource
from collections.abc import Mapping
from typing import Any

import torch

from .model import LanguageModel
from .spec import AttentionArgument, AttentionSpec, specs_of

SIZES = ("vocab_size", "hidden_dim", "num_layers", "ff_dim", "positions")
LARGEST_SIZE = 2**40  # torch cannot represent the shapes of larger ones
MOST_LAYERS = 4096  # to construct more takes minutes
BEYOND = 2**61  # parameters, reported for shapes that torch cannot represent
#: Trainer options that Lightning does not check, with their minimum.
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


def check_weights(attention: AttentionArgument, sizes: Mapping[str, Any]) -> None:
    """Reject a model with too many layers, or whose weights in fp32 need more than half the memory: a checkpoint is
    loaded next to them.

    Args:
        attention: of the model, as `LanguageModule` takes it.
        sizes: every other argument of `LanguageModel`.

    Raises:
        ValueError: naming the largest argument, and its limit or the memory that the weights need.
    """
    needed, allowed = 4 * count_parameters(attention, sizes), memory() / 2
    if needed <= allowed:
        if isinstance(sizes["num_layers"], int) and sizes["num_layers"] > MOST_LAYERS:
            raise ValueError(f"num_layers={sizes['num_layers']} is too large: at most {MOST_LAYERS}")
        return
    specs = specs_of(attention)
    layers = specs if isinstance(specs, tuple) else (specs,)
    defaults = tuple(AttentionSpec(layer.cls) for layer in layers)
    suspects = {name: sizes[name] for name in SIZES}
    if 4 * count_parameters(defaults, sizes) <= allowed:
        suspects = {name: value for layer in layers for name, value in layer.options.items()}
    name = max(suspects, key=lambda name: suspects[name] if isinstance(suspects[name], int) else 0)
    raise ValueError(
        f"{name}={suspects[name]} is too large: the weights need at least {in_gib(needed)} of memory, and loading "
        f"a checkpoint needs the same again; this machine has {in_gib(memory())}"
    )


def check_training(model: LanguageModel) -> None:
    """Reject a model whose weights, gradients and both moments of AdamW need more memory in fp32 than the machine has.

    Raises:
        ValueError: naming the number of parameters and the memory.
    """
    parameters = sum(p.numel() for p in model.parameters())
    needed = 4 * 4 * parameters
    if needed > memory():
        raise ValueError(
            f"{parameters:,} parameters are too many: with gradients and both moments of AdamW they need "
            f"{in_gib(needed)} of memory, and this machine has {in_gib(memory())}. Lower hidden_dim or num_layers"
        )


def check_processes(**numbers: Any) -> None:
    """Reject numbers of processes that exceed the machine; `auto` and lists of devices are not checked.

    Raises:
        ValueError: naming the argument.
    """
    for name, number in numbers.items():
        if str(number).isdecimal() and int(number) > most_processes():  # the command line gives `devices` as text
            raise ValueError(f"{name}={number} is too large: at most {most_processes()} processes on this machine")


def check_open_files(num_workers: Any) -> None:
    """Let this process have the open files that a loader's workers need: pipes, and the tensors that they share.

    Raises:
        ValueError: naming the limit, if it cannot be raised that far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 64 + 16 * num_workers if isinstance(num_workers, int) and num_workers > 0 else 0
    if needed > hard != resource.RLIM_INFINITY:
        raise ValueError(
            f"num_workers={num_workers} needs {needed} open files, and `ulimit -Hn` allows {hard}: set num_workers=0"
        )
    if needed > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def check_trainer(options: Mapping[str, Any]) -> None:
    """Reject Trainer options that Lightning would divide by or misinterpret.

    Args:
        options: of the Trainer.

    Raises:
        ValueError: naming the option and its minimum.
    """
    for name, least in LEAST.items():
        value = options.get(name)
        is_share = isinstance(value, float) and 0 < value < 1  # of an epoch
        if isinstance(value, int | float) and value < least and not is_share:
            raise ValueError(f"{name}={value} is too small: at least {least}")
    if options.get("barebones"):
        raise ValueError("barebones=true: a run has a logger, checkpoints and a record, which it forbids. Leave it out")
    if options.get("logger") is True:
        raise ValueError("logger=true names no logger: leave it out for TensorBoard, or name a class like CSVLogger")
    if options.get("logger", False) is None:  # Lightning would add a logger of its own, in a folder of its own
        raise ValueError("logger=null names no logger: false for none, or name a class like CSVLogger")
    devices = options.get("devices")
    if isinstance(devices, str) and not re.fullmatch(r"auto|-?\d+|\d+(,\d+)*,?", devices):
        raise ValueError(
            f"devices={devices}: must be how many, a list of their numbers, or auto; --trainer.accelerator is the kind"
        )
    on_cpu = options.get("accelerator") == "cpu" or not torch.accelerator.is_available()
    if on_cpu and str(options.get("devices")).startswith("-"):
        raise ValueError(f"devices={options['devices']} does not work on a CPU: set the number of processes, such as 1")


def most_processes() -> int:
    return max(16, 4 * (os.cpu_count() or 1))


def count_parameters(attention: AttentionArgument, sizes: Mapping[str, Any]) -> int:
    """The number of parameters of a model; `BEYOND` where torch cannot represent its shapes. Uses no memory."""
    specs, num_layers = specs_of(attention), sizes["num_layers"]
    if any(isinstance(sizes[name], int) and sizes[name] > LARGEST_SIZE for name in SIZES):
        return BEYOND
    pattern = 1 if isinstance(specs, AttentionSpec) else max(1, len(specs))
    repeats = num_layers // pattern if isinstance(num_layers, int) and num_layers % pattern == 0 else 1
    try:
        with torch.device("meta"):
            model = LanguageModel(specs, **{**sizes, "num_layers": pattern} if repeats > 1 else sizes)
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        return BEYOND
    total = sum(p.numel() for p in model.parameters())
    return total + (max(1, repeats) - 1) * sum(p.numel() for branch in model.branches for p in branch.parameters())


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"

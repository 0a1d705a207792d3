"""Models side by side by name: what they cost at every length, how well they recall, and what follows from it.

Costs are those of `scaling.measure_costs`: of the model's body, for one sequence, all models timed in the same rounds.
Accuracy is that of trained weights: of checkpoints, or of a short training that the results state. A model that fails
its certificate (it sees the future, or decodes what it was not trained to say) is left out with a warning.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bsbr_pl.data import TokenData
from bsbr_pl.data.corpus import default_cache_dir
from bsbr_pl.model import LanguageModel
from bsbr_pl.spec import AttentionSpec
from bsbr_pl.utils.records import environment, one_line
from bsbr_pl.utils.timing import bootstrap_interval

from .accuracy import accuracy_at, chance
from .contestants import build_model, builders, check_among, keep_certified, sizes
from .scaling import PASSES, measure_costs
from .training import default_task, open_checkpoint, train


class Cost(NamedTuple):
    """A figure of `measure_costs`: its unit here, its name there, and what it is divided by."""

    unit: str
    key: str
    divisor: float = 1.0


#: The metrics of `compare_models` beside `accuracy`, and those of `scaling_analysis`.
COSTS = {
    "inference_time": Cost("s", "forward"),
    "training_time": Cost("s", "training"),
    "decode_time": Cost("s", "decode"),
    "memory_usage": Cost("MB", "forward_bytes", 1e6),
    "training_memory": Cost("MB", "training_bytes", 1e6),
    "state_size": Cost("MB", "state_bytes", 1e6),
    "flops": Cost("operations", "forward_flops"),
}
SCALING = {
    "time": Cost("s", "forward"),
    "memory": Cost("GB", "forward_bytes", 1e9),
    "flops": Cost("operations", "forward_flops"),
}


def compare_models(
    seq_lengths: Sequence[int] = (64, 128, 256, 512, 1024),
    models: Sequence[str] = ("BSBR", "Linear", "DeltaNet", "SlidingWindow", "Standard"),
    metrics: Sequence[str] = ("inference_time", "memory_usage", "accuracy"),
    *,
    vocab_size: int = 16,
    hidden_dim: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    ff_dim: int | None = None,
    reach: int = 16,
    model_options: Mapping[str, Mapping[str, Any]] | None = None,
    match: str | None = None,
    checkpoints: Mapping[str, str | Path] | None = None,
    task: TokenData | None = None,
    train_steps: int = 1200,
    learning_rate: float = 5e-3,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure models at several lengths.

    Args:
        seq_lengths: tokens T.
        models: names of `bsbr_pl.models.MODELS`, keys of `ARCHITECTURES`, or names in `checkpoints`; kept in order.
        metrics: inference_time, training_time, decode_time (s: forward pass, forward and backward, one more token
            after T), memory_usage, training_memory (MB of 10^6 bytes: the peak of these passes beyond what the model
            holds), state_size (MB: of the decode state), flops (forward pass, 2 a multiply-add), and accuracy: the
            share of a task's answers that are right, on held-out samples of T tokens; None where they cannot be T long.
        vocab_size: token ids of the default task, and of the models; at least those of `task`.
        hidden_dim: width D of the models.
        num_layers: layers of the models.
        num_heads: heads of each attention.
        ff_dim: width of the feed-forward networks; 4 * hidden_dim where None, 0 for none.
        reach: tokens of a chunk of BSBR and GAU, and of SlidingWindow's window, unless `model_options` says otherwise.
        model_options: name -> options of its architecture: {"BSBR": {"chunk_size": 32}}, in tokens.
        match: params, flops, state_bytes or step_time: turn the sizes of the models until they match the first that is
            no checkpoint, at the longest of `seq_lengths`, and return `matched`; see `matching.match`.
        checkpoints: name -> file of a trained model. It is measured as it is, whatever its size, and its accuracy is
            that on the data it was trained on.
        task: a data set of `bsbr_pl.data`; what the other models are trained on for their accuracy; `default_task`
            where None.
        train_steps: optimiser steps of that training.
        learning_rate: of that training, at its highest.
        cache_dir: where the trained weights are kept, by all that decides them; $XDG_CACHE_HOME/bsbr_pl or
            ~/.cache/bsbr_pl where None.
        device: where to compute; CUDA where there is one, else the CPU.
        rounds: samples of each time.
        seed: of the weights, of the task and of the tokens that are timed.

    Returns:
        seq_lengths, models, metrics; units: metric -> unit; settings; accuracy_task: what was trained on, how long,
        and the accuracy of guessing; disqualified: model -> the checks it failed. For each model left: each metric, a
        list along seq_lengths with None where there is no figure; samples and intervals (95 %): metric -> the same;
        accuracy_as_trained: the accuracy on held-out samples as long as those trained on. Plain values all through.

    Raises:
        ValueError: an unknown model or metric (lists the known ones), an argument out of range, no model left.
        TypeError: an option that an architecture does not have (lists those it has).
    """
    check_among("metrics", metrics, [*COSTS, "accuracy"])
    files, device = checkpoints or {}, _device(device)
    task = task or default_task(vocab_size, seed)
    vocab_size = max(vocab_size, task.vocab_size) if "accuracy" in metrics else vocab_size
    build = builders(models, files, sizes(vocab_size, hidden_dim, num_layers, num_heads, ff_dim), reach, model_options)
    check_among("checkpoints", files, models)
    if match:
        from .matching import match as solve  # here, because that module is also run as a command

        matched = solve(match, build, max(seq_lengths, default=1), next(iter(build), ""), rounds=rounds, device=device)
        build = {name: one.arguments for name, one in matched.items()}
    results = _empty(seq_lengths, models, metrics, COSTS, build, {"rounds": rounds, "seed": seed}, device)
    results |= {"matched": {name: one.as_dict() for name, one in matched.items()}} if match else {}
    trained = {name: open_checkpoint(path) for name, path in files.items()}
    if "accuracy" in metrics:
        training = {"steps": train_steps, "learning_rate": learning_rate, "seed": seed}
        results["accuracy_task"] = {"task": str(task), **training, "chance": chance(task)} if build else None
        folder = Path(cache_dir or default_cache_dir()).expanduser() / "comparison"
        for name, arguments in tqdm(build.items(), "training", disable=None):
            path = train(arguments | {"learning_rate": learning_rate}, task, train_steps, seed, device, folder)
            trained[name] = open_checkpoint(path)
    built = {name: build_model(trained.get(name) or build[name], seed).to(device).eval() for name in models}
    keep_certified(built, trained, results)
    _measure(built, COSTS, results, rounds, seed)
    for name in tqdm(built if "accuracy" in metrics else [], "accuracy", disable=None):
        results[name]["accuracy_as_trained"] = accuracy_at(built[name], trained[name])[0]
        for length in seq_lengths:
            _add(results[name], "accuracy", *accuracy_at(built[name], trained[name], length), None)
    return results


def scaling_analysis(
    seq_lengths: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
    models: Sequence[str] = ("BSBR", "Linear", "Standard"),
    metrics: Sequence[str] = ("time", "memory", "flops"),
    *,
    vocab_size: int = 256,
    hidden_dim: int = 256,
    num_layers: int = 2,
    num_heads: int = 4,
    ff_dim: int | None = None,
    reach: int = 128,
    model_options: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | torch.device | None = None,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """What a forward pass over one sequence costs, at several lengths; the weights are random, costs do not see them.

    Args:
        seq_lengths: tokens T.
        models: names of `bsbr_pl.models.MODELS` or keys of `ARCHITECTURES`; kept in order.
        metrics: time (s), memory (GB of 10^9 bytes: the peak beyond what the model holds), flops (2 a multiply-add).
        vocab_size, hidden_dim, num_layers, num_heads, ff_dim, reach, model_options, device, rounds, seed: as in
            `compare_models`, and so is what is returned and raised.
    """
    check_among("metrics", metrics, SCALING)
    device = _device(device)
    build = builders(models, (), sizes(vocab_size, hidden_dim, num_layers, num_heads, ff_dim), reach, model_options)
    results = _empty(seq_lengths, models, metrics, SCALING, build, {"rounds": rounds, "seed": seed}, device)
    built = {name: build_model(arguments, seed).to(device).eval() for name, arguments in build.items()}
    keep_certified(built, {}, results)
    _measure(built, SCALING, results, rounds, seed)
    return results


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _empty(
    seq_lengths: Sequence[int],
    models: Sequence[str],
    metrics: Sequence[str],
    costs: Mapping[str, Cost],
    build: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """What every comparison returns, before anything is measured."""
    built_from = {name: {**one, "attention": AttentionSpec.of(one["attention"]).plain()} for name, one in build.items()}
    results: dict[str, Any] = {
        "seq_lengths": list(seq_lengths),
        "models": list(models),
        "metrics": list(metrics),
        "units": {metric: costs[metric].unit if metric in costs else "share" for metric in metrics},
        "settings": {**settings, "models": built_from, "environment": environment(device)},
        "accuracy_task": None,
        "disqualified": {},
    }
    for name, values in (("seq_lengths", seq_lengths), ("models", models), ("metrics", metrics)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must hold at least one, and each once, got {list(values)}")
    for length in seq_lengths:
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"seq_lengths must be positive integers, got {length!r}")
    for name in models:
        if name in results:
            raise ValueError(f"models: {name!r} is what results call something else")
        results[name] = {part: {metric: [] for metric in metrics} for part in ("samples", "intervals")}
        results[name] |= {metric: [] for metric in metrics}
    return results


def _add(row: dict[str, Any], metric: str, value: float | None, interval: list[float] | None, samples: Any) -> None:
    """One more length of one metric of one model."""
    for into, what in ((row, value), (row["intervals"], interval), (row["samples"], samples)):
        into[metric].append(what)


def _measure(
    models: Mapping[str, LanguageModel], costs: Mapping[str, Cost], results: dict[str, Any], rounds: int, seed: int
) -> None:
    """Fill in the costs that are asked for, all models in the same rounds at each length."""
    wanted = {metric: costs[metric] for metric in results["metrics"] if metric in costs}
    keys = {cost.key for cost in wanted.values()}
    memory = bool(keys & {"forward_bytes", "training_bytes"})
    for length in tqdm(results["seq_lengths"] if wanted else [], "costs", disable=None):
        try:
            found = measure_costs(models, length, rounds, [one for one in PASSES if one in keys], memory, seed)
        except (RuntimeError, MemoryError) as error:  # out of memory, most likely: the other lengths go on
            warnings.warn(f"no costs at {length} tokens: {one_line(error, 300)}", stacklevel=3)
            found = {}
        for name in models:
            for metric, (_, key, divisor) in wanted.items():
                if not found:
                    _add(results[name], metric, None, None, None)
                    continue
                value = found[name][key]
                samples = [one / divisor for one in (value["samples"] if isinstance(value, dict) else [value])]
                _add(results[name], metric, median(samples), list(bootstrap_interval(samples)), samples)

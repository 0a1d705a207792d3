"""Compares models by name: costs and recall accuracy at every length, with rankings.

Costs are those of `costs.measure_costs`: embedding to last norm, for one sequence, all models timed in the same rounds.
Accuracy is that of trained weights: of checkpoints, or of a short training that the results describe. A model that
fails its certificate is left out with a warning.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from bsbr_pl.data import TokenData
from bsbr_pl.results import Results
from bsbr_pl.utils.files import default_cache_dir
from bsbr_pl.utils.records import default_device, environment
from bsbr_pl.values import bootstrap_interval

from .costs import PASSES
from .evaluation import Evaluation
from .matching import match as solve
from .matching import plain, unmatched
from .subject import Subject
from .training import check_among, default_task, from_checkpoint, model_arguments, train_all, untrained


class Cost(NamedTuple):
    """A figure of `measure_costs`: its unit here, its name there, and what it is divided by."""

    unit: str
    key: str
    divisor: float = 1.0


#: The metrics of `compare_models` except `accuracy`, and those of `scaling_analysis`.
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
    seq_lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
    models: Sequence[str] | Mapping[str, Any] = ("BSBR", "Linear", "DeltaNet", "SlidingWindow", "Standard"),
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
    trust_data: bool = False,
    task: TokenData | None = None,
    train_steps: int = 1200,
    learning_rate: float = 5e-3,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure models at several lengths. Before a training, standard error says what is trained, and for how long.

    Args:
        seq_lengths: tokens T; the default task trains at 32.
        models: names of `bsbr_pl.models.MODELS`, keys of `ARCHITECTURES`, or names in `checkpoints`; kept in order. Or
            a dict of them: name -> such a name, or an `nn.Module` class (B, T, D) -> (B, T, D), `functools.partial` of
            one, or spec: {"mine": MyAttention, "Standard": "standard"}. All layers are alike. What a model cannot
            do (decode) is None.
        metrics: inference_time, training_time, decode_time (s: forward pass, forward and backward, one more token
            after T), memory_usage, training_memory (MB of 10^6 bytes: the peak of these passes beyond what the model
            holds), state_size (MB: of the decode state), flops (forward pass, 2 a multiply-add), and accuracy: the
            share of a task's answers that are right, on held-out samples of T tokens; None where they cannot be T long.
        vocab_size: token ids of the default task, and of the models; at least those of `task`.
        hidden_dim: width D of the models.
        num_layers: layers of the models.
        num_heads: heads of each attention.
        ff_dim: width of the feed-forward networks; 4 * hidden_dim where None, 0 for none.
        reach: tokens of a chunk of BSBR and GAU, and of SlidingWindow's window, unless `model_options` sets it.
        model_options: name -> options of its architecture: {"BSBR": {"chunk_size": 32}}, in tokens.
        match: params, flops, state_bytes or step_time: change the sizes of the models until they match the first that
            is no checkpoint, at the longest of `seq_lengths`, and return `matched`; see `matching.match`. It counts the
            FLOPs with the head; the metric flops is without.
        checkpoints: name -> file of a trained model. It is measured as it is, whatever its size, and its accuracy is
            that on the data it was trained on.
        trust_data: read the paths and Hub names in `checkpoints`, with their sizes and workers.
        task: a data set of `bsbr_pl.data`; what the other models are trained on for their accuracy; `default_task`
            where None.
        train_steps: optimiser steps of that training; 0 for random weights.
        learning_rate: the highest of that training.
        cache_dir: folder of the trained weights; $XDG_CACHE_HOME/bsbr_pl or ~/.cache/bsbr_pl where None. They are used
            again until an argument or the code changes: that of the model's classes, and the own code and values that
            it names.
        device: where to compute; CUDA where there is one, else the CPU.
        rounds: samples of each time.
        seed: of the weights, of the task and of the tokens that are timed.

    Returns:
        seq_lengths, models, metrics; units: metric -> unit; settings; accuracy_task: what was trained on, how long,
        and the accuracy of guessing; disqualified: model -> the checks it failed; parameters: model -> their number;
        differences: sentences on unequal budgets, sizes or data, which are also warned of. For each model left: each
        metric, a list along seq_lengths with None where there is no figure; samples and intervals (95 %): metric ->
        the same; accuracy_as_trained: the accuracy on held-out samples as long as those trained on. Plain values all
        through.

    Raises:
        ValueError: an unknown model or metric (lists the known ones), an argument out of range, no model left.
        TypeError: an option that an architecture does not have (lists those it has).
    """
    check_among("metrics", metrics, [*COSTS, "accuracy"])
    if not isinstance(task, TokenData | None):
        raise ValueError(f"task must be a data set of bsbr_pl.data, got {task!r}")
    if not isinstance(train_steps, int) or train_steps < 0:  # Lightning trains for ever with -1
        raise ValueError(f"train_steps must be an integer of at least 0, got {train_steps!r}")
    files, device, with_accuracy = dict(checkpoints or {}), default_device(device), "accuracy" in metrics
    task = task or default_task(vocab_size, seed)
    sizes = {
        "vocab_size": max(vocab_size, task.vocab_size) if with_accuracy else vocab_size,
        **{"hidden_dim": hidden_dim, "num_layers": num_layers, "num_heads": num_heads, "ff_dim": ff_dim},
    }
    build = model_arguments(models, files, sizes, reach, model_options or {})
    evaluation = Evaluation(Results(None), device, rounds=rounds, seed=seed)
    results = _empty(seq_lengths, models, metrics, COSTS, evaluation)
    if match:
        found = solve(match, build, max(seq_lengths), next(iter(build), ""), rounds=rounds, device=device)
        build = {name: one.arguments for name, one in found.items()}
        results["matched"] = {name: one.as_dict() for name, one in found.items()}
        results["differences"] += unmatched(match, found)
    results["settings"]["models"] = {name: plain(one) for name, one in build.items()}
    if with_accuracy and build:
        training = {"steps": train_steps, "learning_rate": learning_rate, "seed": seed}
        results["accuracy_task"] = {"task": str(task), **training, "chance": task.chance()}
        folder = Path(cache_dir or default_cache_dir()).expanduser() / "comparison"
        files |= train_all(build, task, train_steps, learning_rate, seed, device, folder)
    subjects = {
        name: from_checkpoint(name, files[name], trust_data or name in build)
        if name in files
        else untrained(name, build[name], seed)
        for name in models
    }
    certified = _certified(subjects, evaluation, results)
    _measure_costs(certified, evaluation, results, COSTS)
    if with_accuracy:
        _measure_accuracy(certified, evaluation, results)
        from bsbr_pl.report import warnings as differences  # imports what draws

        results["differences"] += differences(evaluation.rows(list(certified.values())))
    for sentence in results["differences"]:
        warnings.warn(sentence, stacklevel=2)
    return results


def scaling_analysis(
    seq_lengths: Sequence[int] = (64, 128, 256, 512, 1024, 2048),
    models: Sequence[str] | Mapping[str, Any] = ("BSBR", "Linear", "Standard"),
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
    """The costs of a forward pass over one sequence at several lengths, with random weights.

    Args:
        seq_lengths: tokens T.
        models: names of `bsbr_pl.models.MODELS` or keys of `ARCHITECTURES`, or a dict as in `compare_models`.
        metrics: time (s), memory (GB of 10^9 bytes: the peak beyond what the model holds), flops (2 a multiply-add).
        vocab_size, hidden_dim, num_layers, num_heads, ff_dim, reach, model_options, device, rounds, seed: as in
            `compare_models`. The returned values and the errors are as there, too.
    """
    check_among("metrics", metrics, SCALING)
    sizes = {"vocab_size": vocab_size, "hidden_dim": hidden_dim, "num_layers": num_layers, "num_heads": num_heads}
    build = model_arguments(models, (), sizes | {"ff_dim": ff_dim}, reach, model_options or {})
    evaluation = Evaluation(Results(None), default_device(device), rounds=rounds, seed=seed)
    results = _empty(seq_lengths, models, metrics, SCALING, evaluation)
    results["settings"]["models"] = {name: plain(one) for name, one in build.items()}
    subjects = {name: untrained(name, arguments, seed) for name, arguments in build.items()}
    _measure_costs(_certified(subjects, evaluation, results), evaluation, results, SCALING)
    return results


def _empty(
    seq_lengths: Sequence[int],
    models: Iterable[str],
    metrics: Sequence[str],
    costs: Mapping[str, Cost],
    evaluation: Evaluation,
) -> dict[str, Any]:
    """What every comparison returns, before anything is measured."""
    if isinstance(seq_lengths, int):
        raise ValueError(f"seq_lengths must be a list of lengths, got {seq_lengths}")
    settings = {"rounds": evaluation.rounds, "seed": evaluation.seed}
    results: dict[str, Any] = {
        "seq_lengths": list(seq_lengths),
        "models": list(models),
        "metrics": list(metrics),
        "units": {metric: costs[metric].unit if metric in costs else "share" for metric in metrics},
        "settings": {**settings, "models": {}, "environment": environment(evaluation.device)},
        "accuracy_task": None,
        "disqualified": {},
        "parameters": {},
        "differences": [],
    }
    for name in ("seq_lengths", "models", "metrics"):
        values = results[name]
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must hold at least one, and each once, got {values}")
    for length in seq_lengths:
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"seq_lengths must be positive integers, got {length!r}")
    for name in results["models"]:
        if name in results or name == "matched":
            raise ValueError(f"models: {name!r} is the name of another entry of the results")
        results[name] = {part: {metric: [] for metric in metrics} for part in ("samples", "intervals")}
        results[name] |= {metric: [] for metric in metrics}
    return results


def _certified(subjects: Mapping[str, Subject], evaluation: Evaluation, results: dict[str, Any]) -> dict[str, Subject]:
    """The subjects that pass their certificate, with their parameters; the others are taken out of the results."""
    passed = evaluation.certify(list(subjects.values()))
    for name, subject in subjects.items():
        if subject in passed:
            continue
        found = evaluation.results.get(evaluation.identity(subject, "certificate"))
        failed = [check["name"] for check in found["checks"] if not check["passed"]] if found else ["certificate"]
        words = f"it fails {', '.join(failed)}"
        if not found:
            words = f"it cannot be certified, because {_problem_of(subject, evaluation)}"
        elif not all(bool(one.isfinite().all()) for one in subject.model.state_dict().values()):
            words = f"its weights are not finite, so {words}"
        warnings.warn(f"{name} is excluded from the comparison: {words}", stacklevel=3)
        results["disqualified"][name] = failed
        results["models"].remove(name)
        del results[name]
    if not passed:
        raise ValueError(f"models: all fail their certificate: {results['disqualified']}")
    certified = {name: subject for name, subject in subjects.items() if subject in passed}
    results["parameters"] = {name: subject.about["parameters"] for name, subject in certified.items()}
    return certified


def _problem_of(subject: Subject, evaluation: Evaluation) -> str:
    found = [row for row in evaluation.problems if row["identity"]["checkpoint"] == subject.digest]
    return found[-1]["values"]["problem"]


def _measure_costs(
    subjects: Mapping[str, Subject], evaluation: Evaluation, results: dict[str, Any], costs: Mapping[str, Cost]
) -> None:
    """Fill in the costs that are asked for, from their rows."""
    wanted = {metric: costs[metric] for metric in results["metrics"] if metric in costs}
    if not wanted:
        return
    keys, lengths = {cost.key for cost in wanted.values()}, results["seq_lengths"]
    passes, memory = [one for one in PASSES if one in keys], bool(keys & {"forward_bytes", "training_bytes"})
    evaluation.costs(list(subjects.values()), lengths, passes, memory)
    of_costs = [row for row in evaluation.problems if row["identity"]["of"]["kind"] == "cost"]
    for words in dict.fromkeys(row["values"]["problem"] for row in of_costs):
        warnings.warn(f"no {words}", stacklevel=3)
    for (name, subject), length in product(subjects.items(), lengths):
        row = evaluation.results.get(evaluation.identity(subject, "cost", length=length, rounds=evaluation.rounds))
        for metric, (_, key, divisor) in wanted.items():
            if row is None or key not in row:
                _add(results[name], metric, None, None, None)
                continue
            samples = row[key]["samples"] if isinstance(row[key], dict) else [row[key]]
            samples = [one / divisor for one in samples]
            _add(results[name], metric, median(samples), list(bootstrap_interval(samples)), samples)


def _measure_accuracy(subjects: Mapping[str, Subject], evaluation: Evaluation, results: dict[str, Any]) -> None:
    """Fill in the accuracies on the test split of each model's own data, from their rows.

    Raises:
        ValueError: the data of a checkpoint is not there, or has changed.
    """
    lengths = results["seq_lengths"]
    evaluation.accuracy([(subject, [None, *lengths]) for subject in subjects.values()], "test")
    for problem in evaluation.problems:
        if problem["identity"]["of"]["kind"] == "data":
            raise ValueError(problem["values"]["problem"])
        if problem["identity"]["of"]["kind"] in ("text", "recall"):
            warnings.warn(f"no accuracy: {problem['values']['problem']}", stacklevel=3)
    rows = [row for row in evaluation.results.rows if row["identity"]["kind"] in ("text", "recall")]
    found = {(row["identity"]["checkpoint"], row["identity"].get("length")): row["values"] for row in rows}
    for name, subject in subjects.items():
        data = subject.about["data"]
        own = found.get((subject.digest, data["validation_length"] if data["kind"] == "text" else None))
        results[name]["accuracy_as_trained"] = own and own["accuracy"]
        for length in lengths:
            values = found.get((subject.digest, length))
            interval = values["interval"]["accuracy"] if values else None
            _add(results[name], "accuracy", values["accuracy"] if values else None, interval, None)


def _add(row: dict[str, Any], metric: str, value: float | None, interval: list[float] | None, samples: Any) -> None:
    """One more length of one metric of one model."""
    for into, what in ((row, value), (row["intervals"], interval), (row["samples"], samples)):
        into[metric].append(what)

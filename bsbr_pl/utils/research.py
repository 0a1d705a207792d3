"""ExperimentRunner: runs your own experiment over models and lengths, with timing, saved cell by cell, and resumed."""

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any
from uuid import uuid4
from weakref import ref

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bsbr_pl.models import model_class
from bsbr_pl.results import Job, NotKeptError, Results
from bsbr_pl.values import digest, finite

from .code import named_by, source_code
from .records import default_device, environment
from .timing import Timing, measure, timing_lock

#: Attributes of a runner that decide no cell: where it writes, what its other cells are, and what `environment` says.
NOT_DECISIVE = ("path", "models", "seq_lengths", "device")


class ExperimentRunner:
    """Runs `run_experiment` once for every model and length: `records = MyExperiment("folder").run()`.

    A subclass sets `models`, `seq_lengths` and `metrics` in `setup` and defines `run_experiment`. Each cell (a model at
    a length) is a row of `output_dir/results.jsonl` as soon as it is measured. It is reused until something that it
    depends on changes: the config, other attributes of the runner, the model's structure, attributes or weights, the
    code of this class and of the model's, the machine. Code counts with its defaults, with what it closes over, and
    with the functions, classes and plain values that it names, but for those of installed packages; what cannot be
    told, as an open file, is another one in each run. Several processes with the same folder divide the cells. A cell
    that fails has a record with its error; the others continue, and the next `run` tries it again. Each cell has its
    own copy of the model and starts from the same random state, of torch, numpy and `random`.

    Args:
        output_dir: folder of the results; runs/<name of the class> if None.
        config: what the experiment depends on; `self.config` in its methods. Models that are given by name only are
            built from it: vocab_size, hidden_dim, ...
        device: device of the models; `self.device` in the methods; CUDA if available, otherwise the CPU.
        rounds: timed runs of each cell, after one warm-up run. 0: one run without timing, for experiments that change
            the model.
        seed: the random state that `setup` and every cell start from.
    """

    #: name -> model, or names of `bsbr_pl.models.MODELS` or keys of `ARCHITECTURES`.
    models: Mapping[str, Any] | Sequence[str]
    #: tokens.
    seq_lengths: Sequence[int]
    #: what `run_experiment` must return, at least.
    metrics: Sequence[str] = ()
    #: attributes of this object and its class that decide no cell, such as a list of messages.
    ignored: Sequence[str] = ()

    def __init__(
        self,
        output_dir: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        rounds: int = 3,
        seed: int = 0,
    ) -> None:
        if rounds < 0:
            raise ValueError(f"rounds must be 0 (untimed) or more, got {rounds}")
        self.path = Path(output_dir or Path("runs") / type(self).__name__) / "results.jsonl"
        self.config = dict(config or {})
        self.device = default_device(device)
        self.rounds, self.seed = rounds, seed

    # What a subclass defines.

    def setup(self) -> None:
        """Set `self.models`, `self.seq_lengths` and `self.metrics`; called by `run`, under the seed."""
        raise NotImplementedError(f"{type(self).__name__} must define setup: self.models, seq_lengths, metrics")

    def run_experiment(self, model: Any, seq_length: int) -> Mapping[str, Any]:
        """One cell: plain values by name. The model is on `self.device`, in evaluation mode."""
        raise NotImplementedError(f"{type(self).__name__} must define run_experiment(model, seq_length)")

    def calculate_accuracy(self, outputs: Any) -> float:
        """The share of correct `outputs`; for `run_experiment` to call if it measures accuracy."""
        raise NotImplementedError(f"{type(self).__name__} must define calculate_accuracy(outputs), or not call it")

    def analyze_results(self, results: list[dict[str, Any]]) -> Any:
        """Analyse the records of `run`; returns them unchanged unless a subclass overrides it."""
        return results

    def run(self) -> list[dict[str, Any]]:
        """Run every cell that is not done yet, with a progress bar; Ctrl-C loses only the current cell.

        Returns:
            a flat dict for each cell: model, seq_length, what `run_experiment` returned, and seconds, the median time
            of one call, in seconds_low ... seconds_high (95 %); model, seq_length, error if it failed.
            `pandas.DataFrame(records)` makes a table of them.

        Raises:
            ValueError: an unknown model name (lists the known ones).
        """
        with _own_random_state(self._forked):
            _seed(self.seed)
            self.setup()
            if isinstance(self.models, Mapping):
                models = dict(self.models)
            else:
                models = {name: model_class(name)(**self.config) for name in self.models}
        results, errors = Results(self.path), dict[str, str]()
        jobs = [job for name, model in models.items() for job in self._jobs(name, model)]
        with tqdm(total=len(jobs), desc=type(self).__name__) as bar:

            def run(job: Job) -> None:
                bar.set_postfix_str(f"{job.about['model']}, {job.identity['length']} tokens")
                try:
                    results.add(job.identity, job.measure(), job.about)
                except NotKeptError:
                    raise
                except Exception as error:  # the other cells continue
                    errors[digest(job.identity)] = f"{type(error).__name__}: {error}"
                bar.update()

            results.share(jobs, run)

        def record(job: Job) -> dict[str, Any]:
            found = results.get(job.identity)
            values = {"error": errors[digest(job.identity)]} if found is None else found
            return {"model": job.about["model"], "seq_length": job.identity["length"], **values}

        return list(map(record, jobs))

    def _jobs(self, name: str, model: Any) -> list[Job]:
        """The cells of a model."""
        weights = self._digest(name, model)
        facts = {"kind": "experiment", "checkpoint": weights}
        measure = partial(self._measure, model)
        lengths = map(_plain, self.seq_lengths)
        return [Job({**facts, "length": n}, {"model": name}, partial(measure, n)) for n in lengths]

    def _measure(self, model: Any, length: int) -> dict[str, Any]:
        """The values of one cell."""
        values: Mapping[str, Any] = {}
        timing: Timing | None = None

        def once() -> None:
            nonlocal values
            _seed(self.seed)
            values = self.run_experiment(model, length)

        with _own_random_state(self._forked):
            if isinstance(model, nn.Module):
                model = copy.deepcopy(model).to(self.device).eval()
            if self.rounds:
                with timing_lock():
                    timing = measure({"cell": once}, self.rounds, warmup=1, device=self.device)["cell"]
            else:
                once()
        for name, value in values.items():
            if getattr(value, "ndim", 0):
                raise ValueError(f"run_experiment must return plain values, got an array as {name!r}: use .tolist()")
        missing = [metric for metric in self.metrics if metric not in values]
        if missing:
            raise ValueError(f"run_experiment must return {', '.join(missing)} (metrics), got only {', '.join(values)}")
        times = {"seconds": timing.median, "seconds_low": timing.low, "seconds_high": timing.high} if timing else {}
        if taken := [name for name in ("model", "seq_length", *times) if name in values]:
            raise ValueError(f"run_experiment must not return {', '.join(taken)}: the record has a value of this name")
        return {**times, **finite({name: _plain(value) for name, value in values.items()})}

    @property
    def _forked(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _digest(self, name: str, model: Any) -> str:
        """Digest of everything that the model's cells depend on, except their length."""
        own = {name: value for name, value in vars(self).items() if name not in {*NOT_DECISIVE, *self.ignored}}
        facts = [source_code(type(self), self.ignored), own, list(self.metrics), name, model]
        try:
            content = [_facts(facts, {}), environment(self.device)]
        except RecursionError:
            content = [uuid4().hex]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def _own_random_state(devices: list[torch.device]) -> Iterator[None]:
    """Put the random states of torch, numpy and `random` back at the end."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _facts(value: Any, seen: dict[int, Any]) -> Any:
    """What a value is made of, as JSON holds it; the same in each process, unless a part cannot be told.

    `seen`: the numbers of the parts that were met, and the parts themselves, so that no other gets their address.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        return [str(value.dtype), list(value.shape), sha256(content).hexdigest()]
    if not isinstance(value, tuple):
        if id(value) in seen:
            return ["seen", seen[id(value)][0]]
        seen[id(value)] = len(seen), value
    parts, facts = _parts(value), partial(_facts, seen=seen)
    if isinstance(parts, Mapping):
        return {_shown(key): facts(part) for key, part in parts.items()}
    return parts if isinstance(parts, str) else list(map(facts, parts))


def _parts(value: Any) -> Mapping | Sequence:
    """What decides a value that is no plain one: other values, or a text."""
    if isinstance(value, list | tuple | Mapping):
        return value
    if isinstance(value, set | frozenset):
        return _shown(sorted(map(repr, value)))  # their order is another in each process
    if isinstance(value, type):
        return source_code(value)
    if isinstance(value, CodeType):
        return value.co_code.hex(), value.co_names, value.co_consts
    if isinstance(value, FunctionType):
        return value.__code__, named_by(value), value.__defaults__, value.__kwdefaults__
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, nn.Module):
        return type(value), {name: part for name, part in vars(value).items() if name != "training"}
    if isinstance(value, ref):
        return (value(),)
    try:
        reduced = None if isinstance(value, bytes) else value.__reduce_ex__(4)  # as pickle takes it apart
    except Exception:
        reduced = None
    if isinstance(reduced, str):  # the name of a global
        return reduced, getattr(value, "__wrapped__", None)
    return [list(part) if isinstance(part, Iterator) else part for part in reduced] if reduced else _shown(value)


def _shown(value: Any) -> str:
    """The text of a value; another one at each call if it is no more than an address."""
    text = repr(value)
    return uuid4().hex if " at 0x" in text else text


def _plain(value: Any) -> Any:
    """A tensor or array of one number as that number."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value

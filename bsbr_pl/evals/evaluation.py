"""From checkpoints to results: certify each, then measure its accuracy, and the costs of all side by side."""

import copy
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bsbr_pl.data import TextData, TokenData
from bsbr_pl.results import NotKeptError, Results
from bsbr_pl.utils.records import environment, git_commit
from bsbr_pl.utils.timing import undisturbed
from bsbr_pl.values import one_line

from .accuracy import recall_accuracy, text_accuracy
from .certificate import certify
from .checkpoints import SIZES, Checkpoint, labels
from .retrieval import retrieval, routes
from .saved_data import DataChangedError
from .scaling import measure_costs

VERSION = 2  # changes whenever a measurement changes its meaning
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
MULTIPLES = (1, 2, 4, 8)


class Cell(NamedTuple):
    """One measurement of one checkpoint, for a row of the results."""

    identity: dict[str, Any]
    checkpoint: Checkpoint
    measure: Callable[[], dict[str, Any]]


@dataclass
class Evaluation:
    """Measures checkpoints on one device in one precision; what `results` holds already is not measured again.

    Processes that are given the same results at once divide the work, and all of them end with every row.

    Args:
        checkpoints: as `read_all` gives them.
        results: where rows are kept, as they come.
        device: where to compute.
        dtype: float32, bfloat16 or float64; of the weights and the computation.
        split: of the data: `val` or `test`.
        multiples: context lengths to predict text at, in lengths of training.
        lengths: tokens, to measure costs at.
        rounds: samples of each time.
        command: that asks for it, kept beside each number.
    """

    checkpoints: Sequence[Checkpoint]
    results: Results
    device: str = "cpu"
    dtype: str = "float32"
    split: str = "val"
    multiples: Sequence[int] = MULTIPLES
    lengths: Sequence[int] = LENGTHS
    rounds: int = 5
    command: str = ""
    problems: dict[str, str] = field(default_factory=dict)  # name of a checkpoint -> what went wrong with it
    changed: set[str] = field(default_factory=set)  # digests of checkpoints whose data changed since training

    def __post_init__(self) -> None:
        facts = environment(self.device)
        wanted = ("cpu", "instructions", "threads", "device", "gpu", "cuda")
        self.environment = {
            **{name: facts[name] for name in wanted if name in facts},
            **{name: facts["versions"][name] for name in ("torch", "bsbr_pl", "python")},
            "dtype": self.dtype,
            "commit": git_commit(),
        }
        self.problems |= {c.name: c.problem for c in self.checkpoints if c.problem}
        self._labels = labels(self.checkpoints)

    def run(self) -> None:
        """Measure what is missing, with a progress bar. Ctrl-C loses only the measurement under way."""
        usable = [c for c in self.checkpoints if c.module is not None]
        self._share("certificates", [self._certificate(checkpoint) for checkpoint in usable])
        found = [self.results.get(self.identity(checkpoint, "certificate")) for checkpoint in usable]
        certified = [c for c, certificate in zip(usable, found, strict=True) if certificate and certificate["passed"]]
        cells: list[Cell] = []
        for checkpoint in certified:
            with self._attempt(checkpoint):
                cells += self._accuracies(checkpoint)
        self._share("accuracy", cells)
        configurations: dict[str, list[Checkpoint]] = defaultdict(list)
        for checkpoint in certified:
            configurations[body(checkpoint)].append(checkpoint)
        for length in tqdm(self.lengths, "costs", disable=None):
            self._costs({key: c[0] for key, c in configurations.items() if _can_read(c[0], length + 1)}, length)
        self.results.read()

    def _share(self, title: str, cells: Sequence[Cell]) -> None:
        """Measure what is missing and no other process is at; then wait for those, in case one of them gives up."""
        for wait in (False, True):
            others = []
            for cell in tqdm(cells, title, disable=None):
                with self._attempt(cell.checkpoint):
                    if not self._measured(cell, wait):
                        others.append(cell)
            if not others:
                return
            cells = others

    def _measured(self, cell: Cell, wait: bool) -> bool:
        """Whether the results hold this cell, after measuring it if need be; False where another process is at it."""
        if self.results.get(cell.identity) is not None:
            return True
        with self.results.claim(cell.identity, wait) as claimed:
            if claimed and self.results.get(cell.identity) is None:
                self.results.add(cell.identity, cell.measure(), self._about(cell.checkpoint))
            return claimed

    def _certificate(self, checkpoint: Checkpoint) -> Cell:
        identity = self.identity(checkpoint, "certificate")
        return Cell(identity, checkpoint, lambda: certify(self._module(checkpoint)).as_dict())

    def _accuracies(self, checkpoint: Checkpoint) -> list[Cell]:
        data = checkpoint.open_data()
        if not isinstance(data, TextData):
            identity = self.identity(checkpoint, "recall", split=self.split, data=data.fingerprint)
            return [Cell(identity, checkpoint, partial(self._recall, checkpoint, data))]
        cells = []
        for multiple in self.multiples:
            # As many tokens in a batch whatever the length, and in training's own length exactly its batches.
            length, batch = data.eval_context_length, data.eval_batch_size
            if multiple > 1:
                length, batch = multiple * data.context_length, max(1, data.batch_size // multiple)
            if not _can_read(checkpoint, length):
                continue
            identity = self.identity(checkpoint, "text", split=self.split, data=data.fingerprint, length=length)
            cells.append(Cell(identity, checkpoint, partial(self._text_accuracy, checkpoint, length, batch)))
        return cells

    def _recall(self, checkpoint: Checkpoint, data: TokenData) -> dict[str, Any]:
        model = self._module(checkpoint)
        found = recall_accuracy(model, data, self.split)
        return found | ({"retrieval": retrieval(model, data, self.split)} if routes(model, data) else {})

    def _text_accuracy(self, checkpoint: Checkpoint, length: int, batch_size: int) -> dict[str, Any]:
        data = checkpoint.open_data(eval_batch_size=batch_size, eval_context_length=length)
        assert isinstance(data, TextData)
        return text_accuracy(self._module(checkpoint), data, self.split)

    def _costs(self, representatives: dict[str, Checkpoint], length: int) -> None:
        """The costs of one checkpoint of every configuration, in the same rounds."""
        identities = {key: self.cost_identity(checkpoint, length) for key, checkpoint in representatives.items()}
        if all(self.results.get(identity) is not None for identity in identities.values()):
            return
        with undisturbed():
            self.results.read()
            missing = [key for key, identity in identities.items() if self.results.get(identity) is None]
            names = {key: representatives[key].name for key in missing}
            try:
                models = {key: self._module(representatives[key]) for key in missing}
                found = measure_costs(models, length, self.rounds) if models else {}
            except (RuntimeError, MemoryError) as error:  # out of memory, most likely: the other lengths go on
                for name in names.values():
                    self.problems[name] = f"costs at {length} tokens: {one_line(error, 300)}"
                return
            for key, values in found.items():
                about = self._about(representatives[key]) | {"timed_with": sorted(names.values())}
                self.results.add(identities[key], values, about)

    def identity(self, checkpoint: Checkpoint, kind: str, **more: Any) -> dict[str, Any]:
        """What decides the values of one measurement."""
        return {
            "kind": kind,
            "checkpoint": checkpoint.digest,
            **more,
            "environment": self.environment,
            "version": VERSION,
        }

    def cost_identity(self, checkpoint: Checkpoint, length: int) -> dict[str, Any]:
        """Costs are those of an architecture at a size, whatever its weights: seeds share them."""
        identity = self.identity(checkpoint, "cost", length=length, rounds=self.rounds)
        return identity | {"checkpoint": body(checkpoint)}

    def _about(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "checkpoint": checkpoint.name,
            "label": self._labels[checkpoint.digest],
            "seed": checkpoint.seed,
            "step": checkpoint.step,
            "run": checkpoint.about_run,
            "command": self.command,
        }

    def _module(self, checkpoint: Checkpoint) -> Any:
        """A copy of the model on this device in this precision, in evaluation mode."""
        assert checkpoint.module is not None
        return copy.deepcopy(checkpoint.module.model).to(self.device, DTYPES[self.dtype]).eval()

    @contextmanager
    def _attempt(self, checkpoint: Checkpoint) -> Iterator[None]:
        """What goes wrong with one checkpoint becomes its problem, and the others go on while rows can be kept."""
        try:
            yield
        except NotKeptError:
            raise
        except DataChangedError as error:
            self.changed.add(checkpoint.digest)
            self.problems[checkpoint.name] = one_line(error, 800)
        except ValueError as error:  # its message is a sentence
            self.problems[checkpoint.name] = one_line(error, 800)
        except Exception as error:
            self.problems[checkpoint.name] = f"{type(error).__name__}: {one_line(error)}"


def body(checkpoint: Checkpoint) -> str:
    """What decides a model's costs: its architecture and sizes, but neither its weights nor how they were trained."""
    assert checkpoint.module is not None
    hparams = checkpoint.module.hparams
    return repr({name: hparams[name] for name in ("attention", *SIZES, "positions", "ff_activation", "ff_bias")})


def _can_read(checkpoint: Checkpoint, length: int) -> bool:
    """Whether the model has no learned positions, or so many."""
    assert checkpoint.module is not None
    most = checkpoint.module.model.max_length
    return most is None or length <= most


def this_command() -> str:
    """The command line of this process."""
    script = Path(sys.argv[0]).name
    return shlex.join(["python", *(["-m", "bsbr_pl.evals"] if script == "__main__.py" else [script]), *sys.argv[1:]])
